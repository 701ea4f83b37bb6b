"""Opens the catalogue that a request names and applies its filter, beside the engine's thread."""

from functools import lru_cache

from cluster.catalogue.fetch import FetchError
from cluster.catalogue.file import Catalogue, ConditionError
from cluster.catalogue.file_format import CatalogueFileError
from cluster.catalogue.local import LocalCatalogues
from cluster.messages import TargetingParams
from decode_workers.targeting.chosen_items import ChosenItems
from decode_workers.targeting.slots import level_widths

MAX_WIDTHS_KEPT = 256


class NoItemsError(Exception):
    """A request whose items cannot be had here. The service tells its router."""

    def __init__(self, message: str, *, is_retryable: bool) -> None:
        super().__init__(message)
        self.is_retryable = is_retryable


class ItemChooser:
    """Safe to call from several threads."""

    def __init__(self, catalogues: LocalCatalogues) -> None:
        self._catalogues = catalogues
        self._widths_of = lru_cache(maxsize=MAX_WIDTHS_KEPT)(_Widths)

    def choose(self, params: TargetingParams) -> ChosenItems:
        """Takes as long as the catalogue's file takes to come, the first time. Raises NoItemsError."""
        name = params.catalogue.name
        try:
            catalogue = self._catalogues.open(params.catalogue)
            passing = catalogue.passing(params.where) if params.where else None
        except ConditionError as error:
            raise NoItemsError(f"catalogue {name}: {error}", is_retryable=False) from None
        except (FetchError, CatalogueFileError, OSError) as error:
            raise NoItemsError(f"catalogue {name}: {error}", is_retryable=True) from error
        return ChosenItems(
            catalogue=catalogue,
            passing=passing,
            level_widths=self._widths_of(catalogue.checksum).of(catalogue),
        )


class _Widths:
    """Of one compiled file: counting reads all of its nodes."""

    def __init__(self, checksum: str) -> None:
        self.checksum = checksum
        self._widths: tuple[int, ...] | None = None

    def of(self, catalogue: Catalogue) -> tuple[int, ...]:
        if self._widths is None:
            self._widths = level_widths(catalogue.trie)
        return self._widths
