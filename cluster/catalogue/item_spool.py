"""An upload's items on disk while they are read: texts, tokens, ids, bids, attributes, and their lines.

In memory are a batch of items and, at the end, a few numbers an item. A *row* is an item's place here: the
items left out along the way have none.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from cluster.catalogue.columns import ABSENT
from cluster.catalogue.faults import Faults, UploadError, shown
from cluster.catalogue.file_format import ColumnHeader
from cluster.catalogue.spool import AnyArray, ArraySpool, BlobSpool
from cluster.catalogue.upload import MAX_EXACT_INTEGER, AttributeValue, Item, is_number
from cluster.text import Tokenizer

MAX_ITEM_TOKENS = 64
MAX_DISTINCT_VALUES = 65_536
"""Of one text attribute: it stands for groups of items, not for single ones."""
_FEW_IDS_TOKENS = 1 << 16


class AttributeSpool:
    """One attribute's values, as text until the end."""

    def __init__(self, folder: Path, index: int, name: str) -> None:
        self.name = name
        self.values = BlobSpool(folder, f"attribute.{index}")
        self.is_number: bool | None = None
        """Of JSON, by the first value; None: CSV's, that the values decide."""

    def extend(self, row: int, values: list[AttributeValue | None]) -> None:
        """Of the rows from `row` on."""
        if self.values.count < row:
            self.values.pad_to(row)
        self.values.extend([_encoded(value) for value in values])

    def compiled(self, lines: ArraySpool) -> tuple[ColumnHeader, AnyArray, list[bytes]]:
        """Of every row, a number or the code of one of the values returned last. Raises UploadError."""
        is_number = self._are_numbers() if self.is_number is None else self.is_number
        if is_number:
            numbers = [
                np.array([np.nan if value is None else float(value) for value in batch], np.float64)
                for batch in self._batches()
            ]
            return ColumnHeader(name=self.name, kind="number"), np.concatenate(numbers), []
        code_of: dict[bytes, int] = {}
        codes = np.full(self.values.count, ABSENT, np.int32)
        at = 0
        for batch in self._batches():
            for row, value in enumerate(batch, at):
                if value is not None:
                    codes[row] = code_of.setdefault(value, len(code_of))
                    if len(code_of) > MAX_DISTINCT_VALUES:
                        raise UploadError(
                            f"line {lines.read(row, 1)[0]}: attribute {shown(self.name)} has more than "
                            f"{MAX_DISTINCT_VALUES} distinct values; leave it out, or send numbers"
                        )
            at += len(batch)
        return ColumnHeader(name=self.name, kind="text"), codes, list(code_of)

    def _batches(self) -> Iterator[list[bytes | None]]:
        first_byte = 0
        for start, end in self.values.batches():
            batch, first_byte = self.values.values(start, end, first_byte)
            yield batch

    def _are_numbers(self) -> bool:
        return all(
            value is None or _is_plain_number(value.decode()) for batch in self._batches() for value in batch
        )


def _is_plain_number(text: str) -> bool:
    """As text it says no more than its value: `007` and 20-digit numbers are names."""
    if not is_number(text):
        return False
    digits = text.lstrip("+-")
    has_leading_zero = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
    return not has_leading_zero and abs(float(text)) <= MAX_EXACT_INTEGER


def _encoded(value: AttributeValue | None) -> bytes | None:
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else repr(value).encode()


def _names(items: list[Item]) -> dict[str, None]:
    """All their attributes', in the order of their first items."""
    return dict.fromkeys(chain.from_iterable(item.attributes for item in items))


class ItemSpool:
    """Owns files in `folder` until `close`."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        end_token: int,
        faults: Faults,
        *,
        are_attributes_typed: bool,
    ) -> None:
        """`are_attributes_typed`: numbers come as numbers, and text that looks like one is text."""
        self.folder = folder
        self._tokenizer = tokenizer
        self.end_token = end_token
        self._faults = faults
        self._are_attributes_typed = are_attributes_typed
        self.vocab_size = max(tokenizer.num_tokens, end_token + 1)
        dtype = np.uint16 if self.vocab_size <= _FEW_IDS_TOKENS else np.int32
        self.tokens = ArraySpool(folder, "tokens", dtype)
        self.path_lengths = ArraySpool(folder, "path_lengths", np.int32)
        self.lines = ArraySpool(folder, "lines", np.int64)
        self.bids = ArraySpool(folder, "bids", np.float64)
        self.id_hashes = ArraySpool(folder, "id_hashes", np.uint64)
        self.texts = BlobSpool(folder, "texts")
        self.ids = BlobSpool(folder, "ids")
        self.attributes: dict[str, AttributeSpool] = {}
        self._kept: list[BlobSpool] = []

    @property
    def count(self) -> int:
        return self.lines.count

    def encode(self, items: list[Item]) -> list[list[int]]:
        """Their texts' tokens: apart from `extend`, since it may run beside the reading of the next items."""
        return self._tokenizer.encode_batch([item.text for item in items])

    def extend(self, items: list[Item], tokens: list[list[int]]) -> None:
        """Faults of what is left out go to the Faults."""
        problems = [self._problem(ids) for ids in tokens]
        if self._are_attributes_typed:
            self._check_types(items, problems)
        paths, kept = list[list[int]](), list[Item]()
        for item, ids, problem in zip(items, tokens, problems, strict=True):
            if problem is not None:
                self._faults.add(item.line, problem)
                continue
            ids.append(self.end_token)
            paths.append(ids)
            kept.append(item)
        self._add_attributes(kept)
        lengths = np.fromiter(map(len, paths), np.int32, len(paths))
        self.tokens.extend(np.fromiter(chain.from_iterable(paths), self.tokens.dtype, int(lengths.sum())))
        self.path_lengths.extend(lengths)
        self.lines.extend([item.line for item in kept])
        self.bids.extend([np.nan if item.bid is None else item.bid for item in kept])
        ids_bytes = [item.item_id.encode() for item in kept]
        self.ids.extend(ids_bytes)
        self.id_hashes.extend(np.array([xxhash.xxh3_64_intdigest(raw) for raw in ids_bytes], np.uint64))
        self.texts.extend([item.text.encode() for item in kept])

    def _problem(self, ids: list[int]) -> str | None:
        if not ids:
            return "`text` has no tokens"
        if len(ids) > MAX_ITEM_TOKENS:
            return f"`text` has {len(ids)} tokens; at most {MAX_ITEM_TOKENS}"
        if self.end_token in ids:
            return "`text` has the model's end of text in it"
        return None

    def _check_types(self, items: list[Item], problems: list[str | None]) -> None:
        """An attribute is of the type of its first value, in an item without another fault."""
        for name in _names(items):
            spool = self.attributes.get(name)
            if spool is not None:
                kinds = {type(item.attributes.get(name)) for item in items} - {type(None)}
                if kinds <= ({float} if spool.is_number else {str}):
                    continue
            for index, item in enumerate(items):
                value = item.attributes.get(name)
                if value is None or problems[index] is not None:
                    continue
                is_number = not isinstance(value, str)
                if spool is None:
                    spool = self._add_attribute(name)
                    spool.is_number = is_number
                elif spool.is_number is not is_number:
                    here, there = ("a number", "text") if is_number else ("text", "a number")
                    problems[index] = f"attribute {shown(name)} is {here} here and {there} in a line before"

    def _add_attribute(self, name: str) -> AttributeSpool:
        spool = AttributeSpool(self.folder, len(self.attributes), name)
        self.attributes[name] = spool
        return spool

    def _add_attributes(self, items: list[Item]) -> None:
        for name in _names(items):
            spool = self.attributes.get(name) or self._add_attribute(name)
            spool.extend(self.count, [item.attributes.get(name) for item in items])

    def finish(self) -> None:
        """All items are in."""
        self.attributes = {name: spool for name, spool in self.attributes.items() if spool.values.count}
        for spool in self.attributes.values():
            spool.values.pad_to(self.count)

    def drop_equal_ids(self, keep: npt.NDArray[np.bool_]) -> None:
        """Of equal ids, the first is kept."""
        hashes = self.id_hashes.read()
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        is_shared = np.zeros(len(order), np.bool_)
        is_shared[1:] = ordered[1:] == ordered[:-1]
        is_shared[:-1] |= is_shared[1:]
        rows = np.sort(order[is_shared])
        del hashes, ordered, order
        if not len(rows):
            return
        lines = self.lines.read()
        seen: dict[bytes, int] = {}
        for row, raw in zip(rows.tolist(), self._ids_at(rows), strict=True):
            if (earlier := seen.setdefault(raw, row)) != row:
                keep[row] = False
                self._faults.add(
                    int(lines[row]), f"`id` {shown(raw.decode())} is that of line {lines[earlier]}, too"
                )

    def _ids_at(self, rows: AnyArray) -> Iterator[bytes]:
        ends = np.cumsum(self.ids.lengths(), dtype=np.int64)
        data = self.ids.data.mapped()
        for row in rows.tolist():
            yield data[ends[row - 1] if row else 0 : ends[row]].tobytes()

    def note_equal_texts(self, earlier: AnyArray, later: AnyArray) -> None:
        """Faults for rows whose tokens are those of an earlier one."""
        ends = np.cumsum(self.texts.lengths(), dtype=np.int64)
        data, lines = self.texts.data.mapped(), self.lines.read()

        def text(row: int) -> bytes:
            return data[ends[row - 1] if row else 0 : ends[row]].tobytes()

        for first, second in zip(earlier.tolist(), later.tolist(), strict=True):
            what = "is that" if text(first) == text(second) else "has the same tokens as that"
            self._faults.add(int(lines[second]), f"`text` {what} of line {lines[first]}, too")

    def kept(self, blobs: BlobSpool, rows: AnyArray) -> BlobSpool:
        """`blobs` of these rows only."""
        if len(rows) == self.count:
            return blobs
        keep = np.zeros(self.count, np.bool_)
        keep[rows] = True
        self._kept.append(BlobSpool(self.folder, f"kept.{len(self._kept)}"))
        return blobs.keep_only(keep, self._kept[-1])

    def close(self) -> None:
        arrays = (self.tokens, self.path_lengths, self.lines, self.bids, self.id_hashes)
        for spool in (*arrays, self.texts, self.ids):
            spool.close()
        for attribute in self.attributes.values():
            attribute.values.close()
        for blobs in self._kept:
            blobs.close()
