"""The packed weights of an artifact: which bytes lie where, and how they are made from a model's weights.

Vectors (norms, biases) are float32; matrices are packed an op at a time, for a CPU (`pack.py`) or for CUDA
(`pack_cuda.py`). A matrix that two ops share, the embedding and a tied head, lies there once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np

from megakernel import pack, pack_cuda
from megakernel.float_formats import FLOAT_BYTES, float_tensor
from megakernel.model.shape import ModelShape
from megakernel.model.weights import RawTensor, StoredWeights, Weights
from megakernel.packing import GROUP, Bytes, PackedLinear
from megakernel.program import Epilogue, Geometry, Op, OpKind, Program

SEGMENT_ALIGNMENT = 4096

Backend = Literal["cpu", "cuda"]
"""For whose kernels weights are packed."""
Progress = Callable[[str, float], None]
"""What is being done, and how much of it is done, 0 to 1."""
WeightNames = tuple[str, ...]


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """One matrix or vector of an op."""

    weights: WeightNames
    format: str
    is_matrix: bool
    swiglu_group: int | None
    offset: int
    num_bytes: int


class WeightLayout(msgspec.Struct, frozen=True, kw_only=True):
    segments: Mapping[WeightNames, Segment]
    """By the names of what is joined in it."""
    num_bytes: int
    backend: Backend = "cpu"

    def at(self, *weights: str) -> Segment:
        return self.segments[weights]


class _Packing(Protocol):
    """What the module of a backend gives."""

    def common_format(self, formats: Sequence[str], in_features: int) -> str: ...

    def group_bytes(self, format: str, in_features: int) -> int: ...

    def pack_linear(
        self, tensors: Sequence[RawTensor], *, swiglu_group: int | None = None
    ) -> PackedLinear: ...


_PACKINGS: Mapping[Backend, _Packing] = {"cpu": pack, "cuda": pack_cuda}


def matrix_names(op: Op) -> WeightNames:
    """The matrix an op multiplies by or looks rows up in; empty for attention."""
    return ("embed",) if op.kind is OpKind.EMBED else op.weights


def lay_out_weights(program: Program, formats: Mapping[str, str], backend: Backend = "cpu") -> WeightLayout:
    """Where each weight of a program lies; the same for every bucket of an artifact.

    What an op's weights are packed as, `common_format` of the backend's packing says.
    """
    sizes: dict[WeightNames, Segment] = {}
    for op in program.ops:
        for segment in _segments(op, program, formats, _PACKINGS[backend]):
            sizes.setdefault(segment.weights, segment)
    segments: dict[WeightNames, Segment] = {}
    end = 0
    for names, segment in sizes.items():
        segments[names] = msgspec.structs.replace(segment, offset=end)
        end += -(-segment.num_bytes // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
    return WeightLayout(segments=segments, num_bytes=end, backend=backend)


def pack_weights(
    layout: WeightLayout, weights: Weights, out: Bytes, progress: Progress | None = None
) -> None:
    """Fills `out`, `[layout.num_bytes]`."""
    assert len(out) == layout.num_bytes
    for segment, data in packed_segments(layout, weights, progress):
        out[segment.offset : segment.offset + len(data)] = data


def packed_segments(
    layout: WeightLayout, weights: Weights, progress: Progress | None = None
) -> Iterator[tuple[Segment, Bytes]]:
    """Ascending by offset, one in memory at a time. Between them lie zeros, up to the next alignment."""
    for done, segment in enumerate(layout.segments.values()):
        if progress is not None:
            progress(" ".join(segment.weights), done / len(layout.segments))
        data = _packed(segment, weights, _PACKINGS[layout.backend])
        assert len(data) == segment.num_bytes, (
            f"{segment.weights}: {len(data)} bytes, not {segment.num_bytes}"
        )
        yield segment, data


def packed_formats(shape: ModelShape, formats: Mapping[str, str], backend: Backend = "cpu") -> dict[str, str]:
    """By weight name, what each is packed as: its own format, or that of floats where an op's differ or have
    no kernel.

    Compile with these, and the compiler reckons with the bytes that are read.
    """
    hidden, q_columns = shape.hidden_size, shape.num_heads * shape.head_dim
    ops: list[tuple[WeightNames, int]] = [(("embed",), hidden), (("head",), hidden)]
    for layer in range(shape.num_layers):
        for parts, in_features in (
            ("q k v", hidden),
            ("o", q_columns),
            ("gate up", hidden),
            ("down", shape.intermediate_size),
        ):
            ops.append((tuple(f"layers.{layer}.{part}" for part in parts.split()), in_features))
    packed = dict.fromkeys(formats, "F32")
    for names, in_features in ops:
        if names[0] in formats:
            format = _PACKINGS[backend].common_format([formats[name] for name in names], in_features)
            packed |= dict.fromkeys(names, format)
    return packed


def _segments(op: Op, program: Program, formats: Mapping[str, str], packing: _Packing) -> Iterable[Segment]:
    # Norms first: then they lie at one distance from layer to layer, and so does the one after the last.
    if op.norm:
        yield _vector((op.norm,), program.geometry)
    if names := matrix_names(op):
        yield _matrix(op, names, program, formats, packing)
    for vector in (op.biases, *((name,) for name in op.head_norms)):
        if vector:
            yield _vector(vector, program.geometry)


def _matrix(
    op: Op, names: WeightNames, program: Program, formats: Mapping[str, str], packing: _Packing
) -> Segment:
    geometry = program.geometry
    is_embedding = op.kind is OpKind.EMBED
    in_features = geometry.hidden_size if is_embedding else op.in_features
    out_features = geometry.vocab_size if is_embedding else op.out_features
    swiglu_group = program.swiglu_group if op.epilogue is Epilogue.SWIGLU else None
    format = packing.common_format([formats[name] for name in names], in_features)
    num_groups = -(-out_features // GROUP)
    return Segment(
        weights=names,
        format=format,
        is_matrix=True,
        swiglu_group=swiglu_group,
        offset=0,
        num_bytes=num_groups * packing.group_bytes(format, in_features),
    )


def _vector(names: WeightNames, geometry: Geometry) -> Segment:
    num_elements = sum(_vector_size(name, geometry) for name in names)
    return Segment(
        weights=names, format="F32", is_matrix=False, swiglu_group=None, offset=0, num_bytes=4 * num_elements
    )


def _vector_size(name: str, geometry: Geometry) -> int:
    match name.rpartition(".")[2]:
        case "q_bias":
            return geometry.num_heads * geometry.head_dim
        case "k_bias" | "v_bias":
            return geometry.num_kv_heads * geometry.head_dim
        case "q_norm" | "k_norm":
            return geometry.head_dim
        case _:
            return geometry.hidden_size


def _packed(segment: Segment, weights: Weights, packing: _Packing) -> Bytes:
    if not segment.is_matrix:
        return np.concatenate([weights.dense(name) for name in segment.weights]).view(np.uint8)
    tensors = [_tensor(weights, name, segment.format) for name in segment.weights]
    return packing.pack_linear(tensors, swiglu_group=segment.swiglu_group).data


def _tensor(weights: Weights, name: str, format: str) -> RawTensor:
    if isinstance(weights, StoredWeights) and weights.formats[name] == format:
        return weights.raw(name)
    assert format in FLOAT_BYTES, f"{name}: these weights do not give what they store as {format}"
    return float_tensor(weights.dense(name), format)
