"""Whole speech LLMs as they were published."""
