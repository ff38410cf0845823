"""Attention over rows of trees."""
