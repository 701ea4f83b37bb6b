"""Headrace's KV connector in TensorRT-LLM: exports what a prompt's forward pass computes. Loads nothing.

TensorRT-LLM imports this module in the processes of its ranks, by `KvCacheConnectorConfig`. Rank 0 has the
scheduler, which says each step what KV it brings; every rank has a worker, which copies its heads of that.
With whom they talk, and where copies go, is in the engine's arguments (`rank_channel.py`).

A request is known by its sampling seed: the prefill worker's own number for its export, which exists before
the request does. One token is sampled, greedily, and thrown away, so a seed has no other use.

TensorRT-LLM is never asked to keep the blocks of a request that has ended: versions differ in whether they
pin the right ones, let go of them, and ask at all where it was cancelled. A step waits instead until what
earlier steps computed is read (`LayerCopies.fence`).
"""

from typing import TYPE_CHECKING, Any

import torch

from cluster.kv_layout import KvLayout
from prefill_workers.export_pieces import ExportPieces, Piece
from prefill_workers.layer_copies import LayerCopies
from prefill_workers.piece_copier import PieceCopier
from prefill_workers.pool_layout import PoolLayoutError, RankPool, RankShard, rank_shard
from prefill_workers.rank_channel import ExportSettings, Hello, RankClient, Started
from prefill_workers.staging import open_staging, pin_staging, unpin_staging

try:
    from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
except ImportError:  # before it moved
    from tensorrt_llm._torch.pyexecutor.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
from tensorrt_llm._utils import mpi_rank

if TYPE_CHECKING:
    from tensorrt_llm.bindings.internal.batch_manager import LlmRequest


class ExportScheduler(KvCacheConnectorScheduler):  # type: ignore[misc]
    """On rank 0: which blocks hold what of which request."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        hello = Hello(rank=mpi_rank(), role="scheduler")
        self._client = RankClient(ExportSettings.from_variables(llm_args.env_overrides), hello)
        self._pieces = ExportPieces(self._client.export)

    def get_num_new_matched_tokens(self, request: "LlmRequest", num_computed_tokens: int) -> tuple[int, bool]:
        """Nothing is loaded: what a prefill worker has not computed, it computes."""
        number = _export_number(request)
        if number is not None:
            self._pieces.begin(request.request_id, number)
            self._client.tell(Started(number, num_computed_tokens))
        return 0, False

    def update_state_after_alloc(self, request: "LlmRequest", block_ids: list[int]) -> None:
        """`build_connector_meta` is told of the same blocks."""

    def build_connector_meta(self, scheduler_output: Any) -> list[Piece]:
        return self._pieces.step([*scheduler_output.new_requests, *scheduler_output.cached_requests])

    def request_finished(self, request: "LlmRequest", cache_block_ids: list[int]) -> bool:  # noqa: ARG002
        """Its blocks may go."""
        self._pieces.end(request.request_id)
        return False


class ExportWorker(KvCacheConnectorWorker):  # type: ignore[misc]
    """On every rank: its heads of the pieces that rank 0 named."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._settings = ExportSettings.from_variables(llm_args.env_overrides)
        self._rank = mpi_rank()
        self._shard: RankShard = rank_shard(self._rank, self._settings.num_ranks, self._settings.num_kv_heads)
        self._copies: LayerCopies | None = None
        self._layerwise_tokens: int | None = None
        """A shorter piece is copied whole, behind its forward pass: `CopyCosts`. None: every one is."""
        self._pinned: torch.Tensor | None = None
        """The staging memory, until the prefill worker is gone."""

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """Raises PoolLayoutError, ChannelError, or OSError."""
        settings = self._settings
        pool = RankPool(
            kv_cache_tensor,
            heads=self._shard.heads,
            head_dim=settings.head_dim,
            tokens_per_block=settings.tokens_per_block,
        )
        if pool.num_layers != settings.num_layers:
            raise PoolLayoutError(
                f"the KV pool has {pool.num_layers} layers, the model {settings.num_layers}"
            )
        staging = open_staging(settings.staging_path)
        if kv_cache_tensor.is_cuda:
            pin_staging(staging)
            self._pinned = staging
        copier = PieceCopier(pool, staging, _layout_of(settings))
        costs = None
        if self._shard.is_exported:
            # No export has a region before every rank has said hello.
            costs = copier.measure()
            self._layerwise_tokens = costs.layerwise_tokens(settings.num_layers)
        hello = Hello(
            rank=self._rank,
            role="worker",
            is_exporting=self._shard.is_exported,
            num_blocks=kv_cache_tensor.shape[0],
            copy_costs=costs,
        )
        self._client = RankClient(settings, hello, on_settled=self._settle, on_lost=self._end)
        self._copies = LayerCopies(copier, self._rank, self._client.export, self._client.tell)

    def start_load_kv(self, stream: torch.cuda.Stream) -> None:
        """Nothing is loaded. Blocks that earlier steps filled may have other owners in this one."""
        if self._copies is not None:
            self._copies.fence(stream)

    def wait_for_layer_load(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        for piece in self._pieces:
            if self._is_layerwise(piece):
                self._export(piece, range(layer_idx, layer_idx + 1), stream)

    def wait_for_save(self, stream: torch.cuda.Stream) -> None:
        """Copies go on behind it."""
        for piece in self._pieces:
            if not self._is_layerwise(piece):
                self._export(piece, range(self._settings.num_layers), stream)

    def get_finished(
        self,
        finished_gen_req_ids: list[int],  # noqa: ARG002
        started_loading_req_ids: list[int],  # noqa: ARG002
    ) -> tuple[list[int], list[int]]:
        """Nothing that TensorRT-LLM waits for."""
        return [], []

    @property
    def _pieces(self) -> list[Piece]:
        return self.get_connector_meta() or []

    def _is_layerwise(self, piece: Piece) -> bool:
        if self._layerwise_tokens is None:
            return False
        return piece.end_token - piece.first_token >= self._layerwise_tokens

    def _export(self, piece: Piece, layers: range, stream: torch.cuda.Stream) -> None:
        assert self._copies is not None, "the pool is registered before the first step"
        if self._shard.is_exported:
            self._copies.enqueue(piece, layers, stream)

    def _end(self) -> None:
        """Nothing is exported any more; the engine may go on."""
        if self._copies is not None:
            self._copies.close()
        if self._pinned is not None:
            unpin_staging(self._pinned)
            self._pinned = None

    def _settle(self, number: int) -> None:
        if self._copies is not None:
            self._copies.settle(number)


def _export_number(request: "LlmRequest") -> int | None:
    seeds = request.sampling_config.random_seed
    return int(seeds[0]) if seeds else None


def _layout_of(settings: ExportSettings) -> KvLayout:
    return KvLayout(
        model_fingerprint="",
        num_layers=settings.num_layers,
        num_kv_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        dtype=settings.wire_dtype,
        block_size_tokens=settings.tokens_per_block,
    )
