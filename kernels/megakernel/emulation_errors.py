"""What an emulated kernel can do wrong: an exception for each status of a run (report.h)."""

from typing import ClassVar

import msgspec


class Fault(msgspec.Struct, frozen=True):
    """Who failed where; None where that makes no sense."""

    block: int | None
    warp: int | None
    lane: int | None
    place: str | None
    """`shared`, or a region's name."""
    offset: int


class EmulationError(RuntimeError):
    """A kernel that does what it must not; the message says who, where and what else is involved."""

    status: ClassVar[int] = -1

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


class RaceError(EmulationError):
    """Two accesses of which neither happens before the other."""

    status = 1


class BoundsError(EmulationError):
    """An access outside shared memory, or outside every region."""

    status = 2


class AlignmentError(EmulationError):
    """An address that is no multiple of what is accessed there."""

    status = 3


class UninitialisedError(EmulationError):
    """A read of bytes that nobody has written."""

    status = 4


class ReadOnlyError(EmulationError):
    """A store to a region that is not writable."""

    status = 5


class ConstantError(EmulationError):
    """`load_constant` of what the launch writes."""

    status = 6


class InFlightError(EmulationError):
    """An access to bytes that an asynchronous copy is still writing."""

    status = 7


class DeadlockError(EmulationError):
    """No thread can go on; the message names all that wait."""

    status = 8


class DivergenceError(EmulationError):
    """Lanes of a warp that meet at different collectives, or of which some have ended."""

    status = 9


class BarrierError(EmulationError):
    """A barrier used as it must not be."""

    status = 10


class TrapError(EmulationError):
    """The kernel ended itself."""

    status = 11


class OperationsError(EmulationError):
    """More operations than allowed."""

    status = 12


class StackError(EmulationError):
    """A thread's stack is full."""

    status = 13


class CallError(EmulationError):
    """No such kernel, or a launch that makes no sense."""

    status = 14


ERRORS = {error.status: error for error in EmulationError.__subclasses__()}
"""By status."""
