"""Ref-counted KV blocks and the prefix cache over them. Pure bookkeeping: it holds ids, never KV.

Who owns a block id, and what may be done to its slots:

| state     | references | cached | slots                                                       |
|-----------|------------|--------|-------------------------------------------------------------|
| free      | 0          | no     | nobody reads or writes them                                 |
| private   | >= 1       | no     | its one holder writes them                                  |
| shared    | >= 1       | yes    | published tokens are read-only; the publisher may append    |
| evictable | 0          | yes    | read-only until matched again, or evicted in LRU order      |

A cached block's parent is always cached too, or is the root (a salt): evicting a block drops its
descendants from the cache with it, since no match could reach them. Not thread-safe: one thread
owns a pool.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

import msgspec

from cluster.block_changes import BlockChanges, ChangeLog
from cluster.block_hash import hash_block
from cluster.ids import ChainHash

MAX_TAIL_CANDIDATES = 8
"""Blocks compared token by token when a prefix ends inside a block: the newest that start alike."""


class OutOfBlocksError(Exception):
    """Fewer blocks are free or evictable than asked for. Nothing changed; handled by admission."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} KV blocks needed, {free} free")
        self.needed = needed
        self.free = free


class PrefixMatch(msgspec.Struct, frozen=True, kw_only=True):
    """What the cache holds of a prefix. The caller owns one reference on every block named here."""

    block_ids: tuple[int, ...]
    """Full blocks: KV of tokens [0, num_tokens). Read-only."""
    num_tokens: int
    tail_block: int | None
    """Copy-on-write: copy its first `tail_tokens` slots into a block of your own, then release it."""
    tail_tokens: int
    """Tokens [num_tokens, num_tokens + tail_tokens) are the first of `tail_block`."""


class _CachedBlock(msgspec.Struct, frozen=True):
    parent: ChainHash
    token_ids: tuple[int, ...]
    chain_hash: ChainHash | None
    """None: a partial block, the tail of some sequence. It has no children."""


class BlockPool:
    """Hands out block ids [0, num_blocks); every operation is O(blocks it names), eviction amortised."""

    def __init__(self, num_blocks: int, block_size_tokens: int) -> None:
        assert num_blocks > 0, num_blocks
        assert block_size_tokens > 0, block_size_tokens
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[int, _CachedBlock] = {}
        self._by_hash: dict[ChainHash, int] = {}
        # parent -> first token -> blocks, oldest first.
        self._children: dict[ChainHash, dict[int, dict[int, None]]] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._changes = ChangeLog()

    @property
    def num_free_blocks(self) -> int:
        """What `allocate` could hand out now: free and evictable blocks."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    def match_prefix(self, token_ids: Sequence[int], salt: ChainHash, limit_tokens: int) -> PrefixMatch:
        """The longest cached prefix of `token_ids[:limit_tokens]`; takes a reference on each block."""
        limit = min(limit_tokens, len(token_ids))
        size = self.block_size_tokens
        parent, block_ids, start = salt, list[int](), 0
        while start + size <= limit:
            chain_hash = hash_block(parent, token_ids[start : start + size])
            block_id = self._by_hash.get(chain_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
            parent, start = chain_hash, start + size
        tail_block, tail_tokens = self._longest_tail(parent, token_ids[start : min(limit, start + size)])
        self.retain(block_ids)
        if tail_block is not None:
            self.retain((tail_block,))
        return PrefixMatch(
            block_ids=tuple(block_ids), num_tokens=start, tail_block=tail_block, tail_tokens=tail_tokens
        )

    def allocate(self, count: int) -> list[int]:
        """`count` private blocks, one reference each. Raises OutOfBlocksError, having changed nothing."""
        if count > self.num_free_blocks:
            raise OutOfBlocksError(needed=count, free=self.num_free_blocks)
        while len(self._free) < count:
            self._uncache(next(iter(self._evictable)))
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._references[block_id] = 1
        return block_ids

    def retain(self, block_ids: Sequence[int]) -> None:
        """One more reference on each block; it must be held already, or cached."""
        for block_id in block_ids:
            assert self._references[block_id] or block_id in self._cached, f"block {block_id} is free"
            self._references[block_id] += 1
            self._evictable.pop(block_id, None)

    def release(self, block_ids: Sequence[int]) -> None:
        """Give one reference on each back; give a chain in its order, so that its end is evicted first."""
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, f"block {block_id} is not held"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                if block_id in self._cached:
                    self._evictable[block_id] = None
                else:
                    self._free.append(block_id)

    def publish(self, token_ids: Sequence[int], block_ids: Sequence[int], salt: ChainHash) -> None:
        """Offer the KV of `token_ids`, held in `block_ids` in order, to later matches.

        Full blocks and the partial tail alike. The caller keeps its references, must not rewrite the
        published slots, and may publish again when more tokens are in. Where the same tokens are
        cached already, the first publisher's block stays and ours becomes free when released.
        """
        size = self.block_size_tokens
        assert len(block_ids) * size >= len(token_ids), f"{len(block_ids)} blocks, {len(token_ids)} tokens"
        parent = salt
        num_full = len(token_ids) // size
        for index in range(num_full):
            block_tokens = tuple(token_ids[index * size : (index + 1) * size])
            chain_hash = hash_block(parent, block_tokens)
            if chain_hash not in self._by_hash:
                self._cache(block_ids[index], _CachedBlock(parent, block_tokens, chain_hash))
            parent = chain_hash
        tail = tuple(token_ids[num_full * size :])
        if tail and self._longest_tail(parent, tail)[1] < len(tail):
            self._cache(block_ids[num_full], _CachedBlock(parent, tail, None))

    def drain_changes(self) -> BlockChanges:
        """Chain hashes that entered or left the cache since the last drain, for the placement index."""
        return self._changes.drain()

    def all_hashes(self) -> list[ChainHash]:
        """Of every cached full block: what a worker publishes when it registers anew."""
        return list(self._by_hash)

    def _longest_tail(self, parent: ChainHash, token_ids: Sequence[int]) -> tuple[int | None, int]:
        """The child of `parent` that shares most leading tokens with `token_ids`, the newest of equals."""
        best_block, best_length = None, 0
        for block_id in self._candidates(parent, token_ids[0]) if token_ids else ():
            length = _common_length(self._cached[block_id].token_ids, token_ids)
            if length > best_length:
                best_block, best_length = block_id, length
        return best_block, best_length

    def _candidates(self, parent: ChainHash, first_token: int) -> list[int]:
        siblings = self._children.get(parent, {}).get(first_token, {})
        return list(islice(reversed(siblings), MAX_TAIL_CANDIDATES))

    def _cache(self, block_id: int, entry: _CachedBlock) -> None:
        assert self._references[block_id] > 0, f"block {block_id} is published but not held"
        earlier = self._cached.get(block_id)
        if earlier is not None:
            # The publisher appended to the tail that it had published before.
            assert earlier.chain_hash is None, f"block {block_id} is full and cached already"
            assert earlier.token_ids == entry.token_ids[: len(earlier.token_ids)], (
                f"block {block_id} rewritten"
            )
            self._uncache(block_id)
        for other in self._candidates(entry.parent, entry.token_ids[0]):
            # A partial block that the new one extends can never be the better match again.
            if _is_extended_by(self._cached[other], entry):
                self._uncache(other)
        self._children.setdefault(entry.parent, {}).setdefault(entry.token_ids[0], {})[block_id] = None
        self._cached[block_id] = entry
        if entry.chain_hash is not None:
            self._by_hash[entry.chain_hash] = block_id
            self._changes.note_stored(entry.chain_hash)

    def _uncache(self, block_id: int) -> None:
        """Drop a block and its descendants from the cache; those without references become free."""
        pending = [block_id]
        while pending:
            current = pending.pop()
            entry = self._cached.pop(current)
            self._forget_child(entry, current)
            if entry.chain_hash is not None:
                del self._by_hash[entry.chain_hash]
                self._changes.note_removed(entry.chain_hash)
                for siblings in self._children.get(entry.chain_hash, {}).values():
                    pending.extend(siblings)
            if self._references[current] == 0:
                del self._evictable[current]
                self._free.append(current)

    def _forget_child(self, entry: _CachedBlock, block_id: int) -> None:
        by_token = self._children[entry.parent]
        siblings = by_token[entry.token_ids[0]]
        del siblings[block_id]
        if not siblings:
            del by_token[entry.token_ids[0]]
            if not by_token:
                del self._children[entry.parent]

    def check(self) -> None:
        """Assert every invariant of the table above; O(pool), for tests."""
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._cached.keys(), "a free block is cached"
        for block_id, references in enumerate(self._references):
            assert references >= 0, f"block {block_id} has {references} references"
            is_cached = block_id in self._cached
            assert (block_id in free) == (references == 0 and not is_cached), f"block {block_id} leaked"
            assert (block_id in evictable) == (references == 0 and is_cached), f"block {block_id} leaked"
        for block_id, entry in self._cached.items():
            assert block_id in self._children[entry.parent][entry.token_ids[0]], (
                f"block {block_id} unreachable"
            )
            if entry.chain_hash is None:
                assert 0 < len(entry.token_ids) < self.block_size_tokens, f"block {block_id} is not partial"
            else:
                assert self._by_hash[entry.chain_hash] == block_id, f"block {block_id} is not under its hash"
                assert hash_block(entry.parent, entry.token_ids) == entry.chain_hash
        listed = [b for tokens in self._children.values() for blocks in tokens.values() for b in blocks]
        assert len(listed) == len(self._cached), "children of evicted blocks leaked"
        assert len(self._by_hash) == sum(e.chain_hash is not None for e in self._cached.values())
        self._changes.check()


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def _is_extended_by(cached: _CachedBlock, entry: _CachedBlock) -> bool:
    return cached.chain_hash is None and cached.token_ids == entry.token_ids[: len(cached.token_ids)]
