"""One worker of a machine at a time: while one measures itself, the others must not take its cores."""

import asyncio
import contextlib
import fcntl
from collections.abc import AsyncIterator
from pathlib import Path


@contextlib.asynccontextmanager
async def alone(lock: Path) -> AsyncIterator[None]:
    """Waits for whoever holds `lock` on this machine; a holder that dies lets go."""
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock.open("wb") as handle:
        await asyncio.to_thread(fcntl.flock, handle, fcntl.LOCK_EX)
        yield
