"""What changed about the blocks of a prefix cache, for the placement index."""

import msgspec

from cluster.ids import ChainHash


class BlockChanges(msgspec.Struct, frozen=True, kw_only=True):
    """Net change of the cached full blocks since the last drain; no hash in both."""

    stored: tuple[ChainHash, ...] = ()
    removed: tuple[ChainHash, ...] = ()


class ChangeLog:
    """Collects the net change: of a hash that came and went since the last drain, nothing is told."""

    def __init__(self) -> None:
        self._stored: dict[ChainHash, None] = {}
        self._removed: dict[ChainHash, None] = {}

    def note_stored(self, chain_hash: ChainHash) -> None:
        """Of one that was not cached."""
        if chain_hash in self._removed:
            del self._removed[chain_hash]
        else:
            self._stored[chain_hash] = None

    def note_removed(self, chain_hash: ChainHash) -> None:
        """Of one that was."""
        if chain_hash in self._stored:
            del self._stored[chain_hash]
        else:
            self._removed[chain_hash] = None

    def drain(self) -> BlockChanges:
        changes = BlockChanges(stored=tuple(self._stored), removed=tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return changes

    def check(self) -> None:
        """Assert that no hash is both; for tests."""
        assert not self._stored.keys() & self._removed.keys(), "a hash is both stored and removed"
