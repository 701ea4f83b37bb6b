"""An emulated step held to the VM op by op: each starts from what the kernels themselves had written before.

Buffers are written by one op after another. The run's journal has every store in order, and races apart an
element's stores are in the order of the ops that make them: the n-th value that an element got is the n-th
op's that writes its buffer.
"""

from collections.abc import Iterator

import msgspec
import numpy as np

from megakernel.cuda_activations import SQUARES, WEIGHTED, rounded_values
from megakernel.cuda_arguments import RowFlag
from megakernel.cuda_constants import SQUARED_COLUMNS
from megakernel.head import reduce_rows
from megakernel.program import Epilogue, Instruction, Op, Opcode, Program, Prologue, Space
from megakernel.vm_ops import execute, multiplied_as
from megakernel.vm_state import Float32Array, OpWeights, VmKv, VmState, VmStep
from tests.megakernel import op_tolerances
from tests.megakernel.emulated_model import EmulatedStep
from tests.megakernel.native_steps import vm_step


class Stored(msgspec.Struct, frozen=True, eq=False):
    """The stores of a region, all of one size."""

    element: np.ndarray
    """[stores] by which element of the region."""
    nth: np.ndarray
    """[stores] how many the element had had before."""
    values: np.ndarray


def stored(step: EmulatedStep, array: np.ndarray) -> Stored:
    """`array`: the region's. Stores of two elements at once are two stores."""
    start, item = array.ctypes.data, array.itemsize
    journal = step.journal
    journal = journal[(journal["address"] >= start) & (journal["address"] < start + array.nbytes)]
    count = journal["num_bytes"].astype(np.int64) // item
    assert (journal["num_bytes"] == count * item).all()
    assert np.isin(count, (1, 2)).all()
    place = np.repeat(np.arange(len(journal)), count)
    second = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)
    element = ((journal["address"][place] - start) // item).astype(np.int64) + second
    order = np.argsort(element, kind="stable")
    ordered = element[order]
    first = np.searchsorted(ordered, ordered)
    nth = np.empty(len(element), np.int64)
    nth[order] = np.arange(len(element)) - first
    values = np.ascontiguousarray(journal["value"][:, : 2 * item]).view(array.dtype)
    return Stored(element, nth, values[place, second])


class OpByOp:
    """The VM's state and the kernels' buffers, op by op."""

    def __init__(
        self, program: Program, weights: OpWeights, kv: VmKv, found: EmulatedStep, step: VmStep
    ) -> None:
        """`kv` as it was before the step; `step` restricts no row."""
        # K and V as the VM computes them, before they are rounded to float16.
        exact = VmKv(len(kv.layers), kv.num_slots, kv.layers[0].shape[1], block_size=kv.block_size)
        for layer, values in zip(exact.layers, kv.layers, strict=True):
            layer[...] = values
        self.before = kv
        self.program = program
        self.found = found
        self.rows = step.num_rows
        self.state = VmState(program, weights, exact, step)
        activations, offsets = found.regions["activations"], found.offsets
        weighted, squares = offsets[WEIGHTED] // 4, offsets[SQUARES] // 4
        self.activations = stored(found, activations[:weighted])
        self.weighted = stored(found, activations[weighted:squares].view(np.uint16))
        self.squares = stored(found, activations[squares:])
        self.num_copied = 0
        """Ops whose output was stored a second time."""
        self.written = dict.fromkeys(range(len(program.buffers)), 0)
        """By buffer: ops that have."""

    def check(self) -> dict[str, float]:
        """The largest error by op's role and opcode, as a part of what it may be. Raises AssertionError."""
        worst: dict[str, float] = {}
        with np.errstate(all="ignore"):
            for op, opcode, instructions in self.phases():
                name = f"{op.name.rpartition('.')[2]} {opcode.name}"
                worst[name] = max(worst.get(name, 0.0), self.check_phase(op, opcode, instructions))
        self.check_no_more()
        self.check_head()
        self.check_results()
        return worst

    def phases(self) -> Iterator[tuple[Op, Opcode, list[Instruction]]]:
        every = [instruction for worker in self.program.workers for instruction in worker]
        for op in self.program.ops:
            own = [
                instruction
                for instruction in every
                if instruction.op == op.index and instruction.opcode is not Opcode.LINEAR_ACCUMULATE
            ]
            for opcode in Opcode:
                if instructions := [instruction for instruction in own if instruction.opcode is opcode]:
                    yield op, opcode, instructions

    def check_phase(self, op: Op, opcode: Opcode, instructions: list[Instruction]) -> float:
        tolerances = self.tolerances(op, opcode)
        output = self.program.partial_buffers[op.index] if opcode is Opcode.LINEAR_PARTIAL else op.output
        is_residual = op.epilogue is Epilogue.RESIDUAL and opcode is not Opcode.LINEAR_PARTIAL
        if not is_residual:
            self.state.buffers[output][...] = np.nan
        for instruction in instructions:
            execute(self.state, instruction)
        expected = self.state.buffers[output]
        if opcode in (Opcode.EMBED, Opcode.ATTENTION, Opcode.LINEAR_PARTIAL):
            return self.compare(op, output, expected, tolerances)
        match op.epilogue:
            case Epilogue.SWIGLU:
                format = self.found.activations.formats[op.index]
                rounded = op_tolerances.rounded(expected, tolerances, format)
                return self.compare(op, output, expected, rounded, format)
            case Epilogue.RESIDUAL:
                return self.compare(op, output, expected, op_tolerances.residual(expected, tolerances))
            case Epilogue.ROPE_APPEND:
                columns = self.program.buffers[output].columns
                worst = self.compare(op, output, expected, tolerances[:, :columns])
                return max(worst, self.compare_kv(op, tolerances[:, columns:]))
            case Epilogue.LOGITS:
                needed = self.needed_columns(opcode, instructions)
                logits = np.where(needed, expected, np.float32(np.nan))
                return close(self.found.buffers["logits"], logits, tolerances, op.name)
            case _:
                return self.compare(op, output, expected, tolerances)

    def tolerances(self, op: Op, opcode: Opcode) -> np.ndarray:
        """Of what the VM is about to compute from what it has now."""
        state, program = self.state, self.program
        match opcode:
            case Opcode.EMBED:
                return np.zeros((self.rows, program.buffers[op.output].columns))
            case Opcode.ATTENTION:
                return op_tolerances.attended(state, op)
            case Opcode.LINEAR_PARTIAL:
                return self.part_tolerances(op)
        values, of_sums = op_tolerances.sums(state, op, opcode)
        match op.epilogue:
            case Epilogue.SWIGLU:
                return op_tolerances.swiglu(program, values, of_sums)
            case Epilogue.ROPE_APPEND:
                return op_tolerances.rotated(state, op, values, of_sums)
            case _:
                return of_sums

    def part_tolerances(self, op: Op) -> np.ndarray:
        matrix = self.state.weights.matrix(op, self.program.swiglu_group)
        source = op_tolerances.input_of(self.state, op, matrix)
        is_normed = op.prologue is Prologue.RMS_NORM
        bounds = {
            (i.part, i.k0, i.k1)
            for worker in self.program.workers
            for i in worker
            if i.op == op.index and i.opcode is Opcode.LINEAR_PARTIAL
        }
        of_parts = [
            op_tolerances.products(source, matrix, k0, k1, is_normed=is_normed)[1]
            for _, k0, k1 in sorted(bounds)
        ]
        return np.concatenate(of_parts, axis=1)

    def compare(
        self, op: Op, buffer: int, expected: Float32Array, tolerances: np.ndarray, format: str | None = None
    ) -> float:
        """What the op stored, and from now on what the VM has. `format`: of matrices by which pairs are
        multiplied."""
        found = self.next_version(buffer, format)
        worst = close(found, expected, tolerances, op.name)
        if (reader := self.found.activations.normed_by.get(op.index)) is not None:
            self.check_copy(found, self.program.ops[reader])
        self.state.buffers[buffer][...] = found
        return worst

    def next_version(self, index: int, format: str | None) -> Float32Array:
        """What the next op to write a buffer stored; NaN elsewhere."""
        buffer, nth = self.program.buffers[index], self.written[index]
        assert buffer.space is Space.ACTIVATION
        self.written[index] += 1
        start = self.found.offsets[buffer.name] // 4
        stores, size = self.activations, self.program.bucket * buffer.columns // (1 if format is None else 2)
        mine = (stores.element >= start) & (stores.element < start + size) & (stores.nth == nth)
        values = stores.values[mine].reshape(-1, 1)
        if format is not None:
            values = rounded_values(format, np.ascontiguousarray(values).view(np.uint16))
        version = np.full((size, values.shape[1]), np.nan, np.float32)
        version[stores.element[mine] - start] = values
        whole = version.reshape(self.program.bucket, -1)
        assert np.isnan(whole[self.rows :]).all(), f"{buffer.name}: rows past the step's"
        return whole[: self.rows]

    def check_copy(self, rows: Float32Array, reader: Op) -> None:
        """What the next norm's op reads is what it would have made of the rows itself."""
        nth, self.num_copied = self.num_copied, self.num_copied + 1
        format = self.state.weights.matrix(reader, self.program.swiglu_group).packed_format
        expected = multiplied_as(
            rows * self.state.weights.vector(reader.norm), "F16" if format == "F16" else "BF16"
        )
        copied = self.version(self.weighted, nth, rows.shape[1])
        np.testing.assert_array_equal(rounded_values(format, copied.astype(np.uint16)), expected)
        sums = self.version(self.squares, nth, rows.shape[1] // SQUARED_COLUMNS)
        exact = (rows.astype(np.float64) ** 2).reshape(*sums.shape, SQUARED_COLUMNS).sum(axis=-1)
        np.testing.assert_allclose(sums, exact, rtol=8 * 2.0**-24, atol=1e-37)

    def version(self, stores: Stored, nth: int, columns: int) -> np.ndarray:
        """The rows' nth, all there; 0 where nothing was stored."""
        mine = stores.nth == nth
        assert mine.sum() == self.rows * columns
        version = np.zeros(self.rows * columns, stores.values.dtype)
        version[stores.element[mine]] = stores.values[mine]
        return version.reshape(self.rows, columns)

    def compare_kv(self, op: Op, tolerances: np.ndarray) -> float:
        """K and V may be either of two float16 where what is rounded is next to their middle."""
        slots, exact = self.state.step.slots, self.state.kv.layers[op.layer]
        found = self.found.regions["kv"][op.layer]
        expected = exact[slots].astype(np.float64)
        low, high = ((expected + sign * tolerances).astype(np.float16) for sign in (-1, 1))
        is_right = (low <= found[slots]) & (found[slots] <= high)
        assert is_right.all(), f"{op.name}: {np.argwhere(~is_right)[:4].tolist()} of K and V"
        others = np.delete(np.arange(len(found)), slots)
        before = self.before.layers[op.layer]
        assert (found[others].view(np.uint16) == before[others].view(np.uint16)).all(), (
            f"{op.name}: other slots"
        )
        exact[slots] = found[slots]
        return 0.0

    def check_no_more(self) -> None:
        """No element of a buffer was stored more often than its ops do."""
        for index, buffer in enumerate(self.program.buffers):
            if buffer.space is Space.ACTIVATION:
                version = self.next_version(
                    index, self.found.activations.format_of(self.program, buffer.name)
                )
                assert np.isnan(version).all(), f"{buffer.name} is written once more"
        assert all((copies.nth < self.num_copied).all() for copies in (self.weighted, self.squares))
        for region in ("kv", "logits"):
            assert (stored(self.found, self.found.regions[region]).nth == 0).all()

    def needed_columns(self, opcode: Opcode, instructions: list[Instruction]) -> np.ndarray:
        """[vocab] logits that are computed, of all rows: tiles that any row needs; with K-tiles all."""
        span, words = self.program.stats_span, self.found.asked.tables.needed_spans
        is_needed = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
        columns = np.zeros(self.program.geometry.vocab_size, dtype=bool)
        for one in instructions:
            in_tile = is_needed[one.n0 // span : -(-one.n1 // span)].any()
            columns[one.n0 : one.n1] = in_tile or opcode is Opcode.REDUCE
        return columns

    def check_head(self) -> None:
        """Statistics are those of the logits that stand beside them."""
        span, logits = self.program.stats_span, self.found.buffers["logits"]
        stats = self.found.buffers["head_stats"].reshape(self.rows, -1, 3)
        for index, start in enumerate(range(0, logits.shape[1], span)):
            of_span = logits[:, start : start + span]
            if np.isnan(of_span).all():
                assert np.isnan(stats[:, index]).all()
                continue
            expected = reduce_rows(of_span)
            np.testing.assert_array_equal(stats[:, index, 0], expected.maxima)
            np.testing.assert_array_equal(stats[:, index, 1], start + expected.token_ids)
            sums = expected.log_sums.astype(np.float64)
            close(stats[:, index, 2], expected.log_sums, op_tolerances.log_sums(sums, span), "statistics")

    def check_results(self) -> None:
        """What rows asked for is what their logits give; other rows were handed nothing."""
        tables, logits = self.found.asked.tables, self.found.buffers["logits"]
        top_k = self.found.tokens.shape[1] - 1
        is_reduced = (tables.row_flags & RowFlag.WANTS_REDUCTIONS).astype(bool)
        expected = reduce_rows(logits[is_reduced], top_k)
        values, tokens = self.found.values[is_reduced], self.found.tokens[is_reduced]
        np.testing.assert_array_equal(values[:, 0], expected.maxima)
        np.testing.assert_array_equal(values[:, 2:], expected.top_logits)
        np.testing.assert_array_equal(tokens[:, 0], expected.token_ids)
        np.testing.assert_array_equal(tokens[:, 1:], expected.top_token_ids)
        sums = expected.log_sums.astype(np.float64)
        close(values[:, 1], expected.log_sums, op_tolerances.log_sums(sums, logits.shape[1]), "log-sum-exp")
        assert np.isnan(self.found.values[~is_reduced]).all()
        assert (self.found.tokens[~is_reduced] == -1).all()
        of_row = np.repeat(np.arange(self.rows), np.diff(tables.allowed_starts))
        wanted = logits[of_row, tables.allowed_token_ids]
        np.testing.assert_array_equal(self.found.regions["allowed_logits"][: len(wanted)], wanted)
        assert not np.isnan(wanted).any()
        is_handed_out = (tables.row_flags & RowFlag.WANTS_LOGITS).astype(bool)
        assert not np.isnan(logits[is_handed_out]).any()


def close(found: np.ndarray, expected: np.ndarray, tolerances: np.ndarray, name: str) -> float:
    """The largest error, as a part of what it may be. Raises AssertionError, also where only one is NaN."""
    is_missing, is_extra = np.isnan(found) & ~np.isnan(expected), ~np.isnan(found) & np.isnan(expected)
    assert not is_missing.any(), f"{name}: {np.argwhere(is_missing)[:4].tolist()} were not written"
    assert not is_extra.any(), f"{name}: {np.argwhere(is_extra)[:4].tolist()} were written"
    error = np.nan_to_num(np.abs(found.astype(np.float64) - expected))
    allowed = tolerances + op_tolerances.EPS * np.nan_to_num(np.abs(expected)) * (tolerances > 0)
    parts = np.where(error > 0, error / np.maximum(allowed, op_tolerances.TINIEST), 0)
    worst = float(parts.max(initial=0))
    if worst > 1:
        at = np.unravel_index(parts.argmax(), parts.shape)
        message = f"{name}: {found[at]} at {[int(i) for i in at]}, {expected[at]} is right to {allowed[at]}"
        raise AssertionError(f"{message}; {int((parts > 1).sum())} of {parts.size} are wrong")
    return worst


def unrestricted(step: VmStep) -> VmStep:
    """The step with every row asking for all logits: what kernels compute beyond that is checked too."""
    return msgspec.structs.replace(step, allowed_starts=None, allowed_token_ids=None, needs_best=None)


def check_ops(program: Program, weights: OpWeights, kv: VmKv, found: EmulatedStep, rows) -> dict[str, float]:
    """`kv` as it was before the step. Raises AssertionError."""
    return OpByOp(program, weights, kv, found, unrestricted(vm_step(rows))).check()
