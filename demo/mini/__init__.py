"""The mini SALMONN's training and test material."""
