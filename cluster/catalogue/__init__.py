"""Catalogues: the sets of texts that targeting chooses from, compiled to tries."""
