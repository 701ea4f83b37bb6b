"""A machine as data: what the compiler must know of the hardware, and nothing of how it is programmed.

The packaged descriptions are `machines/NAME.json`; docs/machines.md says where each figure comes from.
"""

from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

PROBED = "cpu"
"""The name that stands for the CPU in hand."""


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
    attention_macs_per_us: float | None = None
    """The same of attention; None: as with weights in F16."""
    prepared_per_us: float | None = None
    """Input values a microsecond a worker that a prologue norms and rounds; None: as they are read."""
    instruction_us: float
    """Fixed cost of an instruction."""
    vector_units: tuple[str, ...] = ()
    """CPU: of `avx2`, `avx512`, `avx512_vnni`. CUDA: the compute capability, as `sm_89`."""
    row_group: int = 1
    """Rows are computed in groups of this many: one row costs what a whole group costs."""
    reserved_bytes: int = 0
    """Of the scratch memory, what kernels keep: barriers and reductions. The rest is pages."""
    computes_while_loading: bool = False
    """Whether an instruction works on its weights as they arrive, or only when its tile has landed."""

    def __post_init__(self) -> None:
        wrong = [name for name in _POSITIVE if getattr(self, name) <= 0]
        wrong += [name for name in _NOT_NEGATIVE if getattr(self, name) < 0]
        stated = {name: getattr(self, name) for name in _POSITIVE_IF_STATED}
        wrong += [name for name, value in stated.items() if value is not None and value <= 0]
        wrong += [f"macs_per_us[{name}]" for name, value in self.macs_per_us.items() if value <= 0]
        if wrong:
            raise MachineError(f"machine {self.name!r}: not a possible figure: {', '.join(wrong)}")
        if self.page_bytes > self.usable_bytes:
            raise MachineError(
                f"machine {self.name!r}: a page of {self.page_bytes} bytes exceeds the scratch memory of "
                f"{self.scratch_bytes} less {self.reserved_bytes} reserved"
            )
        if not self.macs_per_us:
            raise MachineError(f"machine {self.name!r}: macs_per_us names no weight format")

    @property
    def usable_bytes(self) -> int:
        """Of the scratch memory, what tiles may have."""
        return self.scratch_bytes - self.reserved_bytes

    @property
    def num_pages(self) -> int:
        return self.usable_bytes // self.page_bytes


_POSITIVE = (
    "num_workers",
    "scratch_bytes",
    "page_bytes",
    "bandwidth_gb_s",
    "worker_bandwidth_gb_s",
    "row_group",
)
_POSITIVE_IF_STATED = ("attention_macs_per_us", "prepared_per_us")
_NOT_NEGATIVE = ("load_latency_us", "sync_us", "instruction_us", "reserved_bytes")


def machine_names() -> tuple[str, ...]:
    """What `load_machine` knows by name."""
    folder = resources.files("megakernel") / "machines"
    packaged = (
        entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")
    )
    return (PROBED, *sorted(packaged))


def load_machine(name: str) -> Machine:
    """A packaged machine, `cpu` for the one in hand (probed once, then cached), or a path to a JSON file.

    Raises MachineError.
    """
    if name == PROBED:
        from megakernel.probe import probe_cpu  # it builds Machine records, so it imports this file

        return probe_cpu()
    if name in machine_names():
        text = (resources.files("megakernel") / "machines" / f"{name}.json").read_bytes()
        return _decode(text, name)
    path = Path(name)
    if path.suffix == ".json":
        try:
            return _decode(path.read_bytes(), name)
        except OSError as error:
            raise MachineError(f"cannot read the machine file {name!r}: {error.strerror}") from error
    known = ", ".join(machine_names())
    raise MachineError(f"unknown machine {name!r}; known are {known}, or a path that ends in .json")


def _decode(text: bytes, name: str) -> Machine:
    try:
        return msgspec.json.decode(text, type=Machine)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MachineError(f"machine file {name!r}: {error}") from error
