"""The engine over TensorRT-LLM's double behind a real prefill worker: fifty prompts, sixteen at once, to a
real receiver and a PyTorch decoder, while some are cancelled and some transfers fail."""

import asyncio
import random

import grpc
import msgspec
import numpy as np
import pytest

from cluster.config import PrefillConfig, TransferConfig
from cluster.ids import Epoch, RequestId, new_handoff_id
from cluster.messages import PrefillRequest
from cluster.transfer import HandoffError
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from cluster.wire.conversions import prefill_request_to_proto
from decode_workers.kv_import import PoolSink
from decode_workers.torch_executor import TorchExecutor
from prefill_workers.worker import PrefillWorker
from tests.cluster.transfer.loopback import receiver_at_work
from tests.prefill_workers.exports import random_tokens
from tests.prefill_workers.test_torch_hand_off import BLOCK, VOCAB_SIZE, rows_of
from tests.prefill_workers.test_trtllm import WEIGHTS, Rig

NUM_PROMPTS, AT_ONCE, LONGEST = 50, 16, 2000
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
        assert worker.status().running_requests == 0
        assert worker.is_healthy()
    finally:
        await worker.stop(grace_s=0)
        decoder.executor.close()
        own.executor.close()
    assert rig.executor.error is None
