"""Vocoders: hidden states of the LLM to speech, in the voice of a prompt."""
