"""What a C++ request lets read."""

from dataclasses import dataclass


@dataclass
class SamplingConfig:
    random_seed: list[int] | None = None
