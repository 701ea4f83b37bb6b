"""The row buckets that every artifact is compiled for."""

BUCKETS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Ascending: a step of n rows runs in the first that holds them."""
MAX_DECODE_ROWS = 64
"""Of a decode step; larger buckets are for prompts."""
