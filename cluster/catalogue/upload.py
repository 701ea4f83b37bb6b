"""Items out of an upload, JSON lines or CSV, while its bytes arrive; memory is bounded by one record's.

JSON lines: one object a line, with `text`, and optionally `id`, `bid` and any attributes. CSV (RFC 4180,
commas): a header row with the same names. What is no `id`, `text` or `bid` is an attribute: a string, a
number, or true or false, which become text. An item without an id has its line's number as one.

What is wrong with an item goes to a `Faults`, and the item is left out; what leaves no way to go on is
raised.
"""

import csv
import math
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal, NoReturn

import msgspec

from cluster.catalogue.faults import Faults, UploadCutError, UploadError, shown
from cluster.catalogue.upload_lines import (
    MAX_RECORD_BYTES,
    CsvLines,
    RecordTooLongError,
    UploadBytes,
    json_lines,
)

MAX_ITEMS = 5_000_000
MAX_TEXT_BYTES = 4096
MAX_ID_BYTES = 128
MAX_ATTRIBUTES = 32
"""Names in the whole catalogue."""
MAX_ATTRIBUTE_NAME_BYTES = 64
MAX_ATTRIBUTE_VALUE_BYTES = 256
MAX_EXACT_INTEGER = 1 << 53
OWN_COLUMNS = ("id", "text", "bid")

Format = Literal["jsonl", "csv"]
AttributeValue = str | float

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


class Item(msgspec.Struct, frozen=True, gc=False):
    line: int
    item_id: str
    text: str
    bid: float | None = None
    attributes: dict[str, AttributeValue] = {}
    """Of CSV, always text: whether a column is one of numbers is known at its end."""


class _FaultError(ValueError):
    """One item's fault, on its way to the Faults."""


def parse_upload(
    chunks: Iterable[bytes],
    upload_format: Format,
    faults: Faults,
    *,
    content_length: int | None = None,
    max_items: int = MAX_ITEMS,
) -> Iterator[Item]:
    """`content_length`: how many bytes were announced; fewer or more end in UploadCutError, as does a record
    that the upload's end cuts. Raises UploadError for what is no table of items at all."""
    received = UploadBytes(chunks, content_length)
    items = _json_items(received, faults) if upload_format == "jsonl" else _csv_items(received, faults)
    names: set[str] = set()
    for count, item in enumerate(items, 1):
        if not item.attributes.keys() <= names:
            names |= item.attributes.keys()
            _check_names(names, item.line)
        if count > max_items:
            raise UploadError(f"line {item.line}: more than {max_items} items; split the catalogue", faults)
        yield item


def is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _check_names(names: set[str], line: int) -> None:
    if len(names) > MAX_ATTRIBUTES:
        raise UploadError(
            f"line {line}: a catalogue has at most {MAX_ATTRIBUTES} attributes; here are {len(names)}: "
            f"{', '.join(shown(name) for name in sorted(names)[: MAX_ATTRIBUTES + 1])}"
        )


def _json_items(received: UploadBytes, faults: Faults) -> Iterator[Item]:
    decode = msgspec.json.Decoder().decode
    for line, raw, is_terminated in json_lines(received):
        try:
            if raw is None:
                faults.add(line, f"a line of more than {MAX_RECORD_BYTES} bytes, the limit")
                continue
            yield _json_item(line, decode(raw))
        except _FaultError as fault:
            faults.add(line, str(fault))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            if not is_terminated and not received.is_known_whole:
                _refuse_cut(line, "a JSON object that does not end", faults)
            faults.add(line, _json_problem(error))


def _json_problem(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start} of a string"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply; an item is one flat object"
    if isinstance(error, msgspec.ValidationError):
        return "a number out of range; numbers are finite"
    return f"not valid JSON: {error}; each line is one object with at least `text`"


def _json_item(line: int, document: Any) -> Item:
    if not isinstance(document, dict):
        raise _FaultError(f'{_kind(document)} where an object such as {{"text": "..."}} belongs')
    text = document.pop("text", None)
    if text is None:
        found = ", ".join(shown(key) for key in list(document)[:8]) or "nothing"
        raise _FaultError(f"no `text`; found {found}")
    if not isinstance(text, str):
        raise _FaultError(f"`text` is {_kind(text)}; it must be a string")
    bid = document.pop("bid", None)
    if bid is not None:
        if isinstance(bid, bool) or not isinstance(bid, int | float):
            raise _FaultError(f"`bid` is {_kind(bid)}; it must be a number, or absent")
        bid = _finite("bid", bid)
    item_id = document.pop("id", None)
    if isinstance(item_id, int) and not isinstance(item_id, bool):
        item_id = str(item_id)
    if item_id is not None and not isinstance(item_id, str):
        raise _FaultError(f"`id` is {_kind(item_id)}; it must be a string or an integer, or absent")
    attributes = {name: _json_attribute(name, value) for name, value in document.items() if value is not None}
    return Item(line, _checked_id(item_id, line), _checked_text(text), bid, attributes)


def _json_attribute(name: str, value: Any) -> AttributeValue:
    _check_name(name)
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, str):
        return _checked_value(name, value)
    if isinstance(value, int | float):
        if isinstance(value, int) and abs(value) > MAX_EXACT_INTEGER:
            raise _FaultError(f"attribute {shown(name)} is an integer beyond 2^53: send it as a string")
        return _finite(name, value)
    raise _FaultError(
        f"attribute {shown(name)} is {_kind(value)}; it must be a string, a number, true or false"
    )


def _kind(value: Any) -> str:
    kinds = {str: "a string", bool: "true or false", dict: "an object", list: "an array", type(None): "null"}
    return kinds.get(type(value), "a number")


def _csv_items(received: UploadBytes, faults: Faults) -> Iterator[Item]:
    lines = CsvLines(received)
    reader = csv.reader(lines, strict=True)
    columns: list[str] | None = None
    while True:
        lines.begin_record()
        try:
            fields = next(reader)
            if not fields:
                continue
            if columns is None:
                columns = _checked_header(fields)
                continue
            yield _csv_item(lines.record_line, columns, fields)
        except StopIteration:
            break
        except (_FaultError, csv.Error, UnicodeDecodeError, RecordTooLongError) as error:
            line, problem = lines.record_line, _csv_problem(error)
            if lines.is_at_end and not received.is_known_whole and isinstance(error, csv.Error):
                _refuse_cut(line, "a quoted field that does not end", faults)
            if columns is None:
                raise UploadError(f"line {line}, the header: {problem}") from None
            reread = lines.reread_from_second_line()
            faults.add(line, problem + reread)
    if columns is None:
        _refuse_empty()


def _csv_problem(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start} of the line"
    if isinstance(error, RecordTooLongError):
        return f"a record of more than {MAX_RECORD_BYTES} bytes, the limit: is a quote not closed?"
    if isinstance(error, csv.Error):
        return f"not valid CSV: {error}; quote a field with quotes, commas or line ends, double quotes in it"
    return str(error)


def _checked_header(fields: list[str]) -> list[str]:
    columns = [field.strip() for field in fields]
    if "text" not in columns:
        found = ", ".join(shown(column) for column in columns[:8])
        hint = "; columns are separated by commas" if len(columns) == 1 else ""
        raise _FaultError(f"no column `text`; found {found}{hint}")
    _check_names(set(columns) - set(OWN_COLUMNS), 1)
    seen: set[str] = set()
    for column in columns:
        if column in seen:
            raise _FaultError(f"column {shown(column)} appears twice")
        seen.add(column)
        _check_name(column)
    return columns


def _csv_item(line: int, columns: list[str], fields: list[str]) -> Item:
    if len(fields) != len(columns):
        raise _FaultError(f"{len(fields)} fields; the header has {len(columns)} columns")
    record = dict(zip(columns, fields, strict=True))
    text = record.pop("text")
    item_id = record.pop("id", None) or None
    bid_text = record.pop("bid", "").strip()
    if bid_text and not is_number(bid_text):
        raise _FaultError(f"`bid` is {shown(bid_text)}; it must be a finite number, or empty")
    bid = _finite("bid", float(bid_text)) if bid_text else None
    attributes: dict[str, AttributeValue] = {
        name: _checked_value(name, value) for name, value in record.items() if value
    }
    return Item(line, _checked_id(item_id, line), _checked_text(text), bid, attributes)


def _checked_text(text: str) -> str:
    if not text.strip():
        raise _FaultError("`text` is empty")
    if len(text) > MAX_TEXT_BYTES // 4 and (size := len(text.encode())) > MAX_TEXT_BYTES:
        raise _FaultError(f"`text` of {size} bytes; at most {MAX_TEXT_BYTES}")
    return text


def _checked_id(item_id: str | None, line: int) -> str:
    if item_id is None:
        return str(line)
    if not item_id.strip():
        raise _FaultError("`id` is empty; leave it out for the line's number")
    if len(item_id) > MAX_ID_BYTES // 4 and (size := len(item_id.encode())) > MAX_ID_BYTES:
        raise _FaultError(f"`id` of {size} bytes; at most {MAX_ID_BYTES}")
    return item_id


@lru_cache(1024)
def _check_name(name: str) -> None:
    if not name or not name.isprintable() or len(name.encode()) > MAX_ATTRIBUTE_NAME_BYTES:
        raise _FaultError(
            f"attribute name {shown(name)}; names are 1 to {MAX_ATTRIBUTE_NAME_BYTES} bytes, printable"
        )


def _checked_value(name: str, value: str) -> str:
    limit = MAX_ATTRIBUTE_VALUE_BYTES
    if len(value) > limit // 4 and (size := len(value.encode())) > limit:
        raise _FaultError(f"attribute {shown(name)} of {size} bytes; at most {limit}")
    return value


def _finite(name: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _FaultError(f"`{name}` is not finite")
    return number


def _refuse_cut(line: int, what: str, faults: Faults) -> NoReturn:
    raise UploadCutError(f"line {line}: the upload ends within {what}: was it cut?", faults)


def _refuse_empty() -> NoReturn:
    raise UploadError("the upload is empty; CSV begins with a header row that has a column `text`")
