"""Ranks are turns of one thread here: whose turn it is."""

import contextlib
import os
import threading
from collections.abc import Iterator

_turn = threading.local()


def mpi_rank() -> int:
    return getattr(_turn, "rank", 0)


def mpi_disabled() -> bool:
    return os.environ.get("TLLM_DISABLE_MPI") == "1"


@contextlib.contextmanager
def turn_of(rank: int, world_size: int) -> Iterator[None]:
    assert 0 <= rank < world_size
    before = mpi_rank()
    _turn.rank = rank
    try:
        yield
    finally:
        _turn.rank = before
