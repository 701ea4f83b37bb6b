"""Which chain hashes a prefix cache holds, and what changed since somebody last asked."""

from collections.abc import Iterable

from cluster.block_changes import BlockChanges, ChangeLog
from cluster.ids import ChainHash


class HeldHashes:
    """A hash is held as often as it was added. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._counts: dict[ChainHash, int] = {}
        self._changes = ChangeLog()

    def add(self, hashes: Iterable[ChainHash]) -> None:
        for chain_hash in hashes:
            count = self._counts.get(chain_hash, 0)
            self._counts[chain_hash] = count + 1
            if count == 0:
                self._changes.note_stored(chain_hash)

    def remove(self, hashes: Iterable[ChainHash]) -> None:
        for chain_hash in hashes:
            self._counts[chain_hash] -= 1
            if self._counts[chain_hash] == 0:
                self._drop(chain_hash)

    def clear(self) -> None:
        for chain_hash in list(self._counts):
            self._drop(chain_hash)

    def drain_changes(self) -> BlockChanges:
        """Net, since the last call."""
        return self._changes.drain()

    def all_hashes(self) -> list[ChainHash]:
        return list(self._counts)

    def _drop(self, chain_hash: ChainHash) -> None:
        del self._counts[chain_hash]
        self._changes.note_removed(chain_hash)
