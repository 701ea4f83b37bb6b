"""Starts the copy of some layers of a piece from a rank's pool into its place in the staging memory.

On a GPU that is a gather, on a stream of its own behind what computes the values, and a transfer behind that;
on a CPU both are one copy, made when it is waited for. Layers of a piece lie one behind the other, so one
gather and one transfer take any run of them. A rank with some of the heads has a part of each token: its
transfer lands in pinned memory of its own, and the host puts the heads in their places.
"""

import functools
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from cluster.kv_layout import KvLayout
from prefill_workers.copy_costs import CopyCosts, Finish, measure_copies
from prefill_workers.export_pieces import Piece
from prefill_workers.pool_layout import Places, RankPool, wire_dtype
from prefill_workers.rank_channel import Export

if TYPE_CHECKING:
    from prefill_workers.pool_export import PoolExport

_MOST_GATHERED_BYTES = 32 << 20
"""GPU memory that one copy takes: what an engine leaves free is little."""


class HostEvent:
    """torch.cuda.Event, as far as it is used, of what the host does."""

    def __init__(self) -> None:
        self._has_happened = threading.Event()

    def happen(self) -> None:
        self._has_happened.set()

    def synchronize(self) -> None:
        self._has_happened.wait()


class Copy(msgspec.Struct, frozen=True):
    """One that is under way."""

    read: Any
    """Event: the pool is read."""
    finish: Finish


class PieceCopier:
    """For one thread."""

    def __init__(
        self,
        pool: RankPool,
        staging: torch.Tensor,
        layout: KvLayout,
        *,
        export_kernel: "PoolExport | None" = None,
    ) -> None:
        """`export_kernel`: reads the pool in place of PyTorch, on a GPU whose staging memory is pinned."""
        self._pool = pool
        self._staging = staging
        self._layout = layout
        self._export_kernel = export_kernel
        self._side: Any = None
        if pool.device.type == "cuda":
            self._side = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._last_places: tuple[Piece, Places] | None = None

    def start(self, piece: Piece, layers: range, export: Export, computed: Any) -> Copy:
        """`computed`: event behind which the values are there."""
        own = self._pool.own_heads(self._wire(piece, layers, export))
        if self._side is None:
            return self._start_on_host(piece, layers, own, computed)
        return self._start_on_gpu(piece, layers, own, computed)

    def parts(self, num_tokens: int, layers: range) -> list[range]:
        """All of `layers`, in as many copies as memory on a GPU asks for: mostly one."""
        layout = self._layout
        layer_bytes = (
            num_tokens * layout.bytes_per_token_layer * self._pool.heads.count // layout.num_kv_heads
        )
        count = max(1, _MOST_GATHERED_BYTES // max(1, layer_bytes))
        return [layers[at : at + count] for at in range(0, len(layers), count)]

    def measure(self) -> CopyCosts:
        """Reads the pool, and writes to the staging memory: for a time when no export has a region."""

        @functools.cache
        def piece_of(num_tokens: int) -> Piece:
            count = -(-num_tokens // self._pool.tokens_per_block)
            blocks = tuple(block % self._pool.num_blocks for block in range(count))
            return Piece(number=0, request_id=0, first_token=0, end_token=num_tokens, block_ids=blocks)

        def start(num_tokens: int) -> Finish:
            export = Export(number=0, first_token=0, end_token=num_tokens, offset=0, lease_s=0.0)
            return self.start(piece_of(num_tokens), range(1), export, self._now()).finish

        with torch.inference_mode():
            return measure_copies(start, self._staging.numel() // self._layout.bytes_per_token_layer)

    def close(self) -> None:
        """Lets go of the staging memory."""
        self._staging = torch.empty(0, dtype=torch.uint8)

    def _now(self) -> Any:
        if self._side is not None:
            return torch.cuda.current_stream(self._pool.device).record_event()
        event = HostEvent()
        event.happen()
        return event

    def _start_on_host(self, piece: Piece, layers: range, own: torch.Tensor, computed: Any) -> Copy:
        places = self._places(piece)
        read = HostEvent()

        def finish() -> None:
            try:
                computed.synchronize()
                self._pool.read_at(layers, places, own)
            finally:
                read.happen()

        return Copy(read, finish)

    def _start_on_gpu(self, piece: Piece, layers: range, own: torch.Tensor, computed: Any) -> Copy:
        self._side.wait_event(computed)
        with torch.cuda.stream(self._side):
            if self._export_kernel is not None:
                return self._start_kernel(self._export_kernel, piece, layers, own)
            on_device = torch.empty(own.shape, dtype=own.dtype, device=self._pool.device)
            self._pool.read_at(layers, self._places(piece), on_device)
            read = self._side.record_event()
            # A strided destination would be copied in step with the host.
            landing = own if own.is_contiguous() else torch.empty(own.shape, dtype=own.dtype, pin_memory=True)
            landing.copy_(on_device, non_blocking=True)
            done = self._side.record_event()

        def finish() -> None:
            done.synchronize()
            if landing is not own:
                own.copy_(landing)

        return Copy(read, finish)

    def _start_kernel(self, kernel: "PoolExport", piece: Piece, layers: range, own: torch.Tensor) -> Copy:
        block_ids = torch.tensor(piece.block_ids)
        ids = block_ids.pin_memory().to(self._pool.device, non_blocking=True)
        for layer, own_layer in zip(layers, own, strict=True):
            # The memory of `ids` has no other use before the kernel is through: that would be behind it.
            kernel.start(self._side.cuda_stream, layer, block_ids, ids, piece.first_token, own_layer)
        exported = self._side.record_event()
        return Copy(exported, exported.synchronize)

    def _places(self, piece: Piece) -> Places:
        """Once a piece: on a GPU, on the stream that copies."""
        if self._last_places is None or self._last_places[0] is not piece:
            block_ids = torch.tensor(piece.block_ids)
            num_tokens = piece.end_token - piece.first_token
            places = self._pool.places(block_ids, piece.first_token, num_tokens)
            if self._side is not None:
                block, offset = (
                    part.pin_memory().to(self._pool.device, non_blocking=True) for part in places
                )
                places = block, offset
            self._last_places = piece, places
        return self._last_places[1]

    def _wire(self, piece: Piece, layers: range, export: Export) -> torch.Tensor:
        """`[layers, 2, tokens, heads, head_dim]` of the staging memory."""
        layout, num_tokens = self._layout, piece.end_token - piece.first_token
        start = export.offset + piece_offset(
            layout, export.first_token, piece.first_token, num_tokens, layers.start
        )
        num_bytes = len(layers) * num_tokens * layout.bytes_per_token_layer
        shape = (len(layers), 2, num_tokens, layout.num_kv_heads, layout.head_dim)
        return self._staging[start : start + num_bytes].view(wire_dtype(layout.dtype)).view(shape)


def piece_offset(layout: KvLayout, export_first: int, piece_first: int, num_tokens: int, layer: int) -> int:
    """Bytes from the beginning of an export's region to a layer of a piece."""
    before = (piece_first - export_first) * layout.bytes_per_token
    return before + layer * num_tokens * layout.bytes_per_token_layer
