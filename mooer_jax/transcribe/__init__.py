"""Transcription of audio files: loading and splitting clips, decoding, joining transcripts."""
