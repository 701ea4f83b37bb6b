"""The catalogues whose items requests name as phrases: opened beside the engine, and waited for by nobody."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from cluster.catalogue.fetch import FetchError
from cluster.catalogue.file_format import CatalogueFileError
from cluster.catalogue.local import LocalCatalogues
from cluster.messages import CatalogueRef
from cluster.text import Tokenizer
from decode_workers.drafting.phrases import BareWords, Phrases

MAX_OPENING = 4
"""Catalogues being opened at once, each for another tenant."""
RETRY_S = 5.0
"""What could not be had is not asked for again before."""
MAX_NOTED_FAILURES = 1024

logger = logging.getLogger(__name__)


class PhraseFiles:
    """From any thread, and never blocking. What is open counts among `catalogues`' open ones, and is let go
    as they are, also while sequences are drafted from it."""

    def __init__(
        self,
        catalogues: LocalCatalogues,
        tokenizer: Tokenizer,
        vocab_size: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bare_words = BareWords(tokenizer)
        self._catalogues = catalogues
        self._vocab_size = vocab_size
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._opening: dict[str, str] = {}
        """Tenants, by checksum."""
        self._failed: OrderedDict[str, float] = OrderedDict()
        """When, by checksum."""

    def want(self, ref: CatalogueRef, tenant: str) -> None:
        """Begin to open it, which may fetch it; the next request asks again where that cannot be now."""
        if self._catalogues.find(ref.checksum) is not None or not self._may_open(ref.checksum, tenant):
            return
        thread = threading.Thread(target=self._open, args=(ref, tenant), name="phrases", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the machine has no more threads
            self._fail(ref, error)

    def find(self, ref: CatalogueRef) -> Phrases | None:
        """None where it is not open."""
        catalogue = self._catalogues.find(ref.checksum)
        if catalogue is None or catalogue.header.vocab_size > self._vocab_size:
            return None
        return Phrases(catalogue.trie, catalogue.root_child)

    def _may_open(self, checksum: str, tenant: str) -> bool:
        with self._lock:
            failed_s = self._failed.get(checksum)
            if failed_s is not None and self._clock_s() - failed_s < RETRY_S:
                return False
            is_busy = len(self._opening) >= MAX_OPENING or tenant in self._opening.values()
            if is_busy or checksum in self._opening:
                return False
            self._opening[checksum] = tenant
            return True

    def _open(self, ref: CatalogueRef, tenant: str) -> None:
        try:
            self._catalogues.open(ref, tenant)
        except (FetchError, CatalogueFileError, OSError) as error:
            self._fail(ref, error)
        except Exception as error:
            logger.exception("a catalogue could not be opened")
            self._fail(ref, error)
        else:
            with self._lock:
                del self._opening[ref.checksum]

    def _fail(self, ref: CatalogueRef, error: Exception) -> None:
        logger.warning("catalogue %s cannot serve as phrases: %s", ref.name, error)
        with self._lock:
            del self._opening[ref.checksum]
            self._failed[ref.checksum] = self._clock_s()
            self._failed.move_to_end(ref.checksum)
            while len(self._failed) > MAX_NOTED_FAILURES:
                self._failed.popitem(last=False)
