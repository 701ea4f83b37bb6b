"""The real parts end to end: PyTorch prefill, the worker, a hand-off, PyTorch decode from what arrived."""

import contextlib

import grpc
import numpy as np
import pytest

from cluster.config import PrefillConfig, TransferConfig
from cluster.ids import RequestId, new_handoff_id
from cluster.messages import PrefillRequest
from cluster.transfer import HandoffError
from cluster.wire import headrace_pb2_grpc as pb_grpc
from cluster.wire.conversions import prefill_request_to_proto
from decode_workers.kv_import import PoolSink, slots_of_blocks
from decode_workers.step_batch import NO_PARENT, StepBatch
from decode_workers.torch_executor import TorchExecutor
from prefill_workers.torch_engine import TorchPrefillEngine
from prefill_workers.worker import PrefillWorker
from tests.cluster.transfer.loopback import needs_nixl, nixl_endpoint, receiver_at_work
from tests.tiny_model import tiny_weights

BLOCK = 8
VOCAB_SIZE = 160


def rows_of(tokens: list[int], context: int, table: list[int]) -> StepBatch:
    """`tokens` as a chain behind `context` committed tokens; only the last row has logits."""
    count = len(tokens)
    positions = np.arange(context, context + count, dtype=np.int32)
    return StepBatch(
        token_ids=np.array(tokens, dtype=np.int32),
        positions=positions,
        slots=slots_of_blocks(table, BLOCK)[positions],
        parents=np.array([NO_PARENT, *range(count - 1)], dtype=np.int32),
        sequence_starts=np.array([0, count], dtype=np.int32),
        context_lengths=np.array([context], dtype=np.int32),
        block_tables=np.array([table], dtype=np.int32),
        needs_logits=positions == positions[-1],
    )


@pytest.mark.parametrize("transport", ["auto", "grpc", pytest.param("nixl", marks=needs_nixl)])
async def test_decode_from_handed_off_kv_equals_decode_from_its_own(transport: str) -> None:
    engine = TorchPrefillEngine(tiny_weights(1), "model", 64, BLOCK, max_tokens_per_step=24, num_threads=1)
    executor = TorchExecutor(tiny_weights(1), "model", 64, BLOCK, num_threads=1)
    worker = PrefillWorker(
        engine,
        vocab_size=VOCAB_SIZE,
        max_context_tokens=256,
        config=PrefillConfig(max_tokens_per_step=24),
        transfer=TransferConfig(transport=transport, chunk_bytes=4096),  # type: ignore[arg-type]
    )
    prompt = np.random.default_rng(0).integers(0, VOCAB_SIZE, 60).tolist()
    own_table, handed_table = [3, 9, 1, 7, 60, 22, 23, 40], [50, 4, 33, 12, 5, 6, 0, 63]
    expected = [executor.run(rows_of(prompt, 0, own_table)).logits]
    expected.append(executor.run(rows_of([17], 60, own_table)).logits)

    host, port = await worker.start()
    try:
        async with contextlib.AsyncExitStack() as stack:
            nixl = await stack.enter_async_context(nixl_endpoint()) if transport == "nixl" else None
            receiver = await stack.enter_async_context(receiver_at_work(layout=executor.layout, nixl=nixl))
            async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
                # The first turn brings all but the prompt's last token; the second, most of it cached in the
                # prefill worker by now, brings what a decode worker with 11 cached tokens lacks.
                for first_token in (0, 11):
                    committed: list[int] = []
                    aborted: list[HandoffError] = []
                    sink = PoolSink(executor, handed_table, BLOCK, committed.append, aborted.append)
                    handoff_id = new_handoff_id()
                    receiver.receiver.expect(handoff_id, first_token, 59 - first_token, sink)
                    request = PrefillRequest(
                        request_id=RequestId("req-1"),
                        handoff_id=handoff_id,
                        prompt_token_ids=tuple(prompt[:-1]),
                        first_token=first_token,
                        target=receiver.target(),
                        layout_fingerprint=engine.layout.fingerprint,
                    )
                    message = prefill_request_to_proto(request)
                    result = await pb_grpc.PrefillStub(channel).Run(message, timeout=60)
                    assert (committed, aborted) == ([59 - first_token], [])
                    assert result.transport == ("shared_memory" if transport == "auto" else transport)
                    assert result.cached_tokens == (0 if first_token == 0 else 56)
                    assert result.bytes_sent == (59 - first_token) * engine.layout.bytes_per_token
                    logits = [executor.run(rows_of(prompt[-1:], 59, handed_table)).logits]
                    logits.append(executor.run(rows_of([17], 60, handed_table)).logits)
                    for theirs, own in zip(logits, expected, strict=True):
                        np.testing.assert_array_equal(theirs, own)
    finally:
        await worker.stop(grace_s=0)
        executor.close()
