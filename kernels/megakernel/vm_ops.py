"""What each instruction computes: float64 inside an instruction, float32 in buffers, row by row.

What is multiplied is rounded first, as the backend's kernels round it (`vm_state.Arithmetic`). Every sum runs
along one row's own elements, so that neither other rows nor a tile's width change a bit.
"""

import numpy as np

from megakernel.float_formats import round_to_bf16, round_to_f16_saturating
from megakernel.program import Epilogue, Instruction, Op, Opcode, Prologue, split_block
from megakernel.quantize import fake_quantize
from megakernel.vm_state import Arithmetic, Float32Array, Float64Array, IntArray, VmState


def execute(state: VmState, instruction: Instruction) -> None:
    """Rows past the step's own are padding: nothing is computed for them."""
    op = state.program.ops[instruction.op]
    for row in range(instruction.r0, min(instruction.r1, state.step.num_rows)):
        match instruction.opcode:
            case Opcode.EMBED:
                _embed(state, op, instruction, row)
            case Opcode.ATTENTION:
                _attend(state, op, instruction, row)
            case Opcode.LINEAR_ACCUMULATE:
                pass  # a tile's last instruction sums all of K
            case Opcode.LINEAR:
                _finish(state, op, instruction, row, _product(state, op, instruction, row, 0, op.in_features))
            case Opcode.LINEAR_PARTIAL:
                product = _product(state, op, instruction, row, instruction.k0, instruction.k1)
                partial = state.buffers[state.program.partial_buffers[op.index]]
                columns = instruction.part * op.out_features + _columns(state, op, instruction, row)
                partial[row, columns] = product
            case Opcode.REDUCE:
                _finish(state, op, instruction, row, _sum_parts(state, op, instruction, row))


def _embed(state: VmState, op: Op, instruction: Instruction, row: int) -> None:
    token = int(state.buffers[op.input][row, 0])
    columns = slice(instruction.n0, instruction.n1)
    state.buffers[op.output][row, columns] = state.weights.table(op)[token, columns]


def _product(state: VmState, op: Op, instruction: Instruction, row: int, k0: int, k1: int) -> Float32Array:
    matrix = state.weights.matrix(op, state.program.swiglu_group)
    columns = _columns(state, op, instruction, row)
    tile = matrix.values[columns, k0:k1]
    if state.weights.arithmetic is Arithmetic.CUDA:
        x, scale = _rounded_input(state, op, row, matrix.packed_format)
        return _dot(tile, x[k0:k1].astype(np.float64)) * scale
    x, flags = _prologue(state, op, row), matrix.is_quantized[columns]
    if not flags.any():
        return _dot(tile, x[k0:k1].astype(np.float64))
    rounded = _dot(tile, fake_quantize(x)[k0:k1])
    return rounded if flags.all() else np.where(flags, rounded, _dot(tile, x[k0:k1].astype(np.float64)))


def _rounded_input(state: VmState, op: Op, row: int, packed_format: str) -> tuple[Float32Array, np.float32]:
    """What tensor cores multiply, and what its product is scaled by: 1 but for rows that are normed."""
    x, scale = state.buffers[op.input][row], np.float32(1)
    if op.prologue is Prologue.RMS_NORM:
        mean_square = np.mean(x.astype(np.float64) ** 2)
        scale = np.float32(1 / np.sqrt(mean_square + state.program.geometry.rms_norm_eps))
        x = x * state.weights.vector(op.norm)
    else:
        x = _prologue(state, op, row)
    return multiplied_as(x, packed_format), scale


def multiplied_as(x: Float32Array, packed_format: str) -> Float32Array:
    """`x` as CUDA's kernels multiply it, by matrices of the format."""
    return round_to_f16_saturating(x) if packed_format == "F16" else round_to_bf16(x)


def _dot(tile: Float32Array, x: Float64Array) -> Float32Array:
    return np.asarray((tile * x).sum(axis=1), dtype=np.float32)


def _sum_parts(state: VmState, op: Op, instruction: Instruction, row: int) -> Float32Array:
    partial = state.buffers[state.program.partial_buffers[op.index]][row]
    columns = _columns(state, op, instruction, row)
    total = np.zeros(len(columns), dtype=np.float32)
    for part in range(instruction.num_parts):
        total += partial[part * op.out_features + columns]
    return total


def _columns(state: VmState, op: Op, instruction: Instruction, row: int) -> IntArray:
    """Of [n0, n1): all, or for a restricted row of the head those of its allowed tokens."""
    if op.epilogue is not Epilogue.LOGITS or not state.step.is_restricted(row):
        return np.arange(instruction.n0, instruction.n1)
    allowed = state.step.allowed(row)
    return allowed[(allowed >= instruction.n0) & (allowed < instruction.n1)]


def _prologue(state: VmState, op: Op, row: int) -> Float32Array:
    x = state.buffers[op.input][row]
    match op.prologue:
        case Prologue.NONE:
            return np.asarray(x)
        case Prologue.RMS_NORM:
            eps = state.program.geometry.rms_norm_eps
            normed = _rms_norm(x.astype(np.float64), state.weights.vector(op.norm), eps)
            return normed.astype(np.float32)
        case Prologue.COMBINE:
            return _combine(state, x, row)


def _rms_norm(x: Float64Array, weight: Float32Array, eps: float) -> Float64Array:
    """Along the last axis."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + eps) * weight)


def _combine(state: VmState, attended: Float32Array, row: int) -> Float32Array:
    """Splits of the row's positions only: those past its own hold nothing."""
    geometry = state.program.geometry
    num_splits = int(state.step.positions[row]) // state.program.split_tokens + 1
    by_block = attended.reshape(-1, geometry.num_heads, geometry.head_dim + 2)
    blocks = [split_block(state.program, row, split) for split in range(num_splits)]
    by_split = by_block[blocks].astype(np.float64)
    largest = by_split[:, :, 0].max(axis=0)
    total = np.zeros(geometry.num_heads)
    values = np.zeros((geometry.num_heads, geometry.head_dim))
    for split in by_split:
        weight = np.exp(split[:, 0] - largest)
        total += weight * split[:, 1]
        values += weight[:, None] * split[:, 2:]
    return (values / total[:, None]).reshape(-1).astype(np.float32)


def _attend(state: VmState, op: Op, instruction: Instruction, row: int) -> None:
    program, geometry = state.program, state.program.geometry
    dim, group = geometry.head_dim, geometry.num_heads // geometry.num_kv_heads
    slots = state.key_slots[row]
    output = state.buffers[op.output][row].reshape(-1, geometry.num_heads, dim + 2)
    queries = state.buffers[op.input][row].reshape(-1, dim).astype(np.float64)
    for split in range(-(-len(slots) // program.split_tokens)):
        block = split_block(program, row, split)
        if block % instruction.num_parts != instruction.part:
            continue
        own = slots[split * program.split_tokens : (split + 1) * program.split_tokens]
        pool = state.kv.layers[op.layer][own].reshape(len(own), 2, geometry.num_kv_heads, dim)
        for kv_head in range(instruction.n0, instruction.n1):
            keys, values = pool[:, 0, kv_head].astype(np.float64), pool[:, 1, kv_head].astype(np.float64)
            for head in range(kv_head * group, (kv_head + 1) * group):
                scores = (keys * queries[head]).sum(axis=1)
                largest = np.float32(scores.max())
                weights = np.exp(scores - largest)
                output[block, head, 0] = largest
                output[block, head, 1] = weights.sum()
                output[block, head, 2:] = (weights[:, None] * values).sum(axis=0)


def _finish(state: VmState, op: Op, instruction: Instruction, row: int, sums: Float32Array) -> None:
    n0, n1 = instruction.n0, instruction.n1
    output = state.buffers[op.output][row]
    match op.epilogue:
        case Epilogue.STORE:
            output[n0:n1] = sums
        case Epilogue.RESIDUAL:
            output[n0:n1] += sums
        case Epilogue.SWIGLU:
            pairs = sums.reshape(-1, 2, state.program.swiglu_group).astype(np.float64)
            gate, up = pairs[:, 0].reshape(-1), pairs[:, 1].reshape(-1)
            output[n0 // 2 : n1 // 2] = gate / (1 + np.exp(-gate)) * up
        case Epilogue.ROPE_APPEND:
            _rope_append(state, op, instruction, row, sums)
        case Epilogue.LOGITS:
            output[_columns(state, op, instruction, row)] = sums
            if not state.step.is_restricted(row):
                _span_statistics(state, op, n0, row, sums)


def _rope_append(state: VmState, op: Op, instruction: Instruction, row: int, sums: Float32Array) -> None:
    """Heads that the instruction completes; of one that it does not, the sums are kept."""
    n0, dim = instruction.n0, state.program.geometry.head_dim
    if len(sums) >= dim:
        for start in range(0, len(sums), dim):
            _finish_head(state, op, row, (n0 + start) // dim, sums[start : start + dim])
        return
    key = op.index, row, n0 // dim
    parts = state.head_sums.setdefault(key, {})
    parts[n0] = sums
    if sum(map(len, parts.values())) == dim:
        _finish_head(state, op, row, n0 // dim, np.concatenate([parts[start] for start in sorted(parts)]))
        del state.head_sums[key]


def _finish_head(state: VmState, op: Op, row: int, head: int, sums: Float32Array) -> None:
    geometry, dim = state.program.geometry, state.program.geometry.head_dim
    columns = slice(head * dim, (head + 1) * dim)
    if op.biases:
        sums = sums + state.weights.bias(op)[columns]
    x = sums.astype(np.float64)
    is_query, is_value = head < geometry.num_heads, head >= geometry.num_heads + geometry.num_kv_heads
    if not is_value:
        if op.head_norms:
            weight = state.weights.vector(op.head_norms[0 if is_query else 1])
            x = _rms_norm(x, weight, geometry.rms_norm_eps)
        x = _rotate(x, int(state.step.positions[row]) * state.weights.frequencies)
    if is_query:
        state.buffers[op.output][row, columns] = x * dim**-0.5
    else:
        slot, first = int(state.step.slots[row]), geometry.num_heads * dim
        state.kv.layers[op.layer][slot, columns.start - first : columns.stop - first] = x.astype(np.float32)


def _rotate(x: Float64Array, angles: Float64Array) -> Float64Array:
    """Dimension i turns with i + head_dim / 2."""
    cos, sin = np.cos(angles), np.sin(angles)
    low, high = np.split(x, 2)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin])


def _span_statistics(state: VmState, op: Op, n0: int, row: int, logits: Float32Array) -> None:
    span = state.program.stats_span
    for start in range(0, len(logits), span):
        part = logits[start : start + span].astype(np.float64)
        largest = part.max()
        log_sum = largest + np.log(np.exp(part - largest).sum()) if np.isfinite(largest) else largest
        first = 3 * ((n0 + start) // span)
        state.buffers[op.stats][row, first : first + 3] = largest, n0 + start + int(part.argmax()), log_sum
