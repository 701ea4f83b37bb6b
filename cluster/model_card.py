"""What the whole cluster knows of the served model. The weights are the workers' own affair."""

import msgspec


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a router needs to turn a request into tokens, without the weights."""

    name: str
    """The id users send as `model`."""
    architecture: str
    fingerprint: str
    """Of weights file and shape: two workers with different fingerprints never share KV."""
    vocab_size: int
    max_context_tokens: int
    bos_token_id: int | None
    add_bos_token: bool
    """Whether plain text is encoded with BOS in front (chat templates write their own)."""
    eos_token_ids: tuple[int, ...]
    """Any of these ends a generation: end of text, and end of turn where the model has one."""
    chat_template: str | None
    bos_token: str
    eos_token: str
    created_unix_s: int
    num_parameters: int
    quantization: str


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A card with its tokenizer, as one value that can be sent to any process."""

    card: ModelCard
    tokenizer_json: bytes
    """Serialised form of the `tokenizers` library."""
