"""`make demo`: a small model, trained and tested on synthetic spoken digits."""
