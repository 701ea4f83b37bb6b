"""What bounds a targeting request, wherever it comes in."""

MAX_BEAMS = 64
"""As many as the rows of the largest bucket."""
MAX_CONDITIONS = 16
MAX_CONDITION_VALUES = 256
MAX_ATTRIBUTE_CHARS = 256
"""Of an attribute's name, and of a value it is compared with."""
MAX_DIVERSITY = 100.0
