"""A decode worker over real gRPC, its engine over the hash of KV."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.block_hash import chain_hashes, chain_salt
from cluster.config import DecodeConfig
from cluster.ids import Epoch, HandoffId, WorkerId
from cluster.messages import (
    PROTOCOL_VERSION,
    DecodeEvent,
    FailureCode,
    FinishReason,
    GenerateRequest,
    HandoffFailed,
    Reserved,
    SequenceFailed,
    SequenceFinished,
    TokensEmitted,
    WorkerAddress,
)
from cluster.transfer import HandoffHeader, KvChunk
from cluster.transfer.grpc_transport import GrpcKvTransport
from cluster.wire import conversions
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from decode_workers.worker import DecodeWorker
from tests.decode_workers.multi_step_support import MultiHashExecutor
from tests.decode_workers.support import (
    CARD,
    TOKENIZER,
    HashExecutor,
    drawn,
    expected_tokens,
    greedy,
    request_of,
    wire_kv,
)

EPOCH = Epoch(7)
HELLO = pb.Hello(
    protocol_version=PROTOCOL_VERSION, model=CARD.name, model_fingerprint=CARD.fingerprint, router_id="test"
)
LONG = greedy(80, ignore_eos=True)


@asynccontextmanager
async def running_worker(
    executor: HashExecutor | None = None, config: DecodeConfig | None = None
) -> AsyncIterator[DecodeWorker]:
    worker = DecodeWorker(
        executor or HashExecutor(num_blocks=200),
        TOKENIZER,
        CARD,
        config or DecodeConfig(),
        epoch=lambda: EPOCH,
    )
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop(grace_s=0)


class Router:
    """One stream to a worker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = pb_grpc.DecodeStub(channel).Generate()
        self.messages: list[list[DecodeEvent]] = []

    async def send(self, **command: object) -> None:
        await self.call.write(pb.DecodeCommand(**command))  # type: ignore[arg-type]

    async def generate(self, *requests: GenerateRequest) -> None:
        for request in requests:
            await self.send(generate=conversions.generate_request_to_proto(request))

    async def until(self, is_enough: Callable[[list[DecodeEvent]], bool]) -> list[DecodeEvent]:
        """All events so far, once there are enough."""
        async with asyncio.timeout(20):
            while not is_enough(self.events):
                message = await self.call.read()
                assert isinstance(message, pb.DecodeEvents), "the stream ended early"
                self.messages.append([conversions.event_from_proto(event) for event in message.events])
        return self.events

    @property
    def events(self) -> list[DecodeEvent]:
        return [event for message in self.messages for event in message]

    async def finish(self, *request_ids: str) -> list[DecodeEvent]:
        ends = SequenceFinished | SequenceFailed
        return await self.until(
            lambda events: {e.request_id for e in events if isinstance(e, ends)} >= set(request_ids)
        )

    async def code(self) -> tuple[grpc.StatusCode, str]:
        async with asyncio.timeout(20):
            with suppress(grpc.aio.AioRpcError):
                while isinstance(await self.call.read(), pb.DecodeEvents):
                    pass
            return await self.call.code(), await self.call.details()

    def tokens(self, request_id: str) -> list[int]:
        emitted = [e for e in self.events if isinstance(e, TokensEmitted) and e.request_id == request_id]
        return [token.token_id for event in emitted for token in event.tokens]

    def end(self, request_id: str) -> DecodeEvent:
        return [event for event in self.events if event.request_id == request_id][-1]


@asynccontextmanager
async def connected(worker: DecodeWorker) -> AsyncIterator[Router]:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        router = Router(channel)
        await router.send(hello=HELLO)
        try:
            yield router
        finally:
            router.call.cancel()


async def eventually(is_so: Callable[[], bool | Awaitable[bool]]) -> None:
    for _ in range(2000):
        answer = is_so()
        if answer if isinstance(answer, bool) else await answer:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never became so")


async def test_requests_of_two_routers_at_once() -> None:
    async with running_worker() as worker, connected(worker) as one, connected(worker) as two:
        asked = {
            f"r{i}": (list(range(i, 20)), drawn(12, ignore_eos=True) if i % 2 else greedy(12))
            for i in range(10)
        }
        for i, (request_id, (prompt, sampling)) in enumerate(asked.items()):
            await (one if i < 5 else two).generate(request_of(request_id, prompt, sampling))
        await one.finish(*list(asked)[:5])
        await two.finish(*list(asked)[5:])
        for i, (request_id, (prompt, sampling)) in enumerate(asked.items()):
            router = one if i < 5 else two
            assert router.tokens(request_id) == expected_tokens(prompt, sampling)
        assert {event.request_id for event in one.events} == set(list(asked)[:5])


async def test_a_steps_events_are_one_message() -> None:
    executor = HashExecutor(num_blocks=200)
    gate = threading.Event()
    executor.spoil = lambda _batch, _logits: gate.wait(20) and None
    async with running_worker(executor) as worker, connected(worker) as router:
        await router.generate(*(request_of(f"r{i}", [i], greedy(1, ignore_eos=True)) for i in range(5)))
        await eventually(
            lambda: bool(executor.batches) and executor.batches[0].num_sequences + len(worker._inbox) == 5
        )
        gate.set()
        await router.finish(*(f"r{i}" for i in range(5)))
        # The first step may have had any of them; all that came while it ran share the second.
        assert len(router.messages) <= 2
        assert len(router.events) == 10


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [
        ("protocol_version", 99, str(PROTOCOL_VERSION)),
        ("model", "other", CARD.name),
        ("model_fingerprint", "other-1", CARD.fingerprint),
    ],
)
async def test_skew_ends_the_stream_and_names_both_sides(field: str, value: object, ours: str) -> None:
    async with running_worker() as worker, grpc.aio.insecure_channel(worker.address) as channel:
        router, hello = Router(channel), pb.Hello()
        hello.CopyFrom(HELLO)
        setattr(hello, field, value)
        await router.send(hello=hello)
        code, details = await router.code()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert str(value) in details
        assert ours in details


async def test_the_first_command_is_hello_and_no_other() -> None:
    async with running_worker() as worker, grpc.aio.insecure_channel(worker.address) as channel:
        router = Router(channel)
        await router.generate(request_of("a", [1]))
        assert (await router.code())[0] is grpc.StatusCode.INVALID_ARGUMENT
        async with connected(worker) as second:
            await second.send(hello=HELLO)
            assert (await second.code())[0] is grpc.StatusCode.INVALID_ARGUMENT
        async with connected(worker) as third:
            await third.send()
            assert (await third.code())[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_bad_requests_fail_alone() -> None:
    async with running_worker() as worker, connected(worker) as router:
        await router.generate(
            request_of("bad", [99_999]), request_of("good", [1], greedy(4, ignore_eos=True))
        )
        await router.finish("bad", "good")
        failure = router.end("bad")
        assert isinstance(failure, SequenceFailed)
        assert failure.code is FailureCode.INVALID
        assert isinstance(router.end("good"), SequenceFinished)


async def test_a_repeated_id_leaves_the_first_alone() -> None:
    executor = HashExecutor(num_blocks=200)
    gate = threading.Event()
    executor.spoil = lambda _batch, _logits: gate.wait(20) and None
    async with running_worker(executor) as worker, connected(worker) as one, connected(worker) as two:
        await one.generate(request_of("a", [1], greedy(4, ignore_eos=True)))
        await eventually(lambda: worker.status().running_requests == 1)
        await two.generate(request_of("a", [2]))
        await two.send(cancel=pb.CancelRequest(request_id="a"))  # not its own: ignored
        await two.finish("a")
        gate.set()
        await one.finish("a")
        failure = two.end("a")
        assert isinstance(failure, SequenceFailed)
        assert "in use" in failure.message
        assert one.tokens("a") == expected_tokens([1], greedy(4, ignore_eos=True))


@pytest.mark.parametrize("how", ["cancel_call", "half_close", "command"])
async def test_leaving_frees_kv(how: str) -> None:
    executor = HashExecutor(num_blocks=200)
    gate = threading.Event()
    executor.spoil = lambda batch, _logits: batch.positions[0] > 3 and gate.wait(20) and None
    async with running_worker(executor) as worker, connected(worker) as router:
        await router.generate(request_of("a", [1, 2], LONG))
        await router.until(lambda events: len(events) >= 1)
        assert worker.status().free_kv_tokens < worker.status().total_kv_tokens
        if how == "cancel_call":
            router.call.cancel()
        elif how == "half_close":
            await router.call.done_writing()
        else:
            await router.send(cancel=pb.CancelRequest(request_id="a"))
        # The command travels; the engine is held until then, so the sequence cannot have ended by itself.
        await eventually(lambda: len(worker._inbox) > 0 or worker.status().running_requests == 0)
        gate.set()
        await eventually(lambda: worker.status().free_kv_tokens == worker.status().total_kv_tokens)
        text = (await admin_metrics(worker)).splitlines()
        assert "headrace_kv_cache_used_tokens 0.0" in text
        if how == "command":
            await router.finish("a")
            end = router.end("a")
            assert isinstance(end, SequenceFinished)
            assert end.reason is FinishReason.CANCELLED


async def admin_metrics(worker: DecodeWorker) -> str:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        response = await pb_grpc.WorkerAdminStub(channel).Metrics(pb.MetricsRequest())
        return str(response.text)


async def one_chunk(prompt: list[int], end: int) -> AsyncIterator[KvChunk]:
    yield KvChunk(layer=0, first_token=0, num_tokens=end, data=memoryview(wire_kv(prompt[:end], 0)))


@pytest.mark.parametrize("epoch", [EPOCH, Epoch(6)])
async def test_a_handoff_over_the_wire(epoch: Epoch) -> None:
    prompt, sampling = list(range(30, 50)), drawn(6, ignore_eos=True)
    executor = HashExecutor(num_blocks=200)
    async with running_worker(executor) as worker, connected(worker) as router:
        transport = GrpcKvTransport(own_host_id="elsewhere", timeout_s=10)
        address = WorkerAddress(
            worker_id=WorkerId("d"), epoch=epoch, grpc_address=worker.address, host_id="here"
        )
        header = HandoffHeader(
            handoff_id=HandoffId("kv-1"),
            epoch=epoch,
            layout_fingerprint=executor.layout.fingerprint,
            first_token=0,
            num_tokens=19,
            total_bytes=19 * 8,
        )
        await router.generate(request_of("a", prompt, sampling, handoff_id=HandoffId("kv-1")))
        await router.until(lambda events: any(isinstance(event, Reserved) for event in events))
        if epoch == EPOCH:
            await transport.send(address, header, one_chunk(prompt, 19))
        else:
            with pytest.raises(Exception, match="epoch"):
                await transport.send(address, header, one_chunk(prompt, 19))
            await router.send(prefill_locally=pb.PrefillLocally(request_id="a"))
        await router.finish("a")
        await transport.close()
        assert router.tokens("a") == expected_tokens(prompt, sampling)
        num_rows = sum(batch.num_rows for batch in executor.batches)
        assert num_rows == (6 if epoch == EPOCH else 19 + 6)


async def test_a_silent_handoff_is_reported_and_retried() -> None:
    config = DecodeConfig(handoff_timeout_s=0.2)
    async with running_worker(config=config) as worker, connected(worker) as router:
        await router.generate(request_of("a", range(9), greedy(3), handoff_id=HandoffId("kv-1")))
        events = await router.until(lambda events: any(isinstance(event, HandoffFailed) for event in events))
        assert "timeout" in next(event.message for event in events if isinstance(event, HandoffFailed))
        await router.send(retry_handoff=pb.RetryHandoff(request_id="a", handoff_id="kv-2"))
        await router.until(lambda events: sum(isinstance(event, Reserved) for event in events) == 2)
        await router.finish("a")  # nobody pushes: patience ends, and the prompt is computed here
        assert router.tokens("a") == expected_tokens(range(9), greedy(3))


async def test_what_the_cache_holds_is_told_by_chain_hash() -> None:
    executor = HashExecutor(num_blocks=200)
    async with running_worker(executor) as worker, connected(worker) as router:
        await router.generate(request_of("a", range(9), greedy(1)))
        await router.finish("a")
        salt = chain_salt(executor.layout.fingerprint, "")
        assert list(worker.drain_block_changes().stored) == chain_hashes(range(9), 4, salt)
        assert worker.drain_block_changes().stored == ()
        assert worker.all_block_hashes() == chain_hashes(range(9), 4, salt)


async def test_health_is_progress() -> None:
    executor = HashExecutor(num_blocks=200)
    gate = threading.Event()
    executor.spoil = lambda _batch, _logits: gate.wait(20) and None
    config = DecodeConfig(stall_timeout_s=0.2)
    async with running_worker(executor, config) as worker, connected(worker) as router:
        async with grpc.aio.insecure_channel(worker.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            serving = health_pb2.HealthCheckResponse.SERVING

            async def is_serving() -> bool:
                return bool((await health.Check(health_pb2.HealthCheckRequest())).status == serving)

            async def is_not_serving() -> bool:
                return not await is_serving()

            await eventually(is_serving)
            assert worker.is_healthy()
            assert worker.status().is_accepting
            await router.generate(request_of("a", [1], greedy(1)))
            await eventually(lambda: not worker.is_healthy())
            assert not worker.status().is_accepting
            assert "no step" in str(worker.health_fault())
            await eventually(is_not_serving)
            gate.set()
            await router.finish("a")
            await eventually(worker.is_healthy)


async def test_a_stop_fails_what_is_running_for_a_retry() -> None:
    executor = HashExecutor(num_blocks=200)
    gate = threading.Event()
    executor.spoil = lambda batch, _logits: batch.positions[0] > 3 and gate.wait(20) and None
    async with running_worker(executor) as worker, connected(worker) as router:
        await router.generate(request_of("a", [1, 2], LONG))
        await router.until(lambda events: len(events) >= 1)
        await eventually(lambda: int(executor.batches[-1].positions[0]) > 3)
        stopping = asyncio.create_task(worker.stop(grace_s=0))
        await eventually(lambda: len(worker._inbox) == 2)  # refuse what is new; fail what is left
        await router.generate(request_of("late", [1]))
        await eventually(lambda: len(worker._inbox) == 3)
        gate.set()
        await router.finish("a", "late")
        await stopping
        for request_id in ("a", "late"):
            failure = router.end(request_id)
            assert isinstance(failure, SequenceFailed)
            assert (failure.code, failure.is_retryable) == (FailureCode.UNAVAILABLE, True)
        assert executor.is_closed
        assert not worker.is_healthy()


async def test_steps_that_have_begun_are_waited_for_before_the_executor_is_closed() -> None:
    executor = MultiHashExecutor(num_blocks=200, num_ahead=lambda: 3)
    gate = threading.Event()
    executor.spoil = lambda batch, _logits: batch.positions[0] > 8 and gate.wait(20) and None
    async with running_worker(executor) as worker, connected(worker) as router:
        await router.generate(request_of("a", [1, 2], LONG))
        await router.until(lambda events: len(events) >= 2)
        await eventually(lambda: int(executor.batches[-1].positions[0]) > 8)
        stopping = asyncio.create_task(worker.stop(grace_s=0))
        await eventually(lambda: len(worker._inbox) == 2)
        gate.set()
        await router.finish("a")
        await stopping
        assert executor.is_closed
        assert executor.run_under_way is None
        assert worker.status().free_kv_tokens == worker.status().total_kv_tokens
        emitted = router.tokens("a")
        assert emitted == expected_tokens([1, 2], LONG)[: len(emitted)]


async def test_a_crash_in_the_midst_of_a_run_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = MultiHashExecutor(num_blocks=200, num_ahead=lambda: 2)
    async with running_worker(executor) as worker, connected(worker) as router:

        def crash(*_: object) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(worker._engine, "_commit", crash)
        await router.generate(request_of("a", [1], LONG))
        await router.finish("a")
        failure = router.end("a")
        assert isinstance(failure, SequenceFailed)
        assert "a bug" in failure.message
        assert executor.asked
        await eventually(lambda: executor.run_under_way is None)


async def test_a_stop_lets_requests_end_within_its_grace() -> None:
    async with running_worker() as worker, connected(worker) as router:
        await router.generate(request_of("a", [1, 2], LONG))
        await router.until(lambda events: len(events) >= 1)
        stopping = asyncio.create_task(worker.stop(grace_s=20))
        await router.finish("a")
        await stopping
        assert router.tokens("a") == expected_tokens([1, 2], LONG)


async def test_a_crash_of_the_engine_fails_every_request_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_worker() as worker, connected(worker) as router:

        def crash() -> list[DecodeEvent]:
            raise KeyError("a bug")

        monkeypatch.setattr(worker._engine, "step", crash)
        await router.generate(request_of("a", [1]))
        await router.finish("a")
        await router.generate(request_of("b", [1]))
        await router.finish("b")
        for request_id in ("a", "b"):
            failure = router.end(request_id)
            assert isinstance(failure, SequenceFailed)
            assert (failure.code, failure.is_retryable) == (FailureCode.UNAVAILABLE, True)
            assert "a bug" in failure.message
        await eventually(lambda: not worker.is_healthy())


async def test_a_router_that_stops_reading_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decode_workers.service.MAX_OUTBOX_EVENTS", 3)
    executor = HashExecutor(num_blocks=200)
    gate = threading.Event()
    executor.spoil = lambda _batch, _logits: gate.wait(20) and None
    async with running_worker(executor) as worker, connected(worker) as router:
        await router.generate(*(request_of(f"r{i}", [i], LONG) for i in range(6)))
        await eventually(
            lambda: bool(executor.batches) and executor.batches[0].num_sequences + len(worker._inbox) == 6
        )
        gate.set()
        # Six sequences' tokens come at once: more than the three events that may wait.
        code, details = await router.code()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "wait to be read" in details
        await eventually(lambda: worker.status().free_kv_tokens == worker.status().total_kv_tokens)


def test_a_worker_that_never_started_can_be_stopped() -> None:
    executor = HashExecutor()
    worker = DecodeWorker(executor, TOKENIZER, CARD, DecodeConfig(), epoch=lambda: EPOCH)
    asyncio.run(worker.stop())
    assert executor.is_closed


def test_status_is_one_record() -> None:
    worker = DecodeWorker(HashExecutor(), TOKENIZER, CARD, DecodeConfig(), epoch=lambda: EPOCH)
    status = worker.status()
    assert msgspec.structs.asdict(status)["total_kv_tokens"] == 32 * 4
    assert not status.is_accepting, "its engine does not run yet"
