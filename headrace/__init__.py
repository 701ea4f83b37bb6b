"""Command line and composition root: the only package that imports all the others."""

__version__ = "0.1.0"
