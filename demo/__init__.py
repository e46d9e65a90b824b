"""`make demo`: synthetic spoken digits, a small model trained on them, and its honest score."""
