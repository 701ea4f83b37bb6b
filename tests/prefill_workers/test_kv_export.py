import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.transfer import KvChunk
from prefill_workers.kv_export import ExportError, KvExport, split_chunk
from tests.prefill_workers.kv_engine import LAYOUT

TOKEN_BYTES = LAYOUT.bytes_per_token_layer
FLOATS = TOKEN_BYTES // 8
"""Of K, or of V, of a token in a layer."""


def chunk(layer: int, first: int, count: int) -> KvChunk:
    k = (np.arange(first, first + count)[:, None] * 100 + np.arange(FLOATS)).astype(np.float32) + layer * 0.5
    return KvChunk(layer, first, count, memoryview(np.stack([k, -k])).cast("B"))


@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 40 * TOKEN_BYTES))
def test_a_split_is_the_same_kv_in_small_runs(first: int, count: int, max_bytes: int) -> None:
    whole = chunk(1, first, count)
    parts = list(split_chunk(whole, TOKEN_BYTES, max_bytes))
    assert all(len(part.data) <= max(max_bytes, TOKEN_BYTES) for part in parts)
    at = first
    for part in parts:
        assert (part.layer, part.first_token) == (1, at)
        assert bytes(part.data) == bytes(chunk(1, at, part.num_tokens).data)
        at += part.num_tokens
    assert at == first + count


async def collected(export: KvExport) -> list[KvChunk]:
    return [part async for part in export.chunks()]


async def test_chunks_pass_from_a_thread_in_order_and_end_by_themselves() -> None:
    export = KvExport(LAYOUT, 2, 10, 1 << 20)

    def engine() -> None:
        for start in (2, 6):
            for layer in range(LAYOUT.num_layers):
                export.put(chunk(layer, start, 4))
        export.forward_ended()

    thread = threading.Thread(target=engine)
    reading = asyncio.create_task(collected(export))
    thread.start()
    parts = await asyncio.wait_for(reading, 10)
    thread.join()
    assert [(p.layer, p.first_token, p.num_tokens) for p in parts] == [
        (layer, start, 4) for start in (2, 6) for layer in range(LAYOUT.num_layers)
    ]
    assert export.num_tokens_missing == 0


async def test_it_counts_what_left_before_the_forward_pass_ended() -> None:
    export = KvExport(LAYOUT, 0, 4, 1 << 20)
    parts = export.chunks()
    assert export.num_tokens_missing == 4
    export.put(chunk(0, 0, 4))
    assert export.num_tokens_missing == 3
    await anext(parts)
    export.put(chunk(1, 0, 4))
    await anext(parts)  # asked for once the first was taken
    export.put(chunk(2, 0, 4))
    export.forward_ended()
    assert len([part async for part in parts]) == 1
    assert export.bytes_sent_before_forward_end == 4 * TOKEN_BYTES
    assert export.total_bytes == 3 * 4 * TOKEN_BYTES


async def test_a_failure_reaches_a_waiting_reader_at_once_and_the_first_counts() -> None:
    export = KvExport(LAYOUT, 0, 4, 1 << 20)
    reading = asyncio.create_task(collected(export))
    await asyncio.sleep(0)
    threading.Thread(target=export.fail, args=(RuntimeError("first"),)).start()
    with pytest.raises(RuntimeError, match="first"):
        await asyncio.wait_for(reading, 10)
    export.fail(RuntimeError("second"))
    export.put(chunk(0, 0, 4))
    with pytest.raises(RuntimeError, match="first"):
        await collected(export)


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        ([(0, 0, 4)], "exported 256 of 768 bytes"),
        ([(layer, 0, 8) for layer in range(3)] + [(0, 0, 8)], "more than the 768 bytes"),
    ],
)
async def test_an_engine_that_exports_other_than_asked_fails_its_job(
    exported: list[tuple[int, int, int]], message: str
) -> None:
    export = KvExport(LAYOUT, 0, 4, 1 << 20)
    for layer, first, count in exported:
        export.put(chunk(layer, first, count))
    export.forward_ended()
    with pytest.raises(ExportError, match=message):
        await collected(export)


async def test_a_chunk_of_the_wrong_size_fails_the_job() -> None:
    export = KvExport(LAYOUT, 0, 4, 1 << 20)
    export.put(KvChunk(0, 0, 4, memoryview(bytes(10))))
    with pytest.raises(ExportError, match="10 bytes where 256 belong"):
        await collected(export)
