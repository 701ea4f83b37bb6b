import asyncio

import pytest

from router.errors import RequestError
from router.http import ClientGoneError, ClientWatch, read_body


def receiver(*messages):
    """Gives the messages, then waits for ever, as a server does while the client stays."""
    queue = asyncio.Queue()
    for message in messages:
        queue.put_nowait(message)
    return queue.get


def part(body, *, more):
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


async def test_bodies_come_in_parts():
    receive = receiver(part(b"ab", more=True), part(b"", more=True), part(b"c", more=False))
    assert await read_body({}, receive, 3) == b"abc"


async def test_a_body_is_cut_at_the_limit():
    receive = receiver(part(b"ab", more=True), part(b"cd", more=True))
    with pytest.raises(RequestError) as error:
        await read_body({}, receive, 3)
    assert error.value.status == 413


@pytest.mark.parametrize("length", ["4", "99999999999999999999999999", "-1", "x"])
async def test_a_declared_length_over_the_limit_is_not_read(length):
    with pytest.raises(RequestError) as error:
        await read_body({"content-length": length}, receiver(), 3)
    assert error.value.status == 413


async def test_a_client_that_leaves_inside_its_body_is_gone():
    with pytest.raises(ClientGoneError):
        await read_body({}, receiver(part(b"ab", more=True), GONE), 30)


async def test_a_body_that_stalls_times_out(monkeypatch):
    monkeypatch.setattr("router.http.BODY_TIMEOUT_S", 0.02)
    with pytest.raises(RequestError) as error:
        await read_body({}, receiver(part(b"ab", more=True)), 30)
    assert error.value.status == 408


async def test_a_disconnect_ends_the_block():
    queue = asyncio.Queue()
    queue.put_nowait(GONE)

    async def serve():
        async with ClientWatch(queue.get):
            await asyncio.sleep(60)

    with pytest.raises(ClientGoneError):
        await serve()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_once_answered_a_disconnect_is_no_news():
    queue = asyncio.Queue()
    async with ClientWatch(queue.get) as client:
        client.answered()
        queue.put_nowait(GONE)
        await asyncio.sleep(0.01)


async def test_a_cancel_from_outside_stays_one():
    async def serve():
        async with ClientWatch(asyncio.Queue().get):
            await asyncio.sleep(60)

    task = asyncio.create_task(serve())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
