"""Ranks are turns of one thread here: whose turn it is."""

import contextlib
import threading
from collections.abc import Iterator

_turn = threading.local()


def mpi_rank() -> int:
    return getattr(_turn, "rank", 0)


def mpi_world_size() -> int:
    return getattr(_turn, "world_size", 1)


@contextlib.contextmanager
def turn_of(rank: int, world_size: int) -> Iterator[None]:
    before = mpi_rank(), mpi_world_size()
    _turn.rank, _turn.world_size = rank, world_size
    try:
        yield
    finally:
        _turn.rank, _turn.world_size = before
