"""The shape of KV, agreed between who writes it and who reads it."""

import hashlib
from typing import Literal

import msgspec

KvDtype = Literal["float32", "float16", "bfloat16"]

BYTES_PER_ELEMENT: dict[KvDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """What two workers must agree on before KV may pass between them.

    On the wire, one layer of a run of tokens is K then V, each `[tokens, num_kv_heads, head_dim]`
    in C order, so runs of tokens concatenate whatever either end's block size is.
    """

    model_fingerprint: str
    """Of weights and shape: KV of two different models never mixes (`ModelCard.fingerprint`)."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KvDtype
    block_size_tokens: int

    @property
    def bytes_per_token_layer(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * BYTES_PER_ELEMENT[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.bytes_per_token_layer

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that must match; block size is each end's own affair."""
        facts = (
            f"kv1|{self.model_fingerprint}|{self.num_layers}|{self.num_kv_heads}|{self.head_dim}|{self.dtype}"
        )
        return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)
