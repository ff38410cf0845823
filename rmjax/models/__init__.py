"""The decoder, its head, and Hugging Face checkpoints in and out."""
