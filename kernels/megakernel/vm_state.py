"""What a VM works on: a step's rows, the paged KV, the program's buffers and the weights by tile."""

from enum import StrEnum

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.artifact import matrix_names
from megakernel.float_formats import round_to_bf16
from megakernel.head import MAX_TOP_K
from megakernel.model.rope import rope_frequencies
from megakernel.model.weights import Weights
from megakernel.pack_cuda import common_format
from megakernel.program import Epilogue, Op, OpKind, Program, Space
from megakernel.quantize import QUANTIZED_FORMATS

IntArray = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

NO_PARENT = -1


class Arithmetic(StrEnum):
    """Whose products a VM computes; they alone differ from backend to backend."""

    CPU = "cpu"
    """Weights as they are stored; activations as int8 in blocks where the weight is quantized, else as they
    are."""
    CUDA = "cuda"
    """Weights as they are packed, with BF16 for F32; activations rounded to BF16, or to F16, saturating,
    where that is what the op's weights are. A row to be normed is rounded without its scale, by which the
    product is multiplied in float32. KV is float16."""


class StepError(ValueError):
    """A step whose rows, parents or block tables make no sense for the program; raised before it runs."""


class VmStep(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Rows of one step, every parent before its children. A row sees its prefix, its ancestors and itself."""

    token_ids: IntArray
    """[rows]"""
    positions: IntArray
    """[rows] committed tokens of the row's sequence + held ancestors of its root + depth of the row."""
    slots: IntArray
    """[rows] KV slot that the row writes; no two rows share one."""
    parents: IntArray
    """[rows] the parent's index, or NO_PARENT for a child of the committed prefix or of a held row."""
    sequences: IntArray
    """[rows] the row's sequence."""
    context_lengths: IntArray
    """[sequences] committed tokens."""
    block_tables: IntArray
    """[sequences, max_blocks] KV block ids in order; what lies past the committed tokens is not read."""
    needs_best: npt.NDArray[np.bool_] | None = None
    """[rows] rows whose logits are reduced; None: all that have no allowed tokens."""
    top_k: int = 0
    allowed_starts: IntArray | None = None
    """[rows + 1] row i may take `allowed_token_ids[starts[i]:starts[i + 1]]`; an empty slice: any token."""
    allowed_token_ids: IntArray | None = None
    held_starts: IntArray | None = None
    """[rows + 1] of row i, where it has no parent, `held_slots[starts[i]:starts[i + 1]]` are the slots of
    ancestors that earlier steps ran, the root's first."""
    held_slots: IntArray | None = None

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    def allowed(self, row: int) -> IntArray:
        """Ascending token ids; empty: any."""
        if self.allowed_starts is None or self.allowed_token_ids is None:
            return np.empty(0, dtype=np.int64)
        return self.allowed_token_ids[self.allowed_starts[row] : self.allowed_starts[row + 1]]

    def held(self, row: int) -> IntArray:
        """Slots of the held ancestors that the row names, the root's first."""
        if self.held_starts is None or self.held_slots is None:
            return np.empty(0, dtype=np.int64)
        return self.held_slots[self.held_starts[row] : self.held_starts[row + 1]]

    def is_reduced(self, row: int) -> bool:
        return bool(self.needs_best[row]) if self.needs_best is not None else not len(self.allowed(row))

    def is_restricted(self, row: int) -> bool:
        """Whether the head computes the row's allowed tokens alone: reductions need the whole vocabulary."""
        return len(self.allowed(row)) > 0 and not self.is_reduced(row)


class VmKv:
    """KV pool of all layers; one may serve the VMs of several programs of a model."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        columns: int,
        *,
        block_size: int,
        dtype: type[np.float16] | type[np.float32] = np.float32,
    ) -> None:
        """`columns`: K heads, then V heads, head_dim each."""
        self.block_size = block_size
        self.layers = [np.zeros((num_slots, columns), dtype=dtype) for _ in range(num_layers)]

    @property
    def num_slots(self) -> int:
        return len(self.layers[0])

    @property
    def dtype(self) -> np.dtype[np.floating]:
        return self.layers[0].dtype


def kv_for(
    program: Program,
    num_slots: int,
    *,
    block_size: int = 16,
    dtype: type[np.float16] | type[np.float32] = np.float32,
) -> VmKv:
    geometry = program.geometry
    columns = 2 * geometry.num_kv_heads * geometry.head_dim
    return VmKv(geometry.num_layers, num_slots, columns, block_size=block_size, dtype=dtype)


class OpMatrix(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a linear op multiplies by, in the order of its output columns."""

    values: Float32Array
    """[out_features, in_features]"""
    is_quantized: npt.NDArray[np.bool_]
    """[out_features] whether the stored weights are in blocks of 32."""
    packed_format: str
    """What CUDA's kernels have it as."""


class OpWeights:
    """Dense matrices of ops, as an arithmetic has them; held until dropped, 4 bytes an element."""

    def __init__(self, weights: Weights, arithmetic: Arithmetic = Arithmetic.CPU) -> None:
        self.shape = weights.shape
        self.arithmetic = arithmetic
        self.frequencies = rope_frequencies(weights.shape)
        self._weights = weights
        self._vectors: dict[str, Float32Array] = {}
        self._tables: dict[tuple[str, ...], Float32Array] = {}
        self._matrices: dict[tuple[str, ...], OpMatrix] = {}

    def vector(self, name: str) -> Float32Array:
        if name not in self._vectors:
            self._vectors[name] = self._weights.dense(name)
        return self._vectors[name]

    def bias(self, op: Op) -> Float32Array:
        return np.concatenate([self.vector(name) for name in op.biases])

    def table(self, op: Op) -> Float32Array:
        """[vocab, hidden] what an embedding op looks tokens up in."""
        names = matrix_names(op)
        if names not in self._tables:
            (self._tables[names],) = self._parts(names)
        return self._tables[names]

    def matrix(self, op: Op, swiglu_group: int) -> OpMatrix:
        key = (*op.weights, f"{swiglu_group if op.epilogue is Epilogue.SWIGLU else 0}")
        if key not in self._matrices:
            parts = self._parts(op.weights)
            is_quantized = [self._weights.formats[name] in QUANTIZED_FORMATS for name in op.weights]
            rows = [np.full(len(part), flag) for part, flag in zip(parts, is_quantized, strict=True)]
            matrix, flags = np.concatenate(parts), np.concatenate(rows)
            if op.epilogue is Epilogue.SWIGLU:
                order = _alternating(len(matrix), swiglu_group)
                matrix, flags = matrix[order], flags[order]
            self._matrices[key] = OpMatrix(
                values=matrix, is_quantized=flags, packed_format=self._packed_format(op.weights)
            )
        return self._matrices[key]

    def _parts(self, names: tuple[str, ...]) -> list[Float32Array]:
        stored = [self.vector(name) for name in names]
        if self.arithmetic is Arithmetic.CPU:
            return stored
        packed = self._packed_format(names)
        return [
            part if self._weights.formats[name] == packed else round_to_bf16(part)
            for name, part in zip(names, stored, strict=True)
        ]

    def _packed_format(self, names: tuple[str, ...]) -> str:
        return common_format([self._weights.formats[name] for name in names], self.vector(names[0]).shape[1])


class VmState:
    """One run's memory. What was never written is NaN, so a read too early shows in the results."""

    def __init__(self, program: Program, weights: OpWeights, kv: VmKv, step: VmStep) -> None:
        check_step(program, kv, step)
        self.program = program
        self.weights = weights
        self.kv = kv
        self.step = step
        rows = step.num_rows
        self.buffers = [
            np.full((rows, 0 if b.space is Space.KV else b.columns), np.nan, dtype=np.float32)
            for b in program.buffers
        ]
        for op in program.ops:
            if op.kind is OpKind.EMBED:
                self.buffers[op.input][:, 0] = step.token_ids
        self.key_slots = [_key_slots(kv, step, row) for row in range(rows)]
        for layer in kv.layers:
            layer[step.slots] = np.nan
        self.head_sums: dict[tuple[int, int, int], dict[int, Float32Array]] = {}
        """By op, row and head, of heads that several instructions make up: sums by their first column, until
        all are there."""

    def named_buffers(self) -> dict[str, Float32Array]:
        """[rows, columns] of each by name; of a KV buffer, what the rows' slots hold."""
        by_name = {}
        layers = {op.kv: op.layer for op in self.program.ops if op.kv >= 0}
        for buffer in self.program.buffers:
            if buffer.space is Space.KV:
                pool = self.kv.layers[layers[buffer.index]]
                by_name[buffer.name] = pool[self.step.slots].astype(np.float32)
            else:
                by_name[buffer.name] = self.buffers[buffer.index]
        return by_name


def check_step(program: Program, kv: VmKv, step: VmStep) -> None:
    """Raises StepError."""
    rows = step.num_rows
    lengths = {len(a) for a in (step.positions, step.slots, step.parents, step.sequences)}
    if step.held_starts is not None and step.held_slots is not None:
        _require(
            len(step.held_starts) == rows + 1
            and step.held_starts[0] == 0
            and step.held_starts[-1] == len(step.held_slots)
            and bool((np.diff(step.held_starts) >= 0).all()),
            f"held_starts do not deal {len(step.held_slots)} held slots to {rows} rows",
        )
    _require(lengths == {rows}, f"{rows} token ids beside arrays of lengths {sorted(lengths)}")
    _require(0 < rows <= program.bucket, f"{rows} rows, where the bucket has {program.bucket}")
    _require(len(set(step.slots.tolist())) == rows, "two rows write one slot")
    _require(_within(step.slots, kv.num_slots), f"a row's slot is not in [0, {kv.num_slots})")
    vocab = program.geometry.vocab_size
    _require(_within(step.token_ids, vocab), f"a token id is not in [0, {vocab})")
    most = program.geometry.max_context_tokens
    _require(_within(step.positions, most), f"a position is not in [0, {most})")
    _require(_within(step.sequences, len(step.context_lengths)), "a row of no sequence")
    for row in range(rows):
        parent, sequence = int(step.parents[row]), int(step.sequences[row])
        _require(NO_PARENT <= parent < row, f"row {row} has parent {parent}, not before it")
        held = step.held(row)
        _require(_within(held, kv.num_slots), f"row {row}: a held slot is not in [0, {kv.num_slots})")
        _require(not np.isin(held, step.slots).any(), f"row {row}: a row of the step writes a held slot")
        _require(not len(held) or parent == NO_PARENT, f"row {row}: a parent in the step, and held slots")
        expected = int(step.context_lengths[sequence]) + len(held)
        if parent != NO_PARENT:
            _require(int(step.sequences[parent]) == sequence, f"row {row}'s parent is of another sequence")
            expected = int(step.positions[parent]) + 1
        position = int(step.positions[row])
        _require(position == expected, f"row {row} is at position {position}, not {expected}")
        allowed = step.allowed(row)
        _require(
            _within(allowed, vocab) and bool((np.diff(allowed) > 0).all()),
            f"row {row}: its allowed tokens do not ascend in [0, {vocab})",
        )
    _require(0 <= step.top_k <= min(vocab, MAX_TOP_K), f"top_k is {step.top_k}")
    for sequence, context in enumerate(step.context_lengths.tolist()):
        blocks = step.block_tables[sequence, : -(-context // kv.block_size)]
        _require(
            len(blocks) * kv.block_size >= context and _within(blocks, kv.num_slots // kv.block_size),
            f"sequence {sequence}: its block table does not cover {context} tokens",
        )


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise StepError(otherwise)


def _within(values: IntArray, end: int) -> bool:
    return bool(((values >= 0) & (values < end)).all())


def _key_slots(kv: VmKv, step: VmStep, row: int) -> IntArray:
    """[position + 1] the slot of each position that a row attends to."""
    sequence = int(step.sequences[row])
    context = np.arange(int(step.context_lengths[sequence]), dtype=np.int64)
    blocks = step.block_tables[sequence][context // kv.block_size]
    path, root = [], row
    while row != NO_PARENT:
        path.append(int(step.slots[row]))
        root, row = row, int(step.parents[row])
    committed = blocks * kv.block_size + context % kv.block_size
    return np.concatenate([committed, step.held(root), path[::-1]]).astype(np.int64)


def _alternating(num_rows: int, group: int) -> IntArray:
    """Groups of the first half's rows and of the second's in turn."""
    return np.arange(num_rows, dtype=np.int64).reshape(2, -1, group).transpose(1, 0, 2).reshape(-1)
