"""`make mini-salmonn`: data and commands of the mini SALMONN."""
