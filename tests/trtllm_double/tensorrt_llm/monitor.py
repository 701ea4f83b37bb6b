"""Watches what a connector and the executor owe the pool; a violation is kept, logged, and ends the executor.

    a read       finds its blocks as they were when its layer's hook was called
    a hook       that asked for KV is followed by a wait on the stream before the next step
    an idle pool holds no block

`TRTLLM_DOUBLE_LOG` names a file for a line a violation, and a line each time that nothing is left to run: so
tests hear of it where the double runs in another process.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from cluster.block_pool import BlockPool
from tensorrt_llm.stream import Event, Stream

_LOG = "TRTLLM_DOUBLE_LOG"


class MonitorError(AssertionError):
    """What the double's README promises was not kept."""


class Monitor:
    def __init__(self, num_blocks: int, num_ranks: int) -> None:
        self.violations: list[str] = []
        self._log_path = os.environ.get(_LOG)
        self._num_overwrites = [0] * num_blocks
        """Of each block, by the stream's thread."""
        self._must_wait = [False] * num_ranks
        self._behind = threading.local()
        self._has_begun = False

    def begin(self) -> None:
        """Before this nothing is written: a connector that tries what a copy costs waits for no event."""
        self._has_begun = True

    def check(self) -> None:
        """Raises MonitorError."""
        if self.violations:
            raise MonitorError(self.violations[0])

    def overwrites(self, block_ids: Sequence[int]) -> None:
        """On the stream's thread, before it does."""
        for block_id in block_ids:
            self._num_overwrites[block_id] += 1

    def step_begins(self, rank: int) -> None:
        """Behind `start_load_kv`, the last place for a wait."""
        if self._must_wait[rank]:
            self._must_wait[rank] = False
            self._violated(f"rank {rank} asked for KV of a step, and lets the next one begin without a wait")

    def is_idle(self, blocks: BlockPool, num_known: int) -> None:
        """Nothing is waiting or running."""
        if blocks.num_used_blocks or num_known:
            self._violated(
                f"nothing runs, and {blocks.num_used_blocks} blocks are held, of {num_known} requests"
            )
        try:
            blocks.check()
        except AssertionError as error:
            self._violated(str(error))
        self._log({"num_used_blocks": blocks.num_used_blocks})

    def snapshot(self) -> list[int]:
        return list(self._num_overwrites)

    def asked(self, rank: int) -> None:
        self._must_wait[rank] = True

    def waited(self, rank: int) -> None:
        self._must_wait[rank] = False

    def is_behind(self, event: "HookEvent") -> None:
        """What this thread reads next of the rank's pool, it reads for the hook that recorded the event."""
        setattr(self._behind, f"rank_{event.rank}", event)

    @contextlib.contextmanager
    def reading(self, rank: int, block_ids: Sequence[int]) -> Iterator[None]:
        event: HookEvent | None = getattr(self._behind, f"rank_{rank}", None)
        if event is None and self._has_begun:
            self._violated(f"rank {rank} reads blocks {block_ids}, and waited for no event")
        yield
        if event is not None:
            late = [one for one in block_ids if self._num_overwrites[one] != event.num_overwrites[one]]
            if late:
                self._violated(f"rank {rank} reads blocks {late} while, or after, they are overwritten")

    def _violated(self, what: str) -> None:
        self.violations.append(what)
        self._log({"violation": what})

    def _log(self, line: dict[str, object]) -> None:
        if self._log_path is not None:
            with open(self._log_path, "a") as log:
                log.write(json.dumps({"pid": os.getpid(), **line}) + "\n")


class HookEvent(Event):
    """Recorded in a hook, behind a layer's work."""

    def __init__(self, monitor: Monitor, rank: int) -> None:
        super().__init__()
        self._monitor = monitor
        self.rank = rank
        self.num_overwrites: list[int] = []

    def happen(self) -> None:
        self.num_overwrites = self._monitor.snapshot()
        super().happen()

    def synchronize(self) -> None:
        super().synchronize()
        self._monitor.is_behind(self)


class RankStream:
    """The executor's stream, as a rank's connector is given it."""

    def __init__(self, stream: Stream, monitor: Monitor, rank: int) -> None:
        self._stream, self._monitor, self._rank = stream, monitor, rank

    def record_event(self) -> Event:
        self._monitor.asked(self._rank)
        return self._stream.record_event(HookEvent(self._monitor, self._rank))

    def wait_event(self, event: Any) -> None:
        self._monitor.waited(self._rank)
        self._stream.wait_event(event)


class _WatchedPool(torch.Tensor):
    monitor: ClassVar[Monitor]
    rank: ClassVar[int]
    block_stride: ClassVar[int]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            block_ids = cls._gathered(args)
            if block_ids is not None:
                with cls.monitor.reading(cls.rank, block_ids):
                    return func(*args, **kwargs)
            result = func(*args, **kwargs)
            if not isinstance(result, torch.Tensor):
                return result
            if result.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
                raise MonitorError(f"{func}: a read of the pool in a way that the monitor does not know")
            return result.as_subclass(cls)

    @classmethod
    def _gathered(cls, args: tuple[Any, ...]) -> list[int] | None:
        """The blocks, where it is `source[:, blocks, ...]` in whatever order its dimensions are."""
        if len(args) < 2 or not isinstance(args[1], (list, tuple)):
            return None
        if not any(isinstance(index, torch.Tensor) for index in args[1]):
            return None
        index = args[1][args[0].stride().index(cls.block_stride)]
        return sorted(set(index.flatten().tolist()))


def watched(pool: torch.Tensor, monitor: Monitor, rank: int) -> torch.Tensor:
    """The same memory, for who may only read it."""
    names = {"monitor": monitor, "rank": rank, "block_stride": pool.stride(0)}
    return pool.as_subclass(type("WatchedPool", (_WatchedPool,), names))
