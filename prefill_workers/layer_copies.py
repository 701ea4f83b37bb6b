"""Copies pieces of KV, some layers at a time, from a rank's pool to staging memory, and says what is there.

A layer's hook is called when its work is enqueued, not when it is done: a copy waits for an event behind
that work, on a stream of its own (`PieceCopier`). A forward pass waits only, by `fence`, for the pool to be
read as far as it was asked for: on a GPU that takes a gather within its memory, or with an export kernel as
long as PCIe takes. Then blocks may have another owner. None begins for a settled export, and `Released` is
told when none is under way: then its region of the staging memory may have other uses.
"""

import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch

from prefill_workers.copy_costs import Finish
from prefill_workers.export_pieces import Piece
from prefill_workers.piece_copier import PieceCopier
from prefill_workers.rank_channel import Export, ExportFailed, FromRank, LayersReady, Released


class Stream(Protocol):
    """torch.cuda.Stream, as far as it is used of a forward pass's."""

    def record_event(self) -> Any: ...

    def wait_event(self, event: Any) -> None: ...


class LayerCopies:
    """`enqueue` and `fence` are called from the engine's thread, `settle` from any."""

    def __init__(
        self,
        copier: PieceCopier,
        rank: int,
        find_export: Callable[[int], Export | None],
        tell: Callable[[FromRank], None],
    ) -> None:
        """`find_export`: None once it is settled, which `settle` is called behind."""
        self._copier = copier
        self._rank = rank
        self._find_export = find_export
        self._tell = tell
        self._last_read: Any = None
        """Event behind what was asked for of the pool since the last fence."""
        self._lock = threading.Lock()
        self._num_running: Counter[int] = Counter()
        self._settled: set[int] = set()
        """Exports that are, and have copies under way."""
        self._queue: queue.SimpleQueue[tuple[Piece, range, Finish] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._finish_all, name="layer-copies", daemon=True)
        self._thread.start()

    def enqueue(self, piece: Piece, layers: range, stream: Stream) -> None:
        """Some layers of a piece, behind what `stream` has by now."""
        for part in self._copier.parts(piece.end_token - piece.first_token, layers):
            self._enqueue(piece, part, stream)

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
        self._copier.close()

    def _enqueue(self, piece: Piece, layers: range, stream: Stream) -> None:
        with self._lock:
            export = self._find_export(piece.number)
            if export is None:
                return
            self._num_running[piece.number] += 1
        try:
            copy = self._copier.start(piece, layers, export, stream.record_event())
        except Exception as error:  # noqa: BLE001 - the forward pass serves other requests too
            finish = _raiser(error)
        else:
            self._last_read, finish = copy.read, copy.finish
        self._queue.put((piece, layers, finish))

    def _finish_all(self) -> None:
        while (item := self._queue.get()) is not None:
            piece, layers, finish = item
            with torch.inference_mode():
                try:
                    finish()
                except Exception as error:  # noqa: BLE001 - told to whom it concerns
                    self._tell(ExportFailed(piece.number, self._rank, f"{_named(layers)}: {error}"))
                else:
                    self._tell(
                        LayersReady(
                            number=piece.number,
                            rank=self._rank,
                            first_layer=layers.start,
                            end_layer=layers.stop,
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


def _raiser(error: Exception) -> Finish:
    def finish() -> None:
        raise error

    return finish


def _named(layers: range) -> str:
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start} to {layers.stop - 1}"
