"""Opens the catalogue that a request names and applies its filter, beside the engine's thread."""

import threading
from collections import OrderedDict

from cluster.catalogue.fetch import FetchError
from cluster.catalogue.file import ConditionError
from cluster.catalogue.file_format import CatalogueFileError
from cluster.catalogue.local import LocalCatalogues
from cluster.messages import Condition, TargetingParams
from decode_workers.targeting.chosen_items import ChosenItems, choose_items


class NoItemsError(Exception):
    """A request whose items cannot be had here. The service tells its router."""

    def __init__(self, message: str, *, is_retryable: bool) -> None:
        super().__init__(message)
        self.is_retryable = is_retryable


class ItemChooser:
    """Keeps choices of the catalogues that are open, as many as those may be: with a filter, 16 bytes an item
    each. Safe to call from several threads."""

    def __init__(self, catalogues: LocalCatalogues) -> None:
        self._catalogues = catalogues
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str, tuple[Condition, ...]], ChosenItems] = OrderedDict()
        self._widths: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        catalogues.when_let_go(self._forget)

    def choose(self, params: TargetingParams, tenant: str = "") -> ChosenItems:
        """The first time it takes as long as the catalogue's file takes to come. Raises NoItemsError."""
        ref = params.catalogue
        key = (ref.checksum, params.scoring, params.where)
        try:
            catalogue = self._catalogues.open(ref, tenant)
            with self._lock:
                kept = self._kept.get(key)
                if kept is not None:
                    self._kept.move_to_end(key)
                    return kept
                widths = self._widths.get(ref.checksum)
            chosen = choose_items(catalogue, params, widths)
        except ConditionError as error:
            raise NoItemsError(f"catalogue {ref.name}: {error}", is_retryable=False) from None
        except (FetchError, CatalogueFileError, OSError) as error:
            raise NoItemsError(f"catalogue {ref.name}: {error}", is_retryable=True) from error
        with self._lock:
            self._kept[key], self._widths[ref.checksum] = chosen, chosen.level_widths
            while len(self._kept) > self._catalogues.max_open:
                self._kept.popitem(last=False)
            while len(self._widths) > self._catalogues.max_open:
                self._widths.popitem(last=False)
        if self._catalogues.find(ref.checksum) is not catalogue:
            self._forget(ref.checksum)  # let go while its items were chosen
        return chosen

    def _forget(self, checksum: str) -> None:
        with self._lock:
            for key in [key for key in self._kept if key[0] == checksum]:
                del self._kept[key]
