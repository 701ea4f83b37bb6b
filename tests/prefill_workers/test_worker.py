"""A prefill worker on loopback: gRPC in, an engine thread inside, a real hand-off out."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.config import PrefillConfig, TransferConfig
from cluster.ids import Epoch, HandoffId, RequestId, new_handoff_id
from cluster.messages import HandoffCancelState, PrefillRequest, PrefillResult
from cluster.timeline import Stage
from cluster.transfer import HANDOFF_CODE_KEY
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from cluster.wire.conversions import prefill_request_to_proto, prefill_result_from_proto
from prefill_workers.engine import PrefillDone
from prefill_workers.worker import PrefillWorker
from tests.cluster.transfer.loopback import KeepingSink, ReceiverAtWork, memfds, receiver_at_work
from tests.prefill_workers.kv_engine import LAYOUT, VOCAB_SIZE, KvEngine, expected_kv

MAX_CONTEXT = 200
TOKENS = tuple(range(1, 31))


class Rig:
    """One worker, one receiver, and the client's end of the first."""

    def __init__(
        self,
        worker: PrefillWorker,
        engine: KvEngine,
        receiver: ReceiverAtWork,
        address: str,
        channel: grpc.aio.Channel,
    ) -> None:
        self.worker = worker
        self.address = address
        self.engine = engine
        self.receiver = receiver
        self.channel = channel
        self.stub = pb_grpc.PrefillStub(channel)

    def expect(
        self, tokens: tuple[int, ...] = TOKENS, first_token: int = 0, deadline_s: float | None = None
    ) -> tuple[PrefillRequest, KeepingSink]:
        """A request, and the sink its hand-off goes to."""
        sink, handoff_id = KeepingSink(), new_handoff_id()
        self.receiver.receiver.expect(handoff_id, first_token, len(tokens) - first_token, sink)
        return self.request(handoff_id, tokens, first_token, deadline_s), sink

    def request(
        self,
        handoff_id: HandoffId,
        tokens: tuple[int, ...] = TOKENS,
        first_token: int = 0,
        deadline_s: float | None = None,
    ) -> PrefillRequest:
        return PrefillRequest(
            request_id=RequestId("req-1"),
            handoff_id=handoff_id,
            prompt_token_ids=tokens,
            first_token=first_token,
            target=self.receiver.target(),
            layout_fingerprint=LAYOUT.fingerprint,
            deadline_unix_ns=None if deadline_s is None else time.time_ns() + int(deadline_s * 1e9),
        )

    async def run(self, request: PrefillRequest) -> PrefillResult:
        reply = await self.stub.Run(prefill_request_to_proto(request), timeout=20)
        return prefill_result_from_proto(reply)

    async def refused(self, request: PrefillRequest) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.run(request)
        return caught.value

    async def cancel(self, handoff_id: str) -> str:
        return (await self.stub.Cancel(pb.CancelHandoffRequest(handoff_id=handoff_id), timeout=10)).state

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not is_so():  # noqa: ASYNC110 - what is waited for happens in the engine's thread
                await asyncio.sleep(0.005)

    async def until_all_freed(self) -> None:
        """Blocks on this side, expectations on the other."""
        await self.until(lambda: self.engine.free_kv_tokens == self.engine.total_kv_tokens)
        assert self.receiver.receiver.num_live == 0
        status = self.worker.status()
        assert (status.queued_requests, status.running_requests, status.queued_tokens) == (0, 0, 0)


@asynccontextmanager
async def rig(
    engine: KvEngine | None = None,
    *,
    max_queued: int = 16,
    transport: str = "auto",
    stall_timeout_s: float = 30.0,
    receiver_timeout_s: float = 10.0,
    chunk_bytes: int = 4096,
    port: int = 0,
) -> AsyncIterator[Rig]:
    engine = engine or KvEngine()
    worker = PrefillWorker(
        engine,
        vocab_size=VOCAB_SIZE,
        max_context_tokens=MAX_CONTEXT,
        config=PrefillConfig(max_tokens_per_step=64, max_queued_requests=max_queued),
        transfer=TransferConfig(transport=transport, chunk_bytes=chunk_bytes, timeout_s=5),  # type: ignore[arg-type]
        port=port,
        stall_timeout_s=stall_timeout_s,
    )
    host, bound_port = await worker.start()
    engine.admitted.clear()
    try:
        async with receiver_at_work(receiver_timeout_s, LAYOUT) as receiver:
            address = f"{host}:{bound_port}"
            async with grpc.aio.insecure_channel(address) as channel:
                yield Rig(worker, engine, receiver, address, channel)
    finally:
        engine.before_step = lambda: None
        await worker.stop(grace_s=0)
        assert not any(thread.name == "prefill-engine" for thread in threading.enumerate())
        assert memfds() == []


def assert_kv(sink: KeepingSink, tokens: tuple[int, ...], first_token: int = 0) -> None:
    assert sink.committed == len(tokens) - first_token
    assert sink.tokens == {
        (layer, i): expected_kv(tokens, layer, i)
        for layer in range(LAYOUT.num_layers)
        for i in range(first_token, len(tokens))
    }


class Held:
    """Makes an engine's steps wait, so that a test can act in the middle of a job."""

    def __init__(self, engine: KvEngine, num_free_steps: int = 0) -> None:
        self.reached, self.may_go_on = threading.Event(), threading.Event()
        self._num_free_steps = num_free_steps
        engine.before_step = self._before_step

    def _before_step(self) -> None:
        self._num_free_steps -= 1
        if self._num_free_steps < 0:
            self.reached.set()
            assert self.may_go_on.wait(20)

    async def wait_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 10)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
@pytest.mark.parametrize("first_token", [0, 13])
async def test_kv_arrives_byte_for_byte(transport: str, first_token: int) -> None:
    async with rig(transport=transport) as r:
        request, sink = r.expect(first_token=first_token)
        result = await r.run(request)
        assert_kv(sink, TOKENS, first_token)
        assert result.transport == {"auto": "shared_memory", "grpc": "grpc"}[transport]
        assert result.bytes_sent == (len(TOKENS) - first_token) * LAYOUT.bytes_per_token
        assert result.cached_tokens == 0
        assert 0 <= result.bytes_sent_before_forward_end <= result.bytes_sent
        assert set(result.stamps_ns) == {Stage.PREFILL_STARTED, Stage.PREFILL_FINISHED}
        await r.until_all_freed()


async def test_a_cached_prefix_is_sent_too_and_reported() -> None:
    async with rig() as r:
        first, _ = r.expect(TOKENS[:20])
        await r.run(first)
        second, sink = r.expect(TOKENS, first_token=4)
        result = await r.run(second)
        assert result.cached_tokens == 20
        assert_kv(sink, TOKENS, 4)
        await r.until_all_freed()


async def test_kv_leaves_while_the_forward_pass_still_runs() -> None:
    async with rig() as r:
        held = Held(r.engine, num_free_steps=2)
        request, sink = r.expect()
        running = asyncio.create_task(r.run(request))
        await held.wait_reached()
        await r.until(lambda: sink.num_writes == 2 * LAYOUT.num_layers)
        held.may_go_on.set()
        result = await running
        assert result.bytes_sent_before_forward_end >= 16 * LAYOUT.bytes_per_token
        assert_kv(sink, TOKENS)


async def test_large_exports_are_split() -> None:
    async with rig(KvEngine(tokens_per_step=128)) as r:
        tokens = tuple(range(1, 181))
        request, sink = r.expect(tokens)
        await r.run(request)
        assert_kv(sink, tokens)
        runs = -(-180 // (4096 // LAYOUT.bytes_per_token_layer))
        assert sink.num_writes >= runs * LAYOUT.num_layers


class _LateAcknowledger(pb_grpc.KvReceiverServicer):
    """Takes any hand-off and acknowledges it when told to."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self.has_all, self.may_answer = asyncio.Event(), asyncio.Event()

    async def Push(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
        await context.write(pb.HandoffReply(accepted=pb.HandoffAccepted()))
        while await context.read() is not grpc.aio.EOF:
            pass
        self.has_all.set()
        await self.may_answer.wait()
        acknowledged = pb.HandoffAcknowledged(num_bytes=self._num_bytes)
        await context.write(pb.HandoffReply(acknowledged=acknowledged))


async def test_blocks_are_held_until_the_acknowledgement() -> None:
    receiver = _LateAcknowledger(len(TOKENS) * LAYOUT.bytes_per_token)
    server = grpc.aio.server()
    pb_grpc.add_KvReceiverServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rig() as r:
        message = prefill_request_to_proto(r.request(HandoffId("kv-late")))
        message.target.grpc_address = f"127.0.0.1:{port}"
        running = asyncio.ensure_future(r.stub.Run(message, timeout=20))
        await asyncio.wait_for(receiver.has_all.wait(), 10)
        await r.until(lambda: not r.engine.has_work())
        assert r.engine.free_kv_tokens == r.engine.total_kv_tokens - len(TOKENS)
        receiver.may_answer.set()
        await running
        await r.until_all_freed()
    await server.stop(None)


async def test_many_at_once_wait_for_room_and_all_arrive() -> None:
    async with rig(KvEngine(total_kv_tokens=64), max_queued=64) as r:
        asked = [(tuple(range(i, i + 20)), *r.expect(tuple(range(i, i + 20)))) for i in range(24)]
        await asyncio.gather(*(r.run(request) for _, request, _ in asked))
        for tokens, _, sink in asked:
            assert_kv(sink, tokens)
        await r.until_all_freed()
        assert len(r.engine.threads) == 1, "one thread drives the engine"


async def test_the_earliest_deadline_is_computed_first() -> None:
    async with rig(KvEngine(total_kv_tokens=30)) as r:
        held = Held(r.engine)
        running = [asyncio.create_task(r.run(r.expect()[0]))]
        await held.wait_reached()
        prompts = {60: (60,) * 25, 20: (20,) * 25, 40: (40,) * 25}
        for deadline_s, tokens in prompts.items():
            running.append(asyncio.create_task(r.run(r.expect(tokens, deadline_s=deadline_s)[0])))
        await r.until(lambda: r.worker.status().queued_requests == 3)
        held.may_go_on.set()
        await asyncio.gather(*running)
        assert [tokens[0] for tokens in r.engine.admitted] == [1, 20, 40, 60]


async def test_a_full_queue_refuses_at_once() -> None:
    async with rig(KvEngine(total_kv_tokens=30), max_queued=1) as r:
        held = Held(r.engine)
        running = [asyncio.create_task(r.run(r.expect()[0]))]
        await held.wait_reached()
        running.append(asyncio.create_task(r.run(r.expect()[0])))
        await r.until(lambda: r.worker.status().queued_requests == 1)
        request, sink = r.expect()
        error = await r.refused(request)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not sink.ended.is_set()
        r.receiver.receiver.cancel(request.handoff_id)
        held.may_go_on.set()
        await asyncio.gather(*running)
        await r.until_all_freed()


BAD: list[tuple[str, dict[str, object], grpc.StatusCode, str]] = [
    ("no prompt", {"prompt_token_ids": ()}, grpc.StatusCode.INVALID_ARGUMENT, "prompt_token_ids"),
    (
        "a long prompt",
        {"prompt_token_ids": (1,) * 201},
        grpc.StatusCode.INVALID_ARGUMENT,
        "1 to 200 tokens",
    ),
    ("a huge token", {"prompt_token_ids": (1, 1000)}, grpc.StatusCode.INVALID_ARGUMENT, "below 1000"),
    ("nothing to send", {"first_token": len(TOKENS)}, grpc.StatusCode.INVALID_ARGUMENT, "first_token"),
    ("no request id", {"request_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
    ("a huge hand-off id", {"handoff_id": "k" * 300}, grpc.StatusCode.INVALID_ARGUMENT, "handoff_id"),
    ("no hand-off id", {"handoff_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "handoff_id"),
    ("another layout", {"layout_fingerprint": "beef"}, grpc.StatusCode.FAILED_PRECONDITION, "beef"),
    ("a past deadline", {"deadline_unix_ns": 1}, grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_unix_ns"),
]


@pytest.mark.parametrize(("facts", "status", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
async def test_bad_requests_are_refused_by_name(
    facts: dict[str, object], status: grpc.StatusCode, says: str
) -> None:
    async with rig() as r:
        message = prefill_request_to_proto(r.request(HandoffId("kv-bad")))
        for name, value in facts.items():
            if name == "prompt_token_ids":
                del message.prompt_token_ids[:]
                message.prompt_token_ids.extend(value)  # type: ignore[arg-type]
            else:
                setattr(message, name, value)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await r.stub.Run(message, timeout=10)
        assert caught.value.code() is status
        assert says in (caught.value.details() or "")
        if status is grpc.StatusCode.FAILED_PRECONDITION:
            assert LAYOUT.fingerprint in (caught.value.details() or "")
        assert r.engine.admitted == []


async def test_no_target_is_refused_and_a_dead_one_is_retryable() -> None:
    async with rig() as r:
        message = prefill_request_to_proto(r.request(HandoffId("kv-nowhere")))
        message.target.grpc_address = ""
        with pytest.raises(grpc.aio.AioRpcError, match=r"target\.grpc_address"):
            await r.stub.Run(message, timeout=10)
        message.target.grpc_address = "127.0.0.1:1"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await r.stub.Run(message, timeout=10)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert dict(caught.value.trailing_metadata())[HANDOFF_CODE_KEY] == "unreachable"
        await r.until_all_freed()


async def test_a_rejected_hand_off_names_its_code_and_frees() -> None:
    async with rig() as r:
        error = await r.refused(r.request(HandoffId("kv-unknown")))
        assert error.code() is grpc.StatusCode.ABORTED
        assert dict(error.trailing_metadata())[HANDOFF_CODE_KEY] == "not_found"

        request, sink = r.expect()
        r.receiver.epoch = Epoch(99)
        error = await r.refused(request)
        assert dict(error.trailing_metadata())[HANDOFF_CODE_KEY] == "stale_epoch"
        assert sink.aborted is not None
        await r.until_all_freed()


async def test_the_same_hand_off_twice_at_once_is_refused() -> None:
    async with rig() as r:
        held = Held(r.engine)
        request, sink = r.expect()
        running = asyncio.create_task(r.run(request))
        await held.wait_reached()
        assert (await r.refused(request)).code() is grpc.StatusCode.ALREADY_EXISTS
        held.may_go_on.set()
        await running
        assert_kv(sink, TOKENS)


async def test_cancel_in_every_state() -> None:
    async with rig(KvEngine(total_kv_tokens=30)) as r:
        assert await r.cancel("kv-unknown") == HandoffCancelState.NOT_FOUND
        held = Held(r.engine, num_free_steps=1)
        computing, computing_sink = r.expect()
        queued, _ = r.expect()
        running = asyncio.create_task(r.refused(computing))
        await held.wait_reached()
        waiting = asyncio.create_task(r.refused(queued))
        await r.until(lambda: r.worker.status().queued_requests == 1)

        assert await r.cancel(queued.handoff_id) == HandoffCancelState.CANCELLED_BEFORE_ADVERTISE
        assert (await waiting).code() is grpc.StatusCode.CANCELLED
        assert await r.cancel(computing.handoff_id) == HandoffCancelState.CANCEL_REQUESTED_IN_FLIGHT
        assert (await running).code() is grpc.StatusCode.CANCELLED
        await computing_sink.wait_ended()
        assert computing_sink.committed is None
        r.receiver.receiver.cancel(queued.handoff_id)
        held.may_go_on.set()
        await r.until_all_freed()

        done, _ = r.expect()
        await r.run(done)
        assert await r.cancel(done.handoff_id) == HandoffCancelState.ALREADY_COMPLETE


@pytest.mark.parametrize("num_free_steps", [0, 2])
async def test_a_client_that_leaves_frees_both_sides(num_free_steps: int) -> None:
    async with rig() as r:
        held = Held(r.engine, num_free_steps)
        request, sink = r.expect()
        call = r.stub.Run(prefill_request_to_proto(request), timeout=20)
        await held.wait_reached()
        call.cancel()
        await sink.wait_ended()
        held.may_go_on.set()
        await r.until_all_freed()


async def test_a_deadline_ends_a_job_that_computes_and_one_that_waits() -> None:
    async with rig(KvEngine(total_kv_tokens=30)) as r:
        held = Held(r.engine)
        computing, sink = r.expect(deadline_s=0.4)
        queued, queued_sink = r.expect(deadline_s=0.3)
        running = asyncio.create_task(r.refused(computing))
        await held.wait_reached()
        waiting = asyncio.create_task(r.refused(queued))
        assert (await waiting).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await running).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await sink.wait_ended()
        assert not queued_sink.ended.is_set(), "nothing of it ever left"
        r.receiver.receiver.cancel(queued.handoff_id)
        held.may_go_on.set()
        await r.until_all_freed()


async def test_a_receiver_that_times_out_ends_the_job() -> None:
    async with rig(receiver_timeout_s=0.2) as r:
        held = Held(r.engine, num_free_steps=1)
        request, sink = r.expect()
        error = await r.refused(request)
        assert dict(error.trailing_metadata())[HANDOFF_CODE_KEY] == "timeout"
        assert sink.aborted is not None
        held.may_go_on.set()
        await r.until_all_freed()


def fail_steps(engine: KvEngine, count: int, num_free_steps: int = 0) -> None:
    """Make the steps after the free ones raise, `count` times."""
    left = [num_free_steps, count]

    def before_step() -> None:
        if left[0]:
            left[0] -= 1
        elif left[1]:
            left[1] -= 1
            raise RuntimeError("the engine broke")

    engine.before_step = before_step


@pytest.mark.parametrize("num_free_steps", [0, 2])
async def test_a_failed_step_fails_its_jobs_and_the_worker_lives_on(num_free_steps: int) -> None:
    async with rig() as r:
        fail_steps(r.engine, 1, num_free_steps)
        request, sink = r.expect()
        error = await r.refused(request)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "the engine broke" in (error.details() or "")
        await sink.wait_ended()
        assert sink.committed is None
        await r.until_all_freed()
        assert r.worker.is_healthy()
        request, sink = r.expect()
        await r.run(request)
        assert_kv(sink, TOKENS)


async def test_an_engine_that_refuses_a_job_fails_it_alone() -> None:
    async with rig() as r:

        def refuse() -> None:
            raise RuntimeError("no such adapter")

        r.engine.before_admit = refuse
        request, _ = r.expect()
        error = await r.refused(request)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "no such adapter" in (error.details() or "")
        r.receiver.receiver.cancel(request.handoff_id)
        r.engine.before_admit = lambda: None
        request, sink = r.expect()
        await r.run(request)
        assert_kv(sink, TOKENS)


async def test_an_idle_engine_that_has_no_room_fails_the_job_rather_than_wait_for_ever() -> None:
    engine = KvEngine()
    async with rig(engine) as r:
        engine.total_kv_tokens = 10
        request, _ = r.expect()
        error = await r.refused(request)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "no room for 30 tokens" in (error.details() or "")
        r.receiver.receiver.cancel(request.handoff_id)


async def test_an_engine_that_keeps_failing_makes_the_worker_unhealthy() -> None:
    async with rig() as r:
        fail_steps(r.engine, 100)
        for _ in range(3):
            request, sink = r.expect()
            assert (await r.refused(request)).code() in (
                grpc.StatusCode.INTERNAL,
                grpc.StatusCode.UNAVAILABLE,
            )
            r.receiver.receiver.cancel(request.handoff_id)
        await r.until(lambda: not r.worker.is_healthy())
        assert not r.worker.status().is_accepting
        request, sink = r.expect()
        error = await r.refused(request)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "the engine broke" in (error.details() or "")
        assert not sink.ended.is_set()
        await _until_serving(r, health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_a_step_that_never_ends_is_unhealthy_until_it_does() -> None:
    async with rig(stall_timeout_s=0.1) as r:
        held = Held(r.engine)
        request, sink = r.expect()
        running = asyncio.create_task(r.run(request))
        await held.wait_reached()
        await r.until(lambda: not r.worker.is_healthy())
        await _until_serving(r, health_pb2.HealthCheckResponse.NOT_SERVING)
        held.may_go_on.set()
        await running
        assert_kv(sink, TOKENS)
        await r.until(r.worker.is_healthy)
        await _until_serving(r, health_pb2.HealthCheckResponse.SERVING)


async def _until_serving(r: Rig, status: int) -> None:
    stub = health_pb2_grpc.HealthStub(r.channel)
    async with asyncio.timeout(10):
        request = health_pb2.HealthCheckRequest(service="headrace.v1.Prefill")
        while (await stub.Check(request, timeout=5)).status != status:  # noqa: ASYNC110 - asks over the wire
            await asyncio.sleep(0.05)


async def test_an_engine_that_cannot_start_fails_the_start_and_leaves_no_thread() -> None:
    engine = KvEngine()
    fail_steps(engine, 1)
    with pytest.raises(RuntimeError, match="the engine broke"):
        async with rig(engine):
            pass
    assert not any(thread.name == "prefill-engine" for thread in threading.enumerate())


async def test_a_port_in_use_fails_the_start_and_leaves_no_thread() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError, match="bind"):
            async with rig(port=taken.getsockname()[1]):
                pass
    assert not any(thread.name == "prefill-engine" for thread in threading.enumerate())


async def test_stop_fails_what_is_left_and_frees_the_other_side() -> None:
    async with rig() as r:
        held = Held(r.engine, num_free_steps=1)
        request, sink = r.expect()
        running = asyncio.create_task(r.refused(request))
        await held.wait_reached()
        threading.Timer(0.05, held.may_go_on.set).start()
        await r.worker.stop(grace_s=0)
        assert (await running).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        await sink.wait_ended()
        assert sink.committed is None
        assert not r.worker.is_healthy()


async def test_status_says_what_is_queued_and_what_a_step_costs() -> None:
    async with rig(KvEngine(total_kv_tokens=100)) as r:
        status = r.worker.status()
        assert [cost.rows for cost in status.step_table] == [16, 64]
        assert all(cost.ms > 0 for cost in status.step_table)
        assert (status.free_kv_tokens, status.total_kv_tokens, status.is_accepting) == (100, 100, True)
        held = Held(r.engine, num_free_steps=1)
        running = [asyncio.create_task(r.run(r.expect()[0]))]
        await held.wait_reached()
        running.append(asyncio.create_task(r.run(r.expect((5,) * 90)[0])))
        await r.until(lambda: r.worker.status().queued_requests == 1)
        status = r.worker.status()
        assert (status.running_requests, status.free_kv_tokens) == (1, 70)
        assert status.queued_tokens == 90 + 30 - 8
        held.may_go_on.set()
        await asyncio.gather(*running)


async def test_metrics_count_tokens_bytes_and_outcomes() -> None:
    async with rig() as r:
        request, _ = r.expect()
        await r.run(request)
        again, _ = r.expect()
        await r.run(again)
        await r.until_all_freed()
        num_bytes = float(2 * len(TOKENS) * LAYOUT.bytes_per_token)
        lines = await _metrics(r)
        for line in (
            "headrace_prefill_tokens_total 30.0",
            "headrace_prefill_prefix_cache_hit_tokens_total 30.0",
            'headrace_handoffs_sent_total{outcome="acknowledged"} 2.0',
            f'headrace_handoff_sent_bytes_total{{transport="shared_memory"}} {num_bytes}',
            "headrace_prefill_requests_running 0.0",
            "headrace_prefill_requests_waiting 0.0",
            "headrace_prefill_kv_cache_used_tokens 0.0",
            "headrace_prefill_kv_cache_total_tokens 256.0",
            "headrace_prefill_requests_held 0.0",
            "headrace_prefill_staging_used_bytes 0.0",
            "headrace_prefill_staging_total_bytes 1000.0",
        ):
            assert line in lines
        await r.refused(r.request(HandoffId("kv-unknown")))
        await r.refused(r.request(HandoffId("kv-empty"), ()))
        lines = await _metrics(r)
        assert 'headrace_handoffs_sent_total{outcome="not_found"} 1.0' in lines
        assert 'headrace_handoffs_sent_total{outcome="invalid_argument"} 1.0' in lines


async def test_metrics_say_what_is_held() -> None:
    """Of engines: until they have let go of a prompt, which may be behind its hand-off."""
    async with rig() as r:
        held = Held(r.engine, num_free_steps=1)
        running = asyncio.create_task(r.run(r.expect()[0]))
        await held.wait_reached()
        lines = await _metrics(r)
        assert "headrace_prefill_requests_held 1.0" in lines
        assert "headrace_prefill_staging_used_bytes 10.0" in lines
        held.may_go_on.set()
        await running


@pytest.mark.parametrize("how", ["its caller leaves", "is cancelled"])
async def test_an_acknowledged_handoff_is_one_however_its_run_ends(how: str) -> None:
    """A router has all its tokens, and leaves, before the step that exported the last layer returns."""
    async with rig() as r:
        step, may_return = r.engine.step, threading.Event()

        def late() -> list[PrefillDone]:
            finished = step()
            assert not finished or may_return.wait(20)
            return finished

        r.engine.step = late  # type: ignore[method-assign]
        request, sink = r.expect()
        running = asyncio.create_task(r.run(request))
        await sink.wait_ended()
        acknowledged = 'headrace_handoffs_sent_total{outcome="acknowledged"} 1.0'
        async with asyncio.timeout(20):
            while acknowledged not in await _metrics(r):
                pass
        if how == "is cancelled":
            assert await r.cancel(request.handoff_id) == HandoffCancelState.ALREADY_COMPLETE
            may_return.set()
            await running
        else:
            running.cancel()
            may_return.set()
        await r.until_all_freed()
        outcomes = [line for line in await _metrics(r) if line.startswith("headrace_handoffs_sent_total")]
        assert outcomes == [acknowledged]


async def _metrics(r: Rig) -> list[str]:
    admin = pb_grpc.WorkerAdminStub(r.channel)
    text: str = (await admin.Metrics(pb.MetricsRequest(), timeout=10)).text
    return text.splitlines()


async def test_reflection_and_health_name_the_services() -> None:
    async with rig() as r:
        await _until_serving(r, health_pb2.HealthCheckResponse.SERVING)
        address = r.address

        def services() -> set[str]:
            with grpc.insecure_channel(address) as channel:
                return set(ProtoReflectionDescriptorDatabase(channel).get_services())

        assert await asyncio.to_thread(services) >= {
            "headrace.v1.Prefill",
            "headrace.v1.WorkerAdmin",
            "grpc.health.v1.Health",
        }
