"""Waveform in, features out: decoding, Kaldi fbank, low frame rate, normalisation."""
