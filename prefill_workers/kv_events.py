"""TensorRT-LLM's KV-cache events, read as chain hashes of the placement index. Pure: no I/O, no thread.

The engine's blocks and the index's need not be of one size. A block of the index is held while the engine's
block with its last token is: what the engine's blocks before it leave over is carried along. So one of 32
tokens is two of 16, and every second is one of 64. Where the engine's are the longer ones, a prompt that ends
inside of one counts up to a block of it more than the engine will reuse.

An event that is missing may have been any: everything announced is withdrawn then, and what the engine stored
before is not known again until it stores it anew. So it is after an event that cannot be read, and where more
blocks are said to be stored than there can be.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from cluster.block_changes import BlockChanges
from cluster.block_hash import chain_salt, hash_block
from cluster.ids import ChainHash
from prefill_workers.held_hashes import HeldHashes

_log = logging.getLogger(__name__)

EngineHash = int | str
"""What the engine calls a block by: it says nothing to us."""


class _Token(msgspec.Struct, frozen=True):
    token_id: int


class _Block(msgspec.Struct, frozen=True):
    block_hash: EngineHash
    tokens: tuple[_Token, ...]
    cache_salt: str | msgspec.UnsetType | None = msgspec.UNSET
    """Versions up to 1.2 do not say."""


class _Created(msgspec.Struct, frozen=True, tag="created"):
    pass


class _Stored(msgspec.Struct, frozen=True, tag="stored"):
    parent_hash: EngineHash | None
    blocks: tuple[_Block, ...]
    """Each the parent of the next."""


class _Removed(msgspec.Struct, frozen=True, tag="removed"):
    block_hashes: tuple[EngineHash, ...]


class _Updated(msgspec.Struct, frozen=True, tag="updated"):
    """Its level or priority: it can be reused from any."""


class _Event(msgspec.Struct, frozen=True):
    event_id: int
    data: _Created | _Stored | _Removed | _Updated


class _Held(msgspec.Struct, frozen=True, eq=False):
    """One of the engine's blocks, or a root."""

    last_hash: ChainHash
    """Of the last block of the index that ends here or before; the salt, where none does."""
    rest: tuple[int, ...]
    """The tokens behind that block's end."""
    hashes: tuple[ChainHash, ...] = ()
    """Of the index's blocks that end in this one."""


class KvEvents:
    """What the engine's prefix cache holds, as far as its events tell; a part of that after a gap."""

    def __init__(
        self, layout_fingerprint: str, *, engine_block_tokens: int, index_block_tokens: int, max_blocks: int
    ) -> None:
        """`max_blocks`: more are not remembered, of the engine's; at least those of its pool."""
        self._fingerprint = layout_fingerprint
        self._engine_block_tokens = engine_block_tokens
        self._index_block_tokens = index_block_tokens
        self._max_blocks = max_blocks
        self._next_id: int | None = None
        self._blocks: dict[EngineHash, _Held] = {}
        self._hashes = HeldHashes()
        self._tenants: OrderedDict[tuple[int, ...], str | None] = OrderedDict()
        """By a prompt's first block, who asked for it; None where several did. The last `max_blocks`."""

    def note_prompt(self, token_ids: Sequence[int], tenant: str) -> None:
        """Before its events come: of versions that name no salt, they are told apart by this."""
        first = tuple(token_ids[: self._engine_block_tokens])
        if len(first) < self._engine_block_tokens:
            return
        earlier = self._tenants.pop(first, tenant)
        self._tenants[first] = tenant if earlier == tenant else None
        if len(self._tenants) > self._max_blocks:
            self._tenants.popitem(last=False)

    def take(self, events: Iterable[object]) -> None:
        """In their order, as `LLM.get_kv_cache_events` gives them."""
        for event in events:
            try:
                read = msgspec.convert(event, _Event)
            except msgspec.ValidationError as error:
                self._begin_anew(f"a KV-cache event cannot be read: {error}")
                self._next_id = None
                continue
            if self._next_id is not None and read.event_id != self._next_id:
                self._begin_anew(f"KV-cache event {read.event_id} came for {self._next_id}")
            self._next_id = read.event_id + 1
            self._apply(read.data)

    def drain_changes(self) -> BlockChanges:
        return self._hashes.drain_changes()

    def all_hashes(self) -> list[ChainHash]:
        return self._hashes.all_hashes()

    def _apply(self, data: _Created | _Stored | _Removed | _Updated) -> None:
        match data:
            case _Created():
                self._withdraw_all()
            case _Stored():
                self._store(data)
                if len(self._blocks) > self._max_blocks:
                    self._begin_anew(f"more than {self._max_blocks} KV blocks are said to be stored")
            case _Removed():
                for engine_hash in data.block_hashes:
                    # Unknown: partial, stored before a gap, or whose it was could not be told.
                    if (block := self._blocks.pop(engine_hash, None)) is not None:
                        self._hashes.remove(block.hashes)
            case _Updated():
                pass

    def _store(self, stored: _Stored) -> None:
        if not stored.blocks:
            return
        parent = (
            self._root(stored.blocks[0])
            if stored.parent_hash is None
            else self._blocks.get(stored.parent_hash)
        )
        for block in stored.blocks:
            # The engine reuses no part of a block, and a partial one has no children.
            if parent is None or len(block.tokens) != self._engine_block_tokens:
                return
            held = self._blocks.get(block.block_hash)
            if held is None:
                held = self._blocks[block.block_hash] = self._child(parent, block)
                self._hashes.add(held.hashes)
            parent = held

    def _root(self, first: _Block) -> _Held | None:
        tenant: str | None = first.cache_salt or ""
        if first.cache_salt is msgspec.UNSET:
            tenant = self._tenants.get(tuple(token.token_id for token in first.tokens))
        return None if tenant is None else _Held(chain_salt(self._fingerprint, tenant), ())

    def _child(self, parent: _Held, block: _Block) -> _Held:
        size = self._index_block_tokens
        tokens = parent.rest + tuple(token.token_id for token in block.tokens)
        last_hash, hashes = parent.last_hash, list[ChainHash]()
        end = len(tokens) - len(tokens) % size
        for start in range(0, end, size):
            last_hash = hash_block(last_hash, tokens[start : start + size])
            hashes.append(last_hash)
        return _Held(last_hash, tokens[end:], tuple(hashes))

    def _begin_anew(self, why: str) -> None:
        _log.warning("%s: withdrawing %d cached KV blocks from placement", why, len(self._blocks))
        self._withdraw_all()

    def _withdraw_all(self) -> None:
        self._blocks.clear()
        self._hashes.clear()
