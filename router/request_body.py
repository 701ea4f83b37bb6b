"""Bytes to a request struct, or an error that names the field and what it may be."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import inspect

from router.errors import RequestError, invalid

T = TypeVar("T", bound=msgspec.Struct)

_AT_PATH = re.compile(r" - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$", re.DOTALL)
_STEP = re.compile(r"\[[^\]]*\]|[^.\[]+")
MAX_SHOWN_CHARS = 80


class BodyDecoder(Generic[T]):
    """Decodes one kind of body. Raises RequestError (400)."""

    def __init__(self, type: type[T]) -> None:
        self._type = type
        self._decoder = msgspec.json.Decoder(type)
        self._root = inspect.type_info(type)

    def decode(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise self._explain(str(error)) from None
        except UnicodeDecodeError as error:
            message = f"the body is not valid UTF-8: byte {error.object[error.start]:#04x}"
            raise invalid(None, message, code="invalid_json") from None
        except msgspec.DecodeError as error:
            raise invalid(None, f"the body is not valid JSON: {error}", code="invalid_json") from None
        except RecursionError:
            raise invalid(
                None, "the body is not valid here: nested too deeply", code="invalid_json"
            ) from None

    def convert(self, fields: Mapping[str, object]) -> T:
        """The same checks on values that arrived some other way."""
        try:
            return msgspec.convert(fields, self._type)
        except msgspec.ValidationError as error:
            raise self._explain(str(error)) from None

    def _explain(self, message: str) -> RequestError:
        at = _AT_PATH.search(message)
        path = at["path"] if at else ""
        detail = message[: at.start()] if at else message
        fields = _struct_fields(_struct_in(_type_at(self._root, path)))
        if unknown := _UNKNOWN.match(detail):
            return _unknown_field(path, unknown["name"], fields)
        if missing := _MISSING.match(detail):
            param = _joined(path, missing["name"])
            expected = _expected(fields.get(missing["name"]))
            return invalid(param, f"`{param}` is required: {expected}", code="missing_field")
        if not path:
            return invalid(None, f"the body must be a JSON object: {detail}", code="invalid_json")
        detail = detail[0].lower() + detail[1:]
        expected = _expected(_type_at(self._root, path))
        return invalid(path, f"`{path}` must be {expected} ({detail})", code="invalid_value")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unknown_field(path: str, name: str, fields: Mapping[str, inspect.Type]) -> RequestError:
    shown = name if len(name) <= MAX_SHOWN_CHARS else f"{name[:MAX_SHOWN_CHARS]}..."
    near = difflib.get_close_matches(shown, fields, n=1, cutoff=0.0)
    param = _joined(path, shown)
    hint = f": did you mean `{_joined(path, near[0])}`?" if near else ""
    return invalid(param, f"unknown field `{param}`{hint}", code="unknown_field")


def _type_at(root: inspect.Type, path: str) -> inspect.Type | None:
    """What belongs at `path` (`messages[0].content`); None where the path leads nowhere known."""
    here: inspect.Type | None = root
    for step in _STEP.findall(path):
        here = _item_in(here) if step.startswith("[") else _struct_fields(_struct_in(here)).get(step)
    return here


def _struct_fields(kind: inspect.Type | None) -> dict[str, inspect.Type]:
    if not isinstance(kind, inspect.StructType):
        return {}
    return {field.encode_name: field.type for field in kind.fields}


def _struct_in(kind: inspect.Type | None) -> inspect.StructType | None:
    """The struct inside unions, arrays and annotations."""
    match kind:
        case inspect.StructType():
            return kind
        case inspect.Metadata():
            return _struct_in(kind.type)
        case inspect.ListType():
            return _struct_in(kind.item_type)
        case inspect.UnionType():
            return next((found for part in kind.types if (found := _struct_in(part))), None)
        case _:
            return None


def _item_in(kind: inspect.Type | None) -> inspect.Type | None:
    """The element type of the array or object inside unions and annotations."""
    match kind:
        case inspect.ListType():
            return kind.item_type
        case inspect.DictType():
            return kind.value_type
        case inspect.Metadata():
            return _item_in(kind.type)
        case inspect.UnionType():
            return next((found for part in kind.types if (found := _item_in(part))), None)
        case _:
            return None


def _expected(kind: inspect.Type | None) -> str:
    return "a valid value" if kind is None else describe(kind)


def describe(kind: inspect.Type) -> str:
    """What a field may hold, for people: `a number from 0 to 2`."""
    match kind:
        case inspect.Metadata():
            return describe(kind.type)
        case inspect.UnionType():
            parts = [describe(part) for part in kind.types if not isinstance(part, inspect.NoneType)]
            return " or ".join(parts) if parts else "null"
        case inspect.IntType():
            return _number("an integer", kind)
        case inspect.FloatType():
            return _number("a number", kind)
        case inspect.StrType():
            return "a string" + _length(kind, "characters")
        case inspect.BoolType():
            return "true or false"
        case inspect.NoneType():
            return "null (it is not implemented)"
        case inspect.LiteralType():
            return " or ".join(repr(value) for value in kind.values)
        case inspect.ListType():
            if kind.max_length == 0:
                return "an empty array (it is not implemented)"
            return f"an array{_length(kind, 'items')}, each {describe(kind.item_type)}"
        case inspect.DictType():
            return "an empty object (it is not implemented)" if kind.max_length == 0 else "an object"
        case inspect.StructType():
            return f"an object with {', '.join(_struct_fields(kind))}"
        case _:
            return "a value"


def _number(noun: str, kind: Any) -> str:
    low = kind.ge if kind.ge is not None else kind.gt
    high = kind.le if kind.le is not None else kind.lt
    if low is None or high is None:
        return noun
    if low == high:
        return f"{low} (it is not implemented)"
    if kind.gt is not None:
        return f"{noun} above {low}, up to {high}"
    return f"{noun} from {low} to {high}"


def _length(kind: Any, unit: str) -> str:
    if kind.max_length is None:
        return f" of at least {kind.min_length} {unit}" if kind.min_length else ""
    if kind.max_length == 0:
        return " without content (it is not implemented)"
    return f" of {kind.min_length or 0} to {kind.max_length} {unit}"
