"""Finds the first op at which another executor of a program departs from the VM."""

from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from megakernel.model.weights import Weights
from megakernel.program import Program
from megakernel.vm import Vm
from megakernel.vm_state import Float32Array, OpWeights, VmKv, VmStep

RunUntil = Callable[[str], Mapping[str, Float32Array]]
"""Runs the step up to and with the op of that name, from the same KV; buffers by name, [rows, columns]."""


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    op: str
    buffer: str
    row: int
    column: int
    """Of the element that differs most."""
    expected: float
    actual: float
    num_different: int
    """Elements of the buffer outside the tolerance."""


def run_bisect(
    program: Program,
    weights: Weights | OpWeights,
    kv: VmKv,
    step: VmStep,
    run_until: RunUntil,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    layers: int | None = None,
) -> Mismatch | None:
    """The first op any of whose outputs differs, found by halving; None where the last op's agree.

    `layers` leaves out what follows that many layers.
    """
    vm = Vm(program, weights, kv)
    ops = [op for op in program.ops if layers is None or op.layer < layers]
    if layers is not None and layers < program.geometry.num_layers:
        ops = [op for op in ops if op.name != "head"]

    def mismatch(number: int) -> Mismatch | None:
        name = ops[number].name
        expected = vm.run(step, stop_after_op=name).buffers
        actual = run_until(name)
        written = [index for index in (ops[number].output, ops[number].kv, ops[number].stats) if index >= 0]
        for buffer in (program.buffers[index].name for index in written):
            found = _difference(name, buffer, expected[buffer], actual[buffer], rtol, atol)
            if found:
                return found
        return None

    first_bad = mismatch(len(ops) - 1)
    if first_bad is None:
        return None
    good, bad = -1, len(ops) - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        found = mismatch(middle)
        if found is None:
            good = middle
        else:
            bad, first_bad = middle, found
    return first_bad


def _difference(
    op: str, buffer: str, expected: Float32Array, actual: Float32Array, rtol: float, atol: float
) -> Mismatch | None:
    is_different = ~np.isclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    if not is_different.any():
        return None
    distance = np.where(is_different, np.nan_to_num(np.abs(actual - expected), nan=np.inf), -1.0)
    row, column = np.unravel_index(int(distance.argmax()), distance.shape)
    return Mismatch(
        op=op,
        buffer=buffer,
        row=int(row),
        column=int(column),
        expected=float(expected[row, column]),
        actual=float(actual[row, column]),
        num_different=int(is_different.sum()),
    )
