"""Headrace's KV connector in TensorRT-LLM: exports what a prompt's forward pass computes. Loads nothing.

TensorRT-LLM imports this module in the processes of its ranks, by `KvCacheConnectorConfig`. Rank 0 has the
scheduler, which says each step what KV it brings; every rank has a worker, which copies its heads of that.
With whom they talk, and where copies go, is in an environment variable (`rank_channel.py`).

A request is known by its sampling seed: the prefill worker's own number for its export, which exists before
the request does. One token is sampled, and thrown away, so a seed has no other use.
"""

from typing import TYPE_CHECKING, Any

import torch

from cluster.kv_layout import KvLayout
from prefill_workers.export_pieces import ExportPieces, Piece
from prefill_workers.layer_copies import LayerCopies
from prefill_workers.pool_layout import RankPool, RankShard, rank_shard
from prefill_workers.rank_channel import ExportSettings, Hello, RankClient, Started
from prefill_workers.staging import open_staging

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
from tensorrt_llm._utils import mpi_rank, mpi_world_size

if TYPE_CHECKING:
    from tensorrt_llm._torch.pyexecutor.llm_request import LlmRequest

_LAYERWISE_TOKENS = 256
"""A shorter piece is copied behind its forward pass: less to launch between layers."""


class ExportScheduler(KvCacheConnectorScheduler):  # type: ignore[misc]
    """On rank 0: which blocks hold what of which request."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        hello = Hello(rank=mpi_rank(), role="scheduler")
        self._client = RankClient(ExportSettings.from_environment(), hello)
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
        return self._pieces.end(request.request_id)


class ExportWorker(KvCacheConnectorWorker):  # type: ignore[misc]
    """On every rank: its heads of the pieces that rank 0 named."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._settings = ExportSettings.from_environment()
        self._rank = mpi_rank()
        self._shard: RankShard = rank_shard(self._rank, mpi_world_size(), self._settings.num_kv_heads)
        self._copies: LayerCopies | None = None
        self._numbers: dict[int, int] = {}
        """Of requests that pieces were seen of."""
        self._saving: set[int] = set()
        """Requests that have ended, and whose blocks the engine keeps for us."""

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        settings = self._settings
        pool = RankPool(
            kv_cache_tensor,
            heads=self._shard.heads,
            head_dim=settings.head_dim,
            tokens_per_block=settings.tokens_per_block,
        )
        staging = open_staging(settings.staging_path)
        if kv_cache_tensor.is_cuda:
            _pin(staging)
        hello = Hello(rank=self._rank, role="worker", is_exporting=self._shard.is_exported)
        self._client = RankClient(settings, hello, on_settled=self._settle)
        self._copies = LayerCopies(
            pool, staging, _layout_of(settings), self._rank, self._client.export, self._client.tell
        )

    def start_load_kv(self, stream: torch.cuda.Stream) -> None:  # noqa: ARG002
        for piece in self._pieces:
            self._numbers[piece.request_id] = piece.number

    def wait_for_layer_load(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        for piece in self._pieces:
            if _is_layerwise(piece):
                self._export(piece, layer_idx, stream)

    def wait_for_save(self, stream: torch.cuda.Stream) -> None:
        """Copies go on behind it: their blocks are kept until `get_finished` says otherwise."""
        for piece in self._pieces:
            if not _is_layerwise(piece):
                for layer in range(self._settings.num_layers):
                    self._export(piece, layer, stream)

    def get_finished(
        self,
        finished_gen_req_ids: list[int],
        started_loading_req_ids: list[int],  # noqa: ARG002
    ) -> tuple[list[int], list[int]]:
        self._saving.update(finished_gen_req_ids)
        done = [request_id for request_id in self._saving if self._is_released(request_id)]
        self._saving.difference_update(done)
        for request_id in done:
            self._numbers.pop(request_id, None)
        return done, []

    @property
    def _pieces(self) -> list[Piece]:
        return self.get_connector_meta() or []

    def _export(self, piece: Piece, layer: int, stream: torch.cuda.Stream) -> None:
        assert self._copies is not None, "the pool is registered before the first step"
        if self._shard.is_exported:
            self._copies.enqueue(piece, layer, stream)

    def _settle(self, number: int) -> None:
        if self._copies is not None:
            self._copies.settle(number)

    def _is_released(self, request_id: int) -> bool:
        number = self._numbers.get(request_id)
        if number is None or self._copies is None:
            return True
        return self._client.export(number) is None and not self._copies.is_running(number)


def _export_number(request: "LlmRequest") -> int | None:
    seeds = request.sampling_config.random_seed
    return int(seeds[0]) if seeds else None


def _is_layerwise(piece: Piece) -> bool:
    return piece.end_token - piece.first_token >= _LAYERWISE_TOKENS


def _layout_of(settings: ExportSettings) -> KvLayout:
    return KvLayout(
        model_fingerprint="",
        num_layers=settings.num_layers,
        num_kv_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        dtype=settings.wire_dtype,
        block_size_tokens=settings.tokens_per_block,
    )


def _pin(staging: torch.Tensor) -> None:
    """For copies from the GPU that the host does not wait for."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = cudart.cudaHostRegister(staging.data_ptr(), staging.numel(), 0)
    if int(code) != 0:
        raise RuntimeError(
            f"cudaHostRegister of {staging.numel()} bytes of staging memory failed with {code}: raise "
            "`ulimit -l`, or lower prefill.staging_mb"
        )
