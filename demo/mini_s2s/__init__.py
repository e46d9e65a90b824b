"""`make mini-s2s`: data and commands of the mini speech-to-speech model."""
