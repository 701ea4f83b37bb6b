"""Truncated, corrupt and hostile files end in ModelFormatError, soon, and never in anything else."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.model.gguf import GgufWeights
from megakernel.model.load import open_model
from megakernel.model.safetensors import SafetensorsWeights
from megakernel.model.weights import ModelFormatError
from tests.megakernel.model.model_files import (
    gguf_metadata,
    random_tensors,
    tiny_shape,
    write_gguf,
    write_hf_folder,
)

OPTIONAL_KEYS = (
    "split.count",
    "llama.expert_count",
    "llama.attention.sliding_window",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "general.alignment",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.eot_token_id",
)
HEADER = struct.Struct("<4sIQQ")


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    shape = tiny_shape("llama", num_layers=1)
    write_gguf(path, shape, random_tensors(shape))
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "m"
    shape = tiny_shape("qwen2", num_layers=1)
    write_hf_folder(folder, shape, random_tensors(shape))
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@contextlib.contextmanager
def opens_or_is_refused(named: str) -> Iterator[None]:
    """Nothing happens, or a ModelFormatError that names `named`; any other exception goes through."""
    refusal = ""
    try:
        yield
    except ModelFormatError as error:
        refusal = str(error)
    assert not refusal or named in refusal


def _open_gguf(scratch: Path, data: bytes) -> None:
    path = scratch / "m.gguf"
    path.write_bytes(data)
    open_model(str(path))


@settings(deadline=None, max_examples=150)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_truncated_gguf(gguf_bytes: bytes, scratch: Path, fraction: float) -> None:
    cut = int(len(gguf_bytes) * fraction)
    with pytest.raises(ModelFormatError, match=r"truncated|empty|not a GGUF"):
        _open_gguf(scratch, gguf_bytes[:cut])


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_corrupt_gguf_header(gguf_bytes: bytes, scratch: Path, data: st.DataObject) -> None:
    """Any bytes anywhere in the header: opened, or refused by name."""
    corrupt = bytearray(gguf_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 12_000))
        corrupt[at : at + 4] = data.draw(st.binary(min_size=1, max_size=8))
    with opens_or_is_refused("m.gguf"):
        _open_gguf(scratch, bytes(corrupt))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_metadata_of_the_wrong_type(scratch: Path, data: st.DataObject) -> None:
    shape = tiny_shape("llama", num_layers=1)
    keys = [*gguf_metadata(shape), *OPTIONAL_KEYS]
    wrong = st.sampled_from([None, True, 7, -1.5, "", "text", [1, 2], ["a", "b"], [0.5], [True]])
    changes = data.draw(st.dictionaries(st.sampled_from(keys), wrong, min_size=1, max_size=2))
    path = scratch / "types.gguf"
    write_gguf(path, shape, random_tensors(shape), metadata=changes)
    with opens_or_is_refused("types.gguf"):
        open_model(str(path))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_corrupt_safetensors(folder: Path, scratch: Path, data: st.DataObject) -> None:
    sound = (folder / "model.safetensors").read_bytes()
    corrupt = bytearray(sound[: data.draw(st.sampled_from([len(sound), len(sound) // 2, 100]))])
    at = data.draw(st.integers(0, min(len(corrupt), 3_000)))
    corrupt[at : at + 4] = data.draw(st.binary(min_size=1, max_size=8))
    broken = scratch / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(bytes(corrupt))
    with opens_or_is_refused("broken"):
        SafetensorsWeights(broken)


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(
        ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    ),
    text=st.one_of(
        st.binary(max_size=40),
        st.sampled_from(
            [b"[]", b"3", b'"x"', b"{}", b"null", b'{"eos_token_id": "x"}', b'{"model": {"vocab": []}}']
        ),
        st.integers(1, 200_000).map(lambda depth: b"[" * depth),
    ),
)
def test_corrupt_json_in_a_folder(folder: Path, scratch: Path, name: str, text: bytes) -> None:
    broken = scratch / "json"
    broken.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / name).write_bytes(text)
    with opens_or_is_refused("json"):
        open_model(str(broken))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "empty"),
        (b"GG", "not a GGUF"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF"),
        (HEADER.pack(b"GGUF", 1, 0, 0), "version 1"),
        (HEADER.pack(b"GGUF", 3 << 24, 0, 0), "big-endian"),
        (HEADER.pack(b"GGUF", 3, 1 << 60, 0), "limits"),
        (HEADER.pack(b"GGUF", 3, 0, 1 << 60), "limits"),
        (HEADER.pack(b"GGUF", 3, 0, 0), "architecture None"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q", 1 << 62), "left"),
        # An array said to hold 2^62 bytes, one of as many strings, one of arrays.
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 0, 1 << 62), "left"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 1 << 62), "limit"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1), "type 9"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 77), "type 77"),
        (HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sI", 1, b"t", 9), "dimensions"),
        (HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQQIQ", 1, b"t", 2, 0, 5, 0, 0), "shape"),
        (HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 33, 2, 0), "multiple of 32"),
        (HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, 999, 0), "type 999"),
        (
            HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQQIQ", 1, b"t", 2, 1 << 63, 1 << 63, 0, 0),
            "truncated",
        ),
        (HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 1 << 63), "truncated"),
    ],
)
def test_hostile_gguf_is_refused_by_name(tmp_path: Path, data: bytes, named: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=named):
        GgufWeights(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="cannot read"):
        GgufWeights(tmp_path / "absent.gguf")
    with pytest.raises(ModelFormatError, match="cannot read"):
        GgufWeights(tmp_path)


def test_values_of_a_corrupt_body_are_still_numbers(gguf_bytes: bytes, tmp_path: Path) -> None:
    """Data bytes are not checked: a flipped bit there changes a value, never the shape."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes[:-64] + b"\xff" * 64)
    weights = GgufWeights(path)
    assert all(weights.dense(name).dtype == np.float32 for name in weights.names)
