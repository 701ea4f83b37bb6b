"""Decode: every step verifies a tree of rows, and every token comes from here."""
