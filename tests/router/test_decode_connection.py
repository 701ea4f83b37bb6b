import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ids import RequestId
from cluster.messages import GenerateRequest, SamplingParams, SequenceFailed, SequenceFinished, TokensEmitted
from cluster.wire import headrace_pb2 as pb
from router.channels import Channels
from router.decode_connection import LAST_BACKOFF_S, DecodeConnection, Outbox, backoff_s, hello
from router.mailbox import Mailbox
from tests.router.conftest import eventually
from tests.router.scripted_workers import ScriptedDecode


def generate(request_id, **changes):
    sampling = SamplingParams(max_tokens=3, seed=1)
    return GenerateRequest(
        request_id=RequestId(request_id), prompt_token_ids=(5, 6), sampling=sampling, **changes
    )


def command(request_id):
    return pb.DecodeCommand(generate=pb.GenerateRequest(request_id=request_id))


@given(st.integers(1, 1000), st.floats(0, 1, exclude_max=True))
def test_backoff_is_bounded(num_failures, jitter):
    assert 0 < backoff_s(num_failures, jitter) <= LAST_BACKOFF_S


async def test_outbox_keeps_order_and_forgets_what_never_left():
    outbox = Outbox()
    for request_id in ("a", "b", "c"):
        outbox.add(RequestId(request_id), command(request_id))
    outbox.cancel(RequestId("b"))
    assert [c.generate.request_id for c in await outbox.take()] == ["a"]
    assert [c.generate.request_id for c in await outbox.take()] == ["c"]
    outbox.cancel(RequestId("a"))
    (cancel,) = await outbox.take()
    assert cancel.cancel.request_id == "a"
    waiting = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.add(RequestId("d"), command("d"))
    assert len(await waiting) == 1


async def test_mailbox_gives_everything_that_arrived_in_order():
    mailbox: Mailbox[int] = Mailbox()
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(1)
    mailbox.put_all([2, 3])
    assert await taking == [1, 2, 3]
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.wait((taking,))
    mailbox.put(4)
    assert await mailbox.take() == [4]
    assert len(mailbox) == 0


@pytest.fixture
async def worker(tokenizer):
    worker = ScriptedDecode("decode-0", tokenizer, lambda hello: None)
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
async def connection(worker):
    channels = Channels()
    connection = DecodeConnection(
        worker.record.address, channels.get(worker.grpc_address), hello("m", "f", "router-1")
    )
    connection.start()
    yield connection
    await connection.stop("the test ends")
    await channels.close()


async def test_requests_share_a_stream_that_begins_with_hello(worker, connection):
    seen = {request_id: [] for request_id in ("a", "b", "c")}
    for request_id, events in seen.items():
        connection.open(generate(request_id), events.append)
    await eventually(
        lambda: all(isinstance(e[-1], SequenceFinished) for e in seen.values() if e) and all(seen.values())
    )
    for events in seen.values():
        *tokens, _ = events
        assert all(isinstance(event, TokensEmitted) for event in tokens)
        assert [event.first_index for event in tokens] == [0, 1, 2]
    (greeting,) = worker.seen.hellos
    assert (greeting.model, greeting.model_fingerprint, greeting.router_id) == ("m", "f", "router-1")
    for request_id in seen:
        connection.close(RequestId(request_id), is_ended=True)
    assert connection.num_requests == 0
    assert not worker.seen.cancels


async def test_a_broken_stream_fails_its_requests_and_opens_again(worker, connection):
    worker.behaviour.hang_at = 1
    events: list = []
    connection.open(generate("a"), events.append)
    await eventually(lambda: len(events) == 1)
    port = worker.port
    await worker.stop()
    await eventually(lambda: isinstance(events[-1], SequenceFailed))
    assert events[-1].is_retryable
    assert not connection.is_usable
    late: list = []
    connection.open(generate("b"), late.append)
    assert isinstance(late[0], SequenceFailed)
    worker.behaviour.hang_at = None
    await worker.start(port)
    await eventually(lambda: connection.is_usable)
    again: list = []
    connection.open(generate("c"), again.append)
    await eventually(lambda: bool(again) and isinstance(again[-1], SequenceFinished))
    assert len(events) == 2, "nothing of the old stream comes back"


async def test_closing_cancels_only_what_has_not_ended(worker, connection):
    worker.behaviour.hang_at = 1
    events: list = []
    connection.open(generate("a"), events.append)
    await eventually(lambda: len(events) == 1)
    connection.close(RequestId("a"), is_ended=False)
    connection.close(RequestId("a"), is_ended=False)
    await eventually(lambda: worker.seen.cancels == ["a"])


async def test_stop_fails_what_is_open(worker, connection):
    worker.behaviour.hang_at = 1
    events: list = []
    connection.open(generate("a"), events.append)
    await eventually(lambda: len(events) == 1)
    await connection.stop("going")
    assert events[-1].message == "going"
    assert events[-1].is_retryable
