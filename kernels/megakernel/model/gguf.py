"""Weights from a GGUF file, dequantized a tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from megakernel.model.fingerprint import Fingerprint, Span
from megakernel.model.gguf_file import GgufFile, GgufTensor, Metadata
from megakernel.model.names import (
    GGUF_GLOBAL,
    GGUF_LAYER,
    SUPPORTED_ARCHITECTURES,
    check_tensors,
    our_name,
    refuse_unknown,
)
from megakernel.model.rope import base_frequencies, llama3_divisors
from megakernel.model.shape import ModelShape, RopeScaling
from megakernel.model.weights import ModelFormatError, RawTensor, shown

ROPE_FACTORS = "rope_freqs.weight"
_IGNORED_TENSORS = frozenset({ROPE_FACTORS})
_PERMUTED = ("q", "k", "q_bias", "k_bias")
_MAX_SIZE = 1 << 24
"""No dimension of a model that fits a machine comes near it."""

SUPPORTED_FORMATS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS"),
    *("IQ2_XXS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4"),
)
"""All that `gguf.dequantize` has a rule for, but what no Llama-family file uses."""


class GgufWeights:
    """`Weights` over one mapped file. Raises ModelFormatError from the constructor for any misfit."""

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        self.path = path
        self._tensors = _named_tensors(self.file)
        self._shape = _read_shape(self.file, self._tensors)
        check_tensors(str(path), self._shape, {name: tensor.shape for name, tensor in self._tensors.items()})
        self._formats = {name: tensor.format.name for name, tensor in self._tensors.items()}

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    @property
    def formats(self) -> Mapping[str, str]:
        return self._formats

    def raw(self, name: str) -> RawTensor:
        """The stored bytes, for who keeps the format. Blocks run along a row, so permuting rows is exact."""
        tensor = self._tensors[name]
        rows = self.file.rows(tensor)
        if len(tensor.shape) > 1 and (order := self._row_order(name)) is not None:
            rows = rows[order]
        return RawTensor(format=tensor.format.name, shape=tensor.shape, data=rows)

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self._tensors[name]
        values: npt.NDArray[np.float32] = gguf.dequantize(self.raw(name).data, tensor.format)
        if not values.flags.writeable:
            values = values.copy()  # F32 comes as a view of the mapped file
        values = values.reshape(tensor.shape)
        if len(tensor.shape) == 1 and (order := self._row_order(name)) is not None:
            values = values[order]
        return values

    def fingerprint(self) -> str:
        """Of the file's content (see `fingerprint`), not of its path."""
        fingerprint = Fingerprint()
        spans = [Span(tensor.offset, tensor.num_bytes) for tensor in self.file.tensors.values()]
        fingerprint.add_file(self.file, self.file.header_bytes, spans)
        return fingerprint.digest()

    def _row_order(self, name: str) -> npt.NDArray[np.intp] | None:
        """Which file row each of our rows is, where the architecture's file order is interleaved RoPE."""
        part = name.rpartition(".")[2]
        if self._shape.architecture != "llama" or part not in _PERMUTED:
            return None
        num_heads = self._shape.num_heads if part.startswith("q") else self._shape.num_kv_heads
        return half_split_rows(num_heads, self._shape.head_dim)


def half_split_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """For each row in half-split order (pair i is rows i, i + head_dim / 2), its row in interleaved order."""
    interleaved = np.arange(num_heads * head_dim, dtype=np.intp).reshape(num_heads, head_dim // 2, 2)
    return interleaved.swapaxes(1, 2).reshape(-1)


def _named_tensors(file: GgufFile) -> dict[str, GgufTensor]:
    """Our names; raises for an unsupported architecture, an unknown tensor, or an unsupported format."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in SUPPORTED_ARCHITECTURES:
        raise ModelFormatError(
            f"{file.path}: architecture {shown(architecture)} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if _Fields(file.path, file.metadata, "split").count("count") > 1:
        raise ModelFormatError(
            f"{file.path} is one part of a split GGUF; merge the parts into one file first"
        )
    if _Fields(file.path, file.metadata, architecture).count("expert_count"):
        raise ModelFormatError(f"{file.path}: mixture-of-experts models are not supported; dense models are")
    named: dict[str, GgufTensor] = {}
    unknown: list[str] = []
    for tensor in file.tensors.values():
        name = our_name(tensor.name, GGUF_GLOBAL, GGUF_LAYER, "blk.")
        if name is not None:
            _check_format(file.path, tensor)
            named[name] = tensor
        elif tensor.name not in _IGNORED_TENSORS:
            unknown.append(tensor.name)
    refuse_unknown(str(file.path), unknown, architecture)
    return named


def _check_format(path: Path, tensor: GgufTensor) -> None:
    if tensor.format.name not in SUPPORTED_FORMATS:
        raise ModelFormatError(
            f"{path}: tensor `{tensor.name}` is stored as {tensor.format.name}, which is not supported; "
            f"supported: {', '.join(SUPPORTED_FORMATS)}"
        )


class _Fields:
    """Typed look-ups under one prefix; every miss is a ModelFormatError that names the key."""

    def __init__(self, path: Path, metadata: Metadata, prefix: str) -> None:
        self.path = path
        self._metadata = metadata
        self._prefix = prefix

    def get(self, key: str) -> Any:
        return self._metadata.get(f"{self._prefix}.{key}")

    def fail(self, key: str, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: metadata `{self._prefix}.{key}` {problem}")

    def count(self, key: str) -> int:
        """A non-negative integer; absent is 0."""
        value = self.get(key)
        if value is None:
            return 0
        if type(value) is not int or value < 0:
            raise self.fail(key, f"is {shown(value)}; it must be a non-negative integer")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer, or an array of one and the same integer for each layer."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, np.ndarray):
            raise self.fail(key, "differs from layer to layer, which is not supported")
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise self.fail(key, f"is {shown(value)}; it must be an integer from 1 to {_MAX_SIZE}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.fail(key, f"is {shown(value)}; it must be a positive number")
        return float(value)


def _read_shape(file: GgufFile, tensors: Mapping[str, GgufTensor]) -> ModelShape:
    architecture: str = file.metadata["general.architecture"]
    fields = _Fields(file.path, file.metadata, architecture)
    hidden_size = fields.size("embedding_length")
    num_heads = fields.size("attention.head_count")
    num_kv_heads = fields.size("attention.head_count_kv", num_heads)
    rope_dim = fields.size("rope.dimension_count", max(hidden_size // num_heads, 1))
    head_dim = fields.size("attention.key_length", rope_dim)
    value_dim = fields.size("attention.value_length", head_dim)
    if value_dim != head_dim or rope_dim != head_dim or head_dim % 2:
        raise ModelFormatError(
            f"{file.path}: keys of {head_dim}, values of {value_dim} and RoPE over {rope_dim} dimensions; "
            "supported is one even size for all three"
        )
    if num_heads % num_kv_heads:
        raise fields.fail(
            "attention.head_count_kv", f"is {num_kv_heads}, which does not divide {num_heads} heads"
        )
    max_context_tokens = fields.size("context_length")
    if 0 < fields.count("attention.sliding_window") < max_context_tokens:
        raise fields.fail("attention.sliding_window", "is set; sliding-window attention is not supported")
    embed = tensors.get("embed")
    if embed is None:
        raise ModelFormatError(f"{file.path}: tensor `token_embd.weight` is missing")
    rope_theta = fields.positive("rope.freq_base", 10_000.0)
    scaling, divisors = _read_rope_scaling(file, fields, head_dim, rope_theta)
    return ModelShape(
        architecture=architecture,
        num_layers=fields.size("block_count"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=embed.shape[0],
        max_context_tokens=max_context_tokens,
        rope_theta=rope_theta,
        rope_scaling=scaling,
        rope_divisors=divisors,
        rms_norm_eps=fields.positive("attention.layer_norm_rms_epsilon"),
        has_qkv_bias="layers.0.q_bias" in tensors or architecture == "qwen2",
        has_qk_norm=architecture == "qwen3",
        has_tied_head="head" not in tensors,
    )


def _read_rope_scaling(
    file: GgufFile, fields: _Fields, head_dim: int, rope_theta: float
) -> tuple[RopeScaling | None, tuple[float, ...] | None]:
    """The file's factors as Llama 3's rule where they are that, else as plain divisors."""
    kind = fields.get("rope.scaling.type")
    kind = "none" if kind is None else kind
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        raise fields.fail(
            "rope.scaling.type", f"is {shown(kind)}; supported: none, linear, and `{ROPE_FACTORS}`"
        )
    factor = fields.positive("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    divisors = np.full(head_dim // 2, factor)
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is not None:
        if tensor.shape != (head_dim // 2,) or tensor.format != GGMLQuantizationType.F32:
            raise ModelFormatError(
                f"{file.path}: tensor `{ROPE_FACTORS}` is {list(tensor.shape)} in {tensor.format.name}; "
                f"it must be [{head_dim // 2}] in F32"
            )
        divisors = divisors * file.rows(tensor).view("<f4")[0]
        if not (np.isfinite(divisors) & (divisors > 0)).all():
            raise ModelFormatError(f"{file.path}: tensor `{ROPE_FACTORS}` holds values that are not positive")
    if (divisors == 1.0).all():
        return None, None
    scaling = _as_llama3(divisors, base_frequencies(head_dim, rope_theta))
    return (scaling, None) if scaling is not None else (None, tuple(divisors.tolist()))


def _as_llama3(divisors: npt.NDArray[np.float64], frequencies: npt.NDArray[np.float64]) -> RopeScaling | None:
    """Llama 3.1 to 3.3 differ in the factor alone; anything else stays a list of divisors."""
    scaling = RopeScaling(
        factor=float(divisors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    return scaling if np.allclose(llama3_divisors(scaling, frequencies), divisors, rtol=1e-5) else None
