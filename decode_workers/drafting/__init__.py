"""Lossless speculation: who proposes tokens, what they are worth, and how many rows they get."""
