"""How catalogues may be called."""

from typing import Annotated

from msgspec import Meta

MAX_NAME_CHARS = 64
NAME_PATTERN = "^[a-z0-9][a-z0-9._-]{0,63}$"
"""As the store has it."""

CatalogueName = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
