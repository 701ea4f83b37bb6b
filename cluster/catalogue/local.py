"""A worker's open catalogues: read in place where the router's file is seen, else from a cache folder, else
fetched.

The cache folder may be shared by processes of one machine: a file comes in by a rename, whole.
"""

import os
import re
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.catalogue.file import Catalogue
from cluster.catalogue.file_format import CatalogueFileError, DamagedCatalogueError, read_preamble
from cluster.catalogue.store import SUFFIX
from cluster.messages import CatalogueRef, Record

Fetch = Callable[[CatalogueRef, Path], None]
"""Write the file of a reference to a path. What it raises, `open` raises."""

_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_FETCH_PREFIX = ".fetch-"
MAX_NOTED_FILES = 1024

_Identity = tuple[int, int, int, int]
"""Of a file whose checksum was compared: device, inode, size, time of change. It is not compared again."""


class _Opened(Record, frozen=True):
    tenant: str
    """Who had it opened."""
    catalogue: Catalogue


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class LocalCatalogues:
    """By checksum. Threads may share it: one of them opens a catalogue, the others wait for it."""

    def __init__(
        self,
        cache_folder: Path,
        fetch: Fetch,
        *,
        max_open: int = 8,
        max_cached_bytes: int = 8 * 1024**3,
    ) -> None:
        """Beyond `max_open`, the tenant that has the most open loses the one asked for longest ago; who still
        uses it keeps it."""
        self._folder = cache_folder
        self._fetch = fetch
        self.max_open = max_open
        self._max_cached_bytes = max_cached_bytes
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Opened] = OrderedDict()
        self._calls: list[Callable[[str], None]] = []
        self._opening: dict[str, tuple[threading.Lock, int]] = {}
        self._verified: OrderedDict[_Identity, None] = OrderedDict()

    def when_let_go(self, call: Callable[[str], None]) -> None:
        """With each one's checksum, by the thread that opens another: for those who keep what uses it."""
        self._calls.append(call)

    def find(self, checksum: str) -> Catalogue | None:
        """An open one, asked for now; never blocks."""
        with self._lock:
            opened = self._open.get(checksum)
            if opened is None:
                return None
            self._open.move_to_end(checksum)
            return opened.catalogue

    def open(self, ref: CatalogueRef, tenant: str = "") -> Catalogue:
        """At once for an open one; the first time it reads the whole file, and may fetch it.

        Raises OSError and CatalogueFileError where no whole file can be had, and what `fetch` raises.
        """
        if not _CHECKSUM.fullmatch(ref.checksum):
            raise CatalogueFileError(f"{ref.checksum!r} is no checksum of a catalogue: 32 hex digits")
        if (found := self.find(ref.checksum)) is not None:
            return found
        with self._opening_alone(ref.checksum):
            if (found := self.find(ref.checksum)) is not None:
                return found
            opened = _Opened(tenant, self._opened(ref))
            with self._lock:
                self._open[ref.checksum] = opened
                let_go = [self._take_one() for _ in range(len(self._open) - self.max_open)]
            for checksum in let_go:
                for call in self._calls:
                    call(checksum)
            return opened.catalogue

    def _take_one(self) -> str:
        """Out of the open ones; under the lock."""
        num_open = Counter(opened.tenant for opened in self._open.values())
        most = max(num_open.values())
        checksum = next(one for one, opened in self._open.items() if num_open[opened.tenant] == most)
        del self._open[checksum]
        return checksum

    @contextmanager
    def _opening_alone(self, checksum: str) -> Iterator[None]:
        with self._lock:
            lock, waiting = self._opening.get(checksum, (threading.Lock(), 0))
            self._opening[checksum] = (lock, waiting + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, waiting = self._opening.pop(checksum)
                if waiting > 1:
                    self._opening[checksum] = (lock, waiting - 1)

    def _opened(self, ref: CatalogueRef) -> Catalogue:
        cached = self._folder / f"{ref.checksum}{SUFFIX}"
        for path in (Path(ref.path), cached):
            with suppress(OSError, CatalogueFileError):
                catalogue = self._verified_at(path, ref)
                if path == cached:
                    os.utime(path)  # when it was last used
                    self._note_verified(_identity(path))
                return catalogue
        self._fetch_into(cached, ref)
        catalogue = self._verified_at(cached, ref)
        self._prune(cached)
        return catalogue

    def _verified_at(self, path: Path, ref: CatalogueRef) -> Catalogue:
        preamble = read_preamble(path)
        if preamble.checksum != ref.checksum:
            raise DamagedCatalogueError(
                f"{path} is another catalogue: checksum {preamble.checksum}, asked for was {ref.checksum}"
            )
        identity = _identity(path)
        catalogue = Catalogue.open(path, verify=identity not in self._verified)
        if catalogue.checksum != ref.checksum:
            raise DamagedCatalogueError(f"{path} was replaced while it was opened")
        self._note_verified(identity)
        return catalogue

    def _note_verified(self, identity: _Identity) -> None:
        with self._lock:
            self._verified[identity] = None
            while len(self._verified) > MAX_NOTED_FILES:
                self._verified.popitem(last=False)

    def _fetch_into(self, cached: Path, ref: CatalogueRef) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_FETCH_PREFIX, dir=self._folder) as work:
            fetched = Path(work) / "catalogue"
            self._fetch(ref, fetched)
            self._verified_at(fetched, ref)
            fetched.rename(cached)

    def _prune(self, newest: Path) -> None:
        """Files that are open stay readable when they are removed."""
        kept_bytes = 0
        with suppress(OSError):
            paths = sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda path: -path.stat().st_mtime_ns)
            for path in paths:
                kept_bytes += path.stat().st_size
                if kept_bytes > self._max_cached_bytes and path != newest:
                    path.unlink(missing_ok=True)
