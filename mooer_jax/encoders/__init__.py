"""Speech encoders: features in, frames out."""
