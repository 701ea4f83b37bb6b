"""Many writers, one reader, no copy a token: what has arrived since the reader last looked, at once."""

import asyncio
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Belongs to one event loop. Holds what its reader has not taken yet: writers bound that (a sequence
    emits at most `max_tokens`)."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[T] = []
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        self._items.append(item)
        self._wake()

    def put_all(self, items: Iterable[T]) -> None:
        self._items.extend(items)
        self._wake()

    async def take(self) -> list[T]:
        """Everything that arrived, in order; waits for at least one. One taker at a time."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
