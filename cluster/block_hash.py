"""Chain hashes of full KV blocks: equal hash, equal prefix, equal model, equal tenant.

BLAKE2b rather than a fast non-cryptographic hash, because a prompt comes from outside: a crafted
collision would serve one prompt's KV for another's. About one microsecond a block.
"""

import hashlib
from array import array
from collections.abc import Sequence

from cluster.ids import ChainHash

HASH_BYTES = 16


def chain_salt(layout_fingerprint: str, tenant: str) -> ChainHash:
    """The root's parent. Tenants never share a chain, so cache timing tells nothing of another's prompts."""
    digest = hashlib.blake2b(f"{layout_fingerprint}\0{tenant}".encode(), digest_size=HASH_BYTES)
    return ChainHash(digest.digest())


def hash_block(parent: ChainHash, token_ids: Sequence[int]) -> ChainHash:
    """One full block's hash; `token_ids` are the block's tokens, in order."""
    return ChainHash(
        hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=HASH_BYTES, key=parent).digest()
    )


def chain_hashes(token_ids: Sequence[int], block_size_tokens: int, salt: ChainHash) -> list[ChainHash]:
    """Hashes of the full blocks of `token_ids`, first to last; a partial last block has none."""
    hashes: list[ChainHash] = []
    parent = salt
    for start in range(0, len(token_ids) - block_size_tokens + 1, block_size_tokens):
        parent = hash_block(parent, token_ids[start : start + block_size_tokens])
        hashes.append(parent)
    return hashes
