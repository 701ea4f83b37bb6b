"""Copies pieces of KV, layer by layer, from a rank's pool into the staging memory, and says what is there.

A layer's hook is called when its work is enqueued, not when it is done: a copy waits for an event behind
that work, on a stream of its own. A forward pass waits only, by `fence`, for the pool to be read as far as it
was asked for: on a GPU that takes a gather within its memory, or with an export kernel as long as PCIe takes.
Then blocks may have another owner. None begins for a settled export, and `Released` is told when none
is under way: then its region of the staging memory may have other uses.
"""

import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cluster.kv_layout import KvLayout
from prefill_workers.export_pieces import Piece
from prefill_workers.pool_layout import Places, RankPool, wire_dtype
from prefill_workers.rank_channel import Export, ExportFailed, FromRank, LayerReady, Released

if TYPE_CHECKING:
    from prefill_workers.pool_export import PoolExport


class Stream(Protocol):
    """torch.cuda.Stream, as far as it is used of a forward pass's."""

    def record_event(self) -> Any: ...

    def wait_event(self, event: Any) -> None: ...


class _HostRead:
    """An event of a copy that the host makes."""

    def __init__(self) -> None:
        self._has_happened = threading.Event()

    def happen(self) -> None:
        self._has_happened.set()

    def synchronize(self) -> None:
        self._has_happened.wait()


Finish = Callable[[], None]
"""Waits until a layer's values are in the staging memory; called from the thread that tells."""


class LayerCopies:
    """`enqueue` and `fence` are called from the engine's thread, `settle` from any."""

    def __init__(
        self,
        pool: RankPool,
        staging: torch.Tensor,
        layout: KvLayout,
        rank: int,
        find_export: Callable[[int], Export | None],
        tell: Callable[[FromRank], None],
        *,
        export_kernel: "PoolExport | None" = None,
    ) -> None:
        """`find_export`: None once it is settled, which `settle` is called behind.

        `export_kernel`: reads the pool in place of PyTorch, on a GPU whose staging memory is pinned.
        """
        self._pool = pool
        self._export_kernel = export_kernel
        self._staging = staging
        self._layout = layout
        self._rank = rank
        self._find_export = find_export
        self._tell = tell
        self._side: Any = None
        if pool.device.type == "cuda":
            self._side = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._last_read: Any = None
        """Event behind what was asked for of the pool since the last fence."""
        self._last_places: tuple[Piece, Places] | None = None
        self._lock = threading.Lock()
        self._num_running: Counter[int] = Counter()
        self._settled: set[int] = set()
        """Exports that are, and have copies under way."""
        self._queue: queue.SimpleQueue[tuple[Piece, int, Finish] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._finish_all, name="layer-copies", daemon=True)
        self._thread.start()

    def enqueue(self, piece: Piece, layer: int, stream: Stream) -> None:
        """One layer of a piece, behind what `stream` has by now."""
        with self._lock:
            export = self._find_export(piece.number)
            if export is None:
                return
            self._num_running[piece.number] += 1
        try:
            finish = self._start(piece, layer, export, stream.record_event())
        except Exception as error:  # noqa: BLE001 - the forward pass serves other requests too
            finish = _raiser(error)
        self._queue.put((piece, layer, finish))

    def fence(self, stream: Stream) -> None:
        """What comes next on `stream` may overwrite whatever was to be copied."""
        if self._last_read is not None:
            stream.wait_event(self._last_read)
            self._last_read = None

    def settle(self, number: int) -> None:
        with self._lock:
            if self._num_running[number]:
                self._settled.add(number)
                return
            del self._num_running[number]
        self._tell(Released(number, self._rank))

    def close(self) -> None:
        """Behind the last export: finishes what is under way, and lets go of the staging memory."""
        self._queue.put(None)
        self._thread.join()
        self._staging = torch.empty(0, dtype=torch.uint8)

    def _start(self, piece: Piece, layer: int, export: Export, computed: Any) -> Finish:
        own = self._pool.own_heads(self._wire(piece, layer, export))
        if self._side is None:
            places = self._places(piece)
            self._last_read = read = _HostRead()

            def copy() -> None:
                try:
                    computed.synchronize()
                    self._pool.read_at(layer, places, own)
                finally:
                    read.happen()

            return copy
        return self._start_on_gpu(piece, layer, own, computed)

    def _start_on_gpu(self, piece: Piece, layer: int, own: torch.Tensor, computed: Any) -> Finish:
        assert self._side is not None
        self._side.wait_event(computed)
        with torch.cuda.stream(self._side):
            if self._export_kernel is not None:
                block_ids = torch.tensor(piece.block_ids)
                ids = block_ids.pin_memory().to(self._pool.device, non_blocking=True)
                # The memory of `ids` has no other use before the kernel is through: that would be behind it.
                handle = self._side.cuda_stream
                self._export_kernel.start(handle, layer, block_ids, ids, piece.first_token, own)
                self._last_read = exported = self._side.record_event()
                return exported.synchronize  # type: ignore[no-any-return]
            on_device = torch.empty(own.shape, dtype=own.dtype, device=self._pool.device)
            self._pool.read_at(layer, self._places(piece), on_device)
            self._last_read = self._side.record_event()
            # A strided destination would be copied in step with the host.
            landing = own if own.is_contiguous() else torch.empty(own.shape, dtype=own.dtype, pin_memory=True)
            landing.copy_(on_device, non_blocking=True)
            done = self._side.record_event()

        def finish() -> None:
            done.synchronize()
            if landing is not own:
                own.copy_(landing)

        return finish

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

    def _wire(self, piece: Piece, layer: int, export: Export) -> torch.Tensor:
        """`[2, tokens, heads, head_dim]` of the staging memory."""
        layout, num_tokens = self._layout, piece.end_token - piece.first_token
        start = export.offset + piece_offset(layout, export.first_token, piece.first_token, num_tokens, layer)
        layer_bytes = self._staging[start : start + num_tokens * layout.bytes_per_token_layer]
        shape = (2, num_tokens, layout.num_kv_heads, layout.head_dim)
        return layer_bytes.view(wire_dtype(layout.dtype)).view(shape)

    def _finish_all(self) -> None:
        while (item := self._queue.get()) is not None:
            piece, layer, finish = item
            with torch.inference_mode():
                try:
                    finish()
                except Exception as error:  # noqa: BLE001 - told to whom it concerns
                    self._tell(ExportFailed(piece.number, self._rank, f"layer {layer}: {error}"))
                else:
                    self._tell(
                        LayerReady(
                            number=piece.number,
                            rank=self._rank,
                            layer=layer,
                            first_token=piece.first_token,
                            end_token=piece.end_token,
                        )
                    )
            self._end_one(piece.number)

    def _end_one(self, number: int) -> None:
        with self._lock:
            self._num_running[number] -= 1
            if self._num_running[number]:
                return
            del self._num_running[number]
            if number not in self._settled:
                return
            self._settled.discard(number)
        self._tell(Released(number, self._rank))


def piece_offset(layout: KvLayout, export_first: int, piece_first: int, num_tokens: int, layer: int) -> int:
    """Bytes from the beginning of an export's region to a layer of a piece."""
    before = (piece_first - export_first) * layout.bytes_per_token
    return before + layer * num_tokens * layout.bytes_per_token_layer


def _raiser(error: Exception) -> Finish:
    def finish() -> None:
        raise error

    return finish
