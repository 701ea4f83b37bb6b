"""Rotary position embedding: angles in float64, tables in float32."""

import numpy as np
import torch

from megakernel.model.rope import rope_frequencies
from megakernel.model.shape import ModelShape


class RopeTable:
    """Cosines and signed sines by position, in half-split ("rotate half") order; grows as positions come."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        self._frequencies = rope_frequencies(shape)
        self._device = device
        self._cos, self._sin = self._page(0, 1024)

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [rows, 1, head_dim]: rotated = x * cos + (second half, first half) * sin."""
        needed = int(positions.max()) + 1
        while len(self._cos) < needed:
            more_cos, more_sin = self._page(len(self._cos), 2 * len(self._cos))
            self._cos = torch.cat([self._cos, more_cos])
            self._sin = torch.cat([self._sin, more_sin])
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _page(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = np.arange(start, end, dtype=np.float64)[:, None] * self._frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        tables = (np.concatenate([cos, cos], 1), np.concatenate([-sin, sin], 1))
        first, second = (
            torch.from_numpy(table.astype(np.float32)).unsqueeze(1).to(self._device) for table in tables
        )
        return first, second
