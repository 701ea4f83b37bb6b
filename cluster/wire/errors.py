"""What a message from outside may be wrong with."""


class WireError(ValueError):
    """A message that follows the protobuf schema but not the contract."""
