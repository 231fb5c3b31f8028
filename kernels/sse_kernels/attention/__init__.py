"""Softmax attention over keys and values that lie in pages."""
