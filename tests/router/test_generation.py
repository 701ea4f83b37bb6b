import asyncio

import pytest

from router.generation import merged
from router.sequence import TextEmitted


def event(choice, index):
    return TextEmitted(choice, index, (), "")


async def source(choice, count, closed, error=None):
    try:
        for index in range(count):
            await asyncio.sleep(0)
            yield [event(choice, index)]
        if error is not None:
            raise error
    finally:
        closed.append(choice)


async def test_batches_of_all_sources_arrive_in_order_of_each():
    closed: list[int] = []
    events = [e async for batch in merged([source(c, 5, closed) for c in range(3)]) for e in batch]
    for choice in range(3):
        assert [e.first_index for e in events if e.choice == choice] == list(range(5))
    assert sorted(closed) == [0, 1, 2]


async def test_the_first_error_ends_all():
    closed: list[int] = []
    sources = [source(0, 10**6, closed), source(1, 2, closed, ValueError("x"))]
    with pytest.raises(ValueError, match="x"):
        async for _ in merged(sources):
            pass
    assert sorted(closed) == [0, 1]


async def test_closing_closes_all():
    closed: list[int] = []
    batches = merged([source(c, 10**6, closed) for c in range(2)])
    await anext(batches)
    await batches.aclose()
    assert sorted(closed) == [0, 1]
