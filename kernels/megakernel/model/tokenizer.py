"""A model's tokenizer as one record, whichever file it came from.

`tokenizer_json` is the serialised form of the `tokenizers` library, which this package only writes;
who encodes and decodes with it lives elsewhere.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from megakernel.model.weights import ModelFormatError, shown

END_OF_TURN_TEXTS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
)
"""Where a vocabulary has one of these as a control token, it ends a generation."""

MAX_JSON_BYTES = 256 * 1024 * 1024


class TokenizerSpec(msgspec.Struct, frozen=True, kw_only=True):
    tokenizer_json: bytes
    num_tokens: int
    """One more than the highest id."""
    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    eot_token_id: int | None
    """End of turn, where it is not the end of text."""
    eos_token_ids: tuple[int, ...]
    """Any of these ends a generation; sorted."""
    add_bos: bool
    """Plain text is encoded with BOS in front (a chat template writes its own)."""
    bos_token: str
    eos_token: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises ModelFormatError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFormatError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFormatError):
            raise
        raise ModelFormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def tokenizer_from_folder(folder: Path) -> TokenizerSpec:
    """From tokenizer.json, tokenizer_config.json, generation_config.json and config.json of a HF folder."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelFormatError(
            f"{folder} has no tokenizer.json; supported: the serialised form of the `tokenizers` library "
            "(save the tokenizer with its fast implementation to get one)"
        )
    document = read_json(path)
    ids = _token_ids(path, document)
    special = _special_texts(document)
    config = _optional_json(folder / "tokenizer_config.json")
    bos_token, eos_token = _token_text(config.get("bos_token")), _token_text(config.get("eos_token"))
    bos_id, eos_id = ids.get(bos_token or ""), ids.get(eos_token or "")
    ends = {ids[text] for text in END_OF_TURN_TEXTS if text in special}
    for source in ("generation_config.json", "config.json"):
        ends.update(_listed_ids(folder / source, len(ids)))
    if eos_id is not None:
        ends.add(eos_id)
    return TokenizerSpec(
        tokenizer_json=path.read_bytes(),
        num_tokens=max(ids.values(), default=-1) + 1,
        chat_template=_folder_template(folder, config),
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        eot_token_id=next((ids[t] for t in END_OF_TURN_TEXTS[:2] if t in special and ids[t] != eos_id), None),
        eos_token_ids=tuple(sorted(ends)),
        add_bos=bos_id is not None and _adds_bos(document, config, bos_token or ""),
        bos_token=bos_token or "",
        eos_token=eos_token or "",
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_ids(path: Path, document: Mapping[str, Any]) -> dict[str, int]:
    """Vocabulary and added tokens by text."""
    model = document.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
    ):
        kind = model.get("type") if isinstance(model, dict) else None
        raise ModelFormatError(f"{path}: tokenizer model {shown(kind)} is not supported; BPE is")
    added = document.get("added_tokens") or []
    try:
        ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    except (TypeError, KeyError):
        raise ModelFormatError(f"{path}: `added_tokens` must be objects with `content` and `id`") from None
    if not all(type(value) is int and value >= 0 for value in ids.values()):
        raise ModelFormatError(f"{path}: token ids must be non-negative integers")
    return ids


def _special_texts(document: Mapping[str, Any]) -> set[str]:
    return {token["content"] for token in document.get("added_tokens") or [] if token.get("special")}


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json writes a token as text or as an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _listed_ids(path: Path, num_tokens: int) -> set[int]:
    """`eos_token_id` of a config file: absent, one id, or a list."""
    value = _optional_json(path).get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= 0 for item in values):
        raise ModelFormatError(f"{path}: `eos_token_id` is {shown(value)}; it must be an id or a list of ids")
    return {item for item in values if item < num_tokens}


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's only or `default` template."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFormatError(f"cannot read {file}: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _adds_bos(document: Mapping[str, Any], config: Mapping[str, Any], bos_token: str) -> bool:
    """tokenizer_config.json's word where it has one, else whether the post-processor writes BOS first."""
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    post = document.get("post_processor") or {}
    steps = post.get("processors", [post]) if isinstance(post, dict) else []
    for step in steps:
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(single, list) and single and isinstance(single[0], dict):
            return bool((single[0].get("SpecialToken") or {}).get("id") == bos_token)
    return False
