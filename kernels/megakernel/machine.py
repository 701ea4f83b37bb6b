"""A machine as data: what the compiler must know of the hardware, and nothing of how it is programmed."""

from typing import Literal

import msgspec


class MachineError(ValueError):
    """An unknown machine or a description that makes no sense; the message names what is known."""


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU (a worker is an SM) or one CPU (a worker is a core, its share of L2 the scratch)."""

    name: str
    kind: Literal["cuda", "cpu"]
    num_workers: int
    scratch_bytes: int
    """A worker's scratch memory: shared memory of a block, or the share of L2."""
    page_bytes: int
    bandwidth_gb_s: float
    """Read bandwidth of all workers together."""
    worker_bandwidth_gb_s: float
    """What one worker alone can read."""
    load_latency_us: float
    sync_us: float
    """From the last arrival at a counter to a waiter's next instruction."""
    macs_per_us: dict[str, float]
    """Multiply-accumulates a microsecond a worker, by weight format (`Q4_1`, `Q8_0`, `BF16`, ...)."""
    instruction_us: float
    """Fixed cost of an instruction."""
    vector_units: tuple[str, ...] = ()
    """CPU: of `avx2`, `avx512`, `avx512_vnni`. CUDA: the compute capability, as `sm_89`."""

    @property
    def num_pages(self) -> int:
        return self.scratch_bytes // self.page_bytes
