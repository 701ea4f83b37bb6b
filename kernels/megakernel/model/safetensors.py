"""Weights from a Hugging Face folder: config.json and one or several safetensors files.

The container is read here rather than by its library, because that one has no bfloat16 in NumPy and
tells less of what is wrong: 8 bytes of header length, a JSON header, then the data.
"""

import json
import mmap
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.model.fingerprint import Fingerprint, Span
from megakernel.model.hf_config import shape_from_config, supported_architecture
from megakernel.model.names import HF_GLOBAL, HF_LAYER, check_tensors, our_name, refuse_unknown
from megakernel.model.shape import ModelShape
from megakernel.model.tokenizer import read_json
from megakernel.model.weights import ModelFormatError

ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER_BYTES = 100_000_000
MAX_FILES = 1024
KV_SCALE_SUFFIXES = (".k_scale", ".v_scale", ".kv_scale", ".kv_cache_scaling_factor")
"""Of a quantizer, for KV in 8 bits."""
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", *KV_SCALE_SUFFIXES)
"""Old exports carry RoPE's frequencies as a buffer; the config decides them. No KV has 8 bits here."""


class SafetensorsTensor(msgspec.Struct, frozen=True, kw_only=True):
    format: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


class SafetensorsFile:
    """One mapped file. Raises ModelFormatError from the constructor for anything wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFormatError(f"cannot read {path}: {error.strerror}") from None
        except ValueError:
            raise ModelFormatError(f"{path} is empty, not a safetensors file") from None
        header_bytes = int.from_bytes(self._bytes[:8], "little")
        self.header_bytes = 8 + header_bytes
        if len(self._bytes) < 8 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, len(self._bytes) - 8):
            raise ModelFormatError(f"{path} is not a safetensors file, or is truncated inside its header")
        self.tensors = self._read_header(self._bytes[8 : self.header_bytes])

    @property
    def size_bytes(self) -> int:
        return len(self._bytes)

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A read-only view of the mapped file; nothing is copied."""
        return np.frombuffer(self._bytes, dtype=np.uint8, count=num_bytes, offset=offset)

    def _read_header(self, raw: bytes) -> dict[str, SafetensorsTensor]:
        try:
            header = json.loads(raw)
            return {
                name: self._read_entry(name, entry)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, RecursionError, AttributeError) as error:
            if isinstance(error, ModelFormatError):
                raise
            raise ModelFormatError(f"{self.path}: the safetensors header is not a JSON object") from None

    def _read_entry(self, name: str, entry: Any) -> SafetensorsTensor:
        try:
            storage, dims, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            is_sound = all(type(n) is int and n >= 0 for n in (*dims, start, end)) and start <= end
        except (TypeError, KeyError, ValueError):
            is_sound = False
        if not is_sound:
            raise ModelFormatError(f"{self.path}: tensor `{name}` has a broken header entry")
        if storage in ELEMENT_BYTES and prod(dims) * ELEMENT_BYTES[storage] != end - start:
            raise ModelFormatError(
                f"{self.path}: tensor `{name}` of shape {dims} in {storage} cannot be {end - start} bytes"
            )
        if self.header_bytes + end > len(self._bytes):
            raise ModelFormatError(
                f"{self.path}: truncated: tensor `{name}` ends at byte {self.header_bytes + end}, "
                f"the file at {len(self._bytes)}; download or copy it again"
            )
        return SafetensorsTensor(
            format=str(storage), shape=tuple(dims), offset=self.header_bytes + start, num_bytes=end - start
        )


class _Stored(msgspec.Struct, frozen=True):
    file: SafetensorsFile
    tensor: SafetensorsTensor


class SafetensorsWeights:
    """`Weights` over the mapped files of one folder. Raises ModelFormatError for any misfit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config_path = folder / "config.json"
        config = read_json(self._config_path)
        # Before the tensors: a quantized or foreign model is named as such, not by its odd tensors.
        architecture = supported_architecture(self._config_path, config)
        self._files = [SafetensorsFile(path) for path in weight_files(folder)]
        self._stored = _named_tensors(folder, self._files, architecture)
        self._shape = shape_from_config(
            self._config_path,
            config,
            has_qkv_bias="layers.0.q_bias" in self._stored,
            has_head="head" in self._stored,
        )
        if self._shape.has_tied_head:
            self._stored.pop("head", None)
        check_tensors(
            str(folder), self._shape, {name: held.tensor.shape for name, held in self._stored.items()}
        )
        self._formats = {name: held.tensor.format for name, held in self._stored.items()}

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    @property
    def formats(self) -> Mapping[str, str]:
        return self._formats

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        held = self._stored[name]
        raw = held.file.view(held.tensor.offset, held.tensor.num_bytes)
        if held.tensor.format == "BF16":
            # bfloat16 is the upper half of a float32.
            values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view("<f4" if held.tensor.format == "F32" else "<f2").astype(np.float32)
        return values.reshape(held.tensor.shape)

    def fingerprint(self) -> str:
        fingerprint = Fingerprint()
        fingerprint.add_bytes(self._config_path.read_bytes())
        for file in self._files:
            spans = [Span(tensor.offset, tensor.num_bytes) for tensor in file.tensors.values()]
            fingerprint.add_file(file, file.header_bytes, spans)
        return fingerprint.digest()


def weight_files(folder: Path) -> list[Path]:
    """The index's files where there is an index, else every safetensors file in the folder."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelFormatError(
                f"{folder} has no *.safetensors file (PyTorch .bin files are not supported)"
            )
        return paths[:MAX_FILES]
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{index_path} has no `weight_map`")
    names = sorted({str(name) for name in weight_map.values()})
    if len(names) > MAX_FILES or any(Path(name).name != name for name in names):
        raise ModelFormatError(f"{index_path} must name at most {MAX_FILES} files, all in the same folder")
    return [folder / name for name in names]


def _named_tensors(folder: Path, files: list[SafetensorsFile], architecture: str) -> dict[str, _Stored]:
    named: dict[str, _Stored] = {}
    unknown: list[str] = []
    for file in files:
        for file_name, tensor in file.tensors.items():
            name = our_name(file_name, HF_GLOBAL, HF_LAYER, "model.layers.")
            if name is None:
                if not file_name.endswith(_IGNORED_SUFFIXES):
                    unknown.append(file_name)
                continue
            if name in named:
                raise ModelFormatError(
                    f"{file.path}: tensor `{file_name}` is in `{named[name].file.path}` too"
                )
            if tensor.format not in ELEMENT_BYTES:
                raise ModelFormatError(
                    f"{file.path}: tensor `{file_name}` is stored as {tensor.format}, which is not "
                    f"supported; supported: {', '.join(ELEMENT_BYTES)}"
                )
            named[name] = _Stored(file, tensor)
    refuse_unknown(str(folder), unknown, architecture)
    return named
