"""A compiled catalogue, memory-mapped: its trie, its items, and which of them pass conditions."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.catalogue.columns import BoolArray, Column, NumberColumn, TextColumn
from cluster.catalogue.file_format import CatalogueHeader, MappedFile, Strings
from cluster.catalogue.trie import ROOT, Int32Array, Trie
from cluster.catalogue.trie_build import NODE_FIELDS
from cluster.messages import Condition, Record

BID = "bid"
MAX_KEPT_PASSING = 16
"""Conditions whose passing items are kept, of one catalogue: 5 bytes an item each."""


class ConditionError(ValueError):
    """A condition that says nothing of this catalogue's items. Handled as a bad request by the router."""


class UnknownAttributeError(ConditionError):
    """The message names the attributes that there are."""


class Passing(Record, frozen=True, kw_only=True):
    """What passes a tuple of conditions."""

    mask: BoolArray
    """[items] of the sorted items."""
    counts: Int32Array
    """[items + 1] see `passing_counts`."""

    @property
    def num_items(self) -> int:
        return int(self.counts[-1])


def passing_counts(mask: BoolArray) -> Int32Array:
    """[items + 1] how many of the items before each pass: some item below node n does if and only if
    counts[first_item[n] + num_items[n]] > counts[first_item[n]]."""
    counts = np.zeros(len(mask) + 1, np.int32)
    np.cumsum(mask, dtype=np.int32, out=counts[1:])
    return counts


class Catalogue:
    """Read-only, and safe to share between threads. It is gone with the last reference to it or its arrays;
    its file may be removed before."""

    def __init__(self, file: MappedFile) -> None:
        header = file.header
        self.header: CatalogueHeader = header
        self.checksum = file.preamble.checksum
        self.num_bytes = file.preamble.file_bytes
        self.path = file.path
        num_nodes, num_items = header.num_nodes, header.num_items
        sizes = {field: num_nodes + (field == "first_child") for field in NODE_FIELDS}
        self.trie = Trie(
            **{
                field: file.array(f"trie.{field}", dtype, sizes[field])
                for field, dtype in NODE_FIELDS.items()
            },
            upload_rank=file.array("upload_rank", np.int32, num_items),
        )
        self.root_child: Int32Array = file.array("root_child", np.int32, header.vocab_size)
        """[vocabulary] the root's child by token; -1 where there is none."""
        self.bids: npt.NDArray[np.float64] = file.array(BID, np.float64, num_items)
        """[items] of the sorted items; NaN where there is none."""
        self._texts = _strings(file, "texts")
        self._ids = _strings(file, "ids")
        self._columns: dict[str, Column] = {BID: NumberColumn(self.bids)}
        for index, column in enumerate(header.columns):
            self._columns[column.name] = _column(file, index, column.kind)
        self._passing: OrderedDict[tuple[Condition, ...], Passing] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> "Catalogue":
        """`verify`: read the whole file and compare its checksum, 30 to 100 ms for a million items.

        Raises OSError and CatalogueFileError, which says what is wrong with the file."""
        return cls(MappedFile(path, verify=verify))

    @property
    def num_items(self) -> int:
        return self.header.num_items

    @property
    def attributes(self) -> tuple[str, ...]:
        """What conditions can ask for; the bid is one of them."""
        return tuple(self._columns)

    def item_id(self, sorted_index: int) -> str:
        return self._ids[int(self.trie.upload_rank[sorted_index])]

    def text(self, sorted_index: int) -> str:
        return self._texts[int(self.trie.upload_rank[sorted_index])]

    def bid(self, sorted_index: int) -> float | None:
        bid = float(self.bids[sorted_index])
        return None if np.isnan(bid) else bid

    def find(self, token_ids: Sequence[int]) -> int | None:
        """The sorted index of the item whose text has these tokens, its end not among them."""
        node = self._first_child(token_ids[0]) if token_ids else ROOT
        for token in (*token_ids[1:], self.header.end_token):
            if node is None:
                return None
            node = self.trie.child(node, token)
        return None if node is None else int(self.trie.leaf_item[node])

    def _first_child(self, token: int) -> int | None:
        child = int(self.root_child[token]) if 0 <= token < len(self.root_child) else -1
        return None if child < 0 else child

    def mask(self, where: tuple[Condition, ...]) -> BoolArray:
        """[items] which of the sorted items pass all conditions; read-only. Raises ConditionError."""
        return self.passing(where).mask

    def passing(self, where: tuple[Condition, ...]) -> Passing:
        """Those asked for last are kept. Raises ConditionError."""
        with self._lock:
            if (kept := self._passing.get(where)) is not None:
                self._passing.move_to_end(where)
                return kept
        mask = np.ones(self.num_items, np.bool_)
        for condition in where:
            mask &= self._meets(condition)
        found = Passing(mask=mask, counts=passing_counts(mask))
        found.mask.flags.writeable = False
        found.counts.flags.writeable = False
        with self._lock:
            self._passing[where] = found
            while len(self._passing) > MAX_KEPT_PASSING:
                self._passing.popitem(last=False)
        return found

    def _meets(self, condition: Condition) -> BoolArray:
        column = self._columns.get(condition.attribute)
        if column is None:
            raise UnknownAttributeError(
                f"catalogue `{self.header.name}` has no attribute `{condition.attribute}`; "
                f"it has {', '.join(self.attributes)}"
            )
        try:
            return column.meets(condition)
        except ValueError as error:
            raise ConditionError(f"attribute `{condition.attribute}`: {error}") from None


def _strings(file: MappedFile, name: str) -> Strings:
    offsets = file.array(f"{name}.offsets", np.int64, file.header.num_items + 1)
    return Strings(offsets, file.array(f"{name}.bytes", np.uint8))


def _column(file: MappedFile, index: int, kind: str) -> Column:
    name = f"column.{index}"
    if kind == "number":
        return NumberColumn(file.array(name, np.float64, file.header.num_items))
    values = Strings(file.array(f"{name}.offsets", np.int64), file.array(f"{name}.bytes", np.uint8))
    return TextColumn(file.array(name, np.int32, file.header.num_items), values)
