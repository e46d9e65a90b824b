"""Rule tables, and folders that are read and written with them."""
