"""What enters and leaves the pool's prefix cache, as the serializer of events puts it."""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from cluster.block_hash import hash_block
from cluster.block_pool import BlockPool
from cluster.ids import ChainHash


class KvEvents:
    def __init__(self, blocks: BlockPool, max_events: int, *, names_salts: bool) -> None:
        self._blocks = blocks
        self._names_salts = names_salts
        self._next_id = 0
        self._events: deque[dict[str, Any]] = deque(maxlen=max_events)
        """The oldest go where nobody fetches them."""
        self._changed = threading.Condition()
        self._put({"type": "created", "num_blocks_per_cache_level": [blocks.num_blocks, 0]})

    def evicted(self) -> None:
        if hashes := self._blocks.drain_changes().removed:
            self._put({"type": "removed", "block_hashes": [_number(one) for one in hashes]})

    def published(self, tokens: Sequence[int], root: ChainHash, cache_salt: str | None) -> None:
        stored, size = set(self._blocks.drain_changes().stored), self._blocks.block_size_tokens
        parent, run, run_parent = root, list[dict[str, Any]](), root
        for start in range(0, len(tokens) - size + 1, size):
            block = list(tokens[start : start + size])
            chain_hash = hash_block(parent, block)
            if chain_hash in stored:
                run_parent = run_parent if run else parent
                run.append(self._block(chain_hash, block, cache_salt))
            parent = chain_hash
        if run:
            self._put(
                {
                    "type": "stored",
                    "parent_hash": None if run_parent == root else _number(run_parent),
                    "blocks": run,
                }
            )

    def get(self, timeout_s: float | None) -> list[dict[str, Any]]:
        with self._changed:
            self._changed.wait_for(lambda: self._events, timeout_s)
            events = list(self._events)
            self._events.clear()
            return events

    def _put(self, data: dict[str, Any]) -> None:
        with self._changed:
            self._events.append({"event_id": self._next_id, "data": data, "window_size": 4096})
            self._next_id += 1
            self._changed.notify_all()

    def _block(self, chain_hash: ChainHash, tokens: list[int], cache_salt: str | None) -> dict[str, Any]:
        unique = [{"type": "unique_token", "token_id": one, "token_extra_id": 0} for one in tokens]
        block: dict[str, Any] = {
            "type": "stored_block",
            "block_hash": _number(chain_hash),
            "tokens": unique,
            "cache_level": 0,
            "priority": 35,
        }
        return {**block, "cache_salt": cache_salt} if self._names_salts else block


def _number(chain_hash: ChainHash) -> int:
    return int.from_bytes(chain_hash[:8], "little")
