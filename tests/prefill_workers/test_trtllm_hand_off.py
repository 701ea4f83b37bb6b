"""The engine over TensorRT-LLM's double behind a real prefill worker: fifty prompts, sixteen at once, to a
real receiver and a PyTorch decoder, while some are cancelled and some transfers fail."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import msgspec
import numpy as np
import pytest

from cluster.config import PrefillConfig, TransferConfig
from cluster.ids import Epoch, HandoffId, RequestId, new_handoff_id
from cluster.messages import PrefillRequest
from cluster.transfer import HandoffError
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from cluster.wire.conversions import prefill_request_to_proto
from decode_workers.kv_import import PoolSink
from decode_workers.torch_executor import TorchExecutor
from prefill_workers.pool_layout import RankPool
from prefill_workers.torch_engine import TorchPrefillEngine
from prefill_workers.worker import PrefillWorker
from tests.cluster.transfer.loopback import KeepingSink, receiver_at_work
from tests.prefill_workers.exports import random_tokens
from tests.prefill_workers.test_torch_hand_off import BLOCK, VOCAB_SIZE, rows_of
from tests.prefill_workers.test_trtllm import WEIGHTS, Rig

NUM_PROMPTS, AT_ONCE, LONGEST = 50, 16, 2000
FIRST = 60
"""Tokens of the prompt that is cancelled: one piece."""
FATES = ("arrives",) * 6 + ("is cancelled", "its client leaves", "nobody expects it", "its epoch is over")


class Decoder:
    """One decode worker's pool, dealt out in tables that are never reused."""

    def __init__(self) -> None:
        self.executor = TorchExecutor(WEIGHTS, "tiny", 1400, BLOCK, num_threads=1)
        self._next_block = 0

    def table(self, num_tokens: int) -> list[int]:
        count = -(-num_tokens // BLOCK)
        self._next_block += count
        return list(range(self._next_block - count, self._next_block))

    def logits(self, prompt: list[int], table: list[int], num_there: int) -> np.ndarray:
        logits = None
        for start in range(num_there, len(prompt), 64):
            logits = self.executor.run(rows_of(prompt[start : start + 64], start, table)).logits
        assert logits is not None
        return logits


@pytest.mark.parametrize(("num_ranks", "transport"), [(1, "grpc"), (2, "auto")])
async def test_what_arrives_decodes_as_if_computed_there(num_ranks: int, transport: str) -> None:
    dice = random.Random(num_ranks)
    decoder, own = Decoder(), Decoder()
    rig = Rig(
        own.executor.layout,
        tensor_parallel_size=num_ranks,
        num_blocks=120,
        staging_bytes=4 << 20,
        delay_s=0.0003,
    )
    worker = PrefillWorker(
        rig.engine,
        vocab_size=VOCAB_SIZE,
        max_context_tokens=LONGEST + 1,
        config=PrefillConfig(max_tokens_per_step=64),
        transfer=TransferConfig(transport=transport, chunk_bytes=4096),
    )
    shared = random_tokens(150, 99)
    ends: dict[str, int] = {}

    async def hand_off(number: int, stub: pb_grpc.PrefillStub, receiver) -> None:
        fate = "arrives" if number == 0 else dice.choice(FATES)
        length = LONGEST if number == 0 else dice.choice([6, 33, 64, 200])
        prompt = [*shared[: dice.choice([0, 150])], *random_tokens(length, number)][:LONGEST]
        first_token = dice.choice([0, 0, 2])
        num_tokens = len(prompt) - 1 - first_token
        table = decoder.table(len(prompt))
        committed: list[int] = []
        aborted: list[HandoffError] = []
        handoff_id = new_handoff_id()
        if fate != "nobody expects it":
            sink = PoolSink(decoder.executor, table, BLOCK, committed.append, aborted.append)
            receiver.receiver.expect(handoff_id, first_token, num_tokens, sink)
        target = receiver.target()
        if fate == "its epoch is over":
            target = msgspec.structs.replace(target, epoch=Epoch(3))
        request = PrefillRequest(
            request_id=RequestId(f"r{number}"),
            handoff_id=handoff_id,
            prompt_token_ids=tuple(prompt[:-1]),
            first_token=first_token,
            target=target,
            layout_fingerprint=rig.engine.layout.fingerprint,
        )
        call = stub.Run(prefill_request_to_proto(request), timeout=120)
        if fate in ("is cancelled", "its client leaves"):
            await asyncio.sleep(dice.random() * 0.05)
            if fate == "its client leaves":
                call.cancel()
            else:
                await stub.Cancel(pb.CancelHandoffRequest(handoff_id=handoff_id), timeout=60)
        try:
            await call
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            assert fate != "arrives", call.details() if hasattr(call, "details") else ""
            assert committed == []
            ends["fails"] = ends.get("fails", 0) + 1
            return
        ends[fate] = ends.get(fate, 0) + 1
        assert committed == [num_tokens]
        if first_token:
            decoder.executor.run(rows_of(prompt[:first_token], 0, table))
        theirs = decoder.logits(prompt, table, len(prompt) - 1)
        np.testing.assert_array_equal(theirs[-1], own.logits(prompt, own.table(len(prompt)), 0)[-1])

    host, port = await worker.start()
    try:
        async with receiver_at_work(layout=decoder.executor.layout) as receiver:
            async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
                stub = pb_grpc.PrefillStub(channel)
                gate = asyncio.Semaphore(AT_ONCE)

                async def one(number: int) -> None:
                    async with gate:
                        await hand_off(number, stub, receiver)

                await asyncio.gather(*(one(number) for number in range(NUM_PROMPTS)))
        assert ends["arrives"] >= NUM_PROMPTS // 3
        assert ends["fails"] >= NUM_PROMPTS // 10
        assert await asyncio.to_thread(rig.executor.is_idle_within, 20)
        assert rig.executor.blocks.num_used_blocks == 0
        rig.executor.blocks.check()
        assert rig.executor.monitor.violations == []
        assert worker.status().running_requests == 0
        assert worker.is_healthy()
    finally:
        await worker.stop(grace_s=0)
        decoder.executor.close()
        own.executor.close()
    assert rig.executor.error is None


@contextlib.asynccontextmanager
async def serving(
    rig: Rig,
) -> AsyncIterator[tuple[PrefillWorker, Callable[..., Awaitable[None]], pb_grpc.PrefillStub]]:
    """A worker, how to have a prompt handed off to a receiver that keeps it, and the worker's stub."""
    worker = PrefillWorker(
        rig.engine,
        vocab_size=VOCAB_SIZE,
        max_context_tokens=LONGEST + 1,
        config=PrefillConfig(max_tokens_per_step=64),
        transfer=TransferConfig(),
    )
    host, port = await worker.start()
    try:
        async with (
            receiver_at_work(layout=rig.engine.layout) as receiver,
            grpc.aio.insecure_channel(f"{host}:{port}") as channel,
        ):
            stub = pb_grpc.PrefillStub(channel)

            async def hand_off(tokens: list[int], handoff_id: HandoffId) -> None:
                sink = KeepingSink()
                receiver.receiver.expect(handoff_id, 0, len(tokens), sink)
                request = PrefillRequest(
                    request_id=RequestId("r"),
                    handoff_id=handoff_id,
                    prompt_token_ids=tuple(tokens),
                    first_token=0,
                    target=receiver.target(),
                    layout_fingerprint=rig.engine.layout.fingerprint,
                )
                await stub.Run(prefill_request_to_proto(request), timeout=60)
                assert sink.committed == len(tokens)

            yield worker, hand_off, stub
    finally:
        await worker.stop(grace_s=0)


async def test_a_prompt_waits_for_memory_that_a_cancelled_ones_copies_still_use(monkeypatch) -> None:
    """There is staging memory for one of them at a time."""
    read, may_read, is_reading = RankPool.read_at, threading.Event(), threading.Event()

    def late(self, layers, places, own) -> None:
        if own.shape[2] == FIRST:
            is_reading.set()
            assert may_read.wait(30)
        read(self, layers, places, own)

    layout = TorchPrefillEngine(WEIGHTS, "tiny", 4, BLOCK, 64, 1).layout
    rig = Rig(layout, staging_bytes=100 * layout.bytes_per_token)
    async with serving(rig) as (_, hand_off, stub):
        monkeypatch.setattr(RankPool, "read_at", late)
        first_id = new_handoff_id()
        first = asyncio.create_task(hand_off(random_tokens(FIRST), first_id))
        assert await asyncio.to_thread(is_reading.wait, 30)
        await stub.Cancel(pb.CancelHandoffRequest(handoff_id=first_id), timeout=60)
        with pytest.raises(grpc.aio.AioRpcError, match="cancelled"):
            await first
        second = asyncio.create_task(hand_off(random_tokens(90, 1), new_handoff_id()))
        done, _ = await asyncio.wait([second], timeout=0.5)
        assert not done, "its memory is another's yet"
        may_read.set()
        await second


def becomes(is_so: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + 10
    while not is_so() and time.monotonic() < end_s:
        time.sleep(0.01)
    return is_so()


async def test_a_worker_whose_rank_is_gone_is_unhealthy_at_once() -> None:
    """So that it is replaced, also where a prompt is under way."""
    layout = TorchPrefillEngine(WEIGHTS, "tiny", 4, BLOCK, 64, 1).layout
    rig = Rig(layout, delay_s=0.05)
    async with serving(rig) as (worker, hand_off, _):
        running = asyncio.create_task(hand_off(random_tokens(400), new_handoff_id()))
        assert await asyncio.to_thread(becomes, lambda: bool(rig.engine._jobs))
        rig.executor._workers[0]._client.close()
        with pytest.raises(grpc.aio.AioRpcError, match="has left the engine"):
            await running
        assert await asyncio.to_thread(becomes, lambda: not worker.is_healthy())
