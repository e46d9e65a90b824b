"""Error rates of transcripts, and the reports on them."""
