"""Jobs for prefill engines, and what they export, gathered and checked."""

from collections.abc import Sequence

import numpy as np

from cluster.ids import RequestId
from cluster.kv_layout import KvLayout
from cluster.transfer import KvChunk
from prefill_workers.engine import PrefillDone, PrefillEngine, PrefillJob


def job(name: str, tokens: Sequence[int], first_token: int = 0, tenant: str = "") -> PrefillJob:
    return PrefillJob(
        request_id=RequestId(name), token_ids=tuple(tokens), first_token=first_token, tenant=tenant
    )


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 160, count).tolist()


class Exported:
    """Gathers a job's chunks and puts them together, checking that each token comes once a layer."""

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self.chunks: list[KvChunk] = []

    def __call__(self, chunk: KvChunk) -> None:
        self.chunks.append(chunk)

    def kv(self, first_token: int, end: int) -> np.ndarray:
        """[layers, 2, tokens, kv_heads * head_dim]"""
        width = self.layout.num_kv_heads * self.layout.head_dim
        dtype = np.dtype(self.layout.dtype)
        kv = np.full((self.layout.num_layers, 2, end, width), np.nan, dtype=dtype)
        for chunk in self.chunks:
            assert chunk.data.nbytes == chunk.num_tokens * self.layout.bytes_per_token_layer
            span = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            assert np.isnan(kv[chunk.layer, :, span]).all(), "a token was exported twice"
            kv[chunk.layer, :, span] = np.frombuffer(chunk.data, dtype).reshape(2, -1, width)
        assert np.isnan(kv[:, :, :first_token]).all()
        assert not np.isnan(kv[:, :, first_token:]).any(), "a token is missing"
        return kv[:, :, first_token:]


def run(prefill: PrefillEngine, one: PrefillJob, is_released: bool = True) -> tuple[Exported, PrefillDone]:
    """One job from admission to its end, beside what is in the engine already."""
    exported, done = Exported(prefill.layout), list[PrefillDone]()
    prefill.admit(one, exported)
    while prefill.has_work():
        done += prefill.step()
    if is_released:
        prefill.release(one.request_id)
    assert [d.request_id for d in done] == [one.request_id]
    return exported, done[0]
