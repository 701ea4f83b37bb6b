"""What of TensorRT-LLM is used here (trtllm_signatures.toml), and how an installed one differs from it.

Names are looked up by import; nothing of it is run.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

Presence = Literal["required", "optional", "required keyword", "optional keyword"]
"""Of a parameter; `keyword`: it cannot be given by its place."""

_FILE = Path(__file__).with_name("trtllm_signatures.toml")


class Further(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keywords that a callable takes because a class has fields of that name."""

    owner: str = msgspec.field(name="class")
    fields: list[str]


class Called(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    parameters: dict[str, Presence] = {}
    further: Further | None = None


class Implemented(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Methods by name, with their parameters but `self`."""

    abstract: dict[str, list[str]]
    inherited: dict[str, list[str]]


class Pins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    compute_capabilities: list[str]
    versions: dict[str, str]
    unfit: dict[str, str]
    moved: dict[str, str]
    called: dict[str, Called]
    implemented: dict[str, Implemented]
    read: dict[str, list[str]]


def load_pins() -> Pins:
    return msgspec.toml.decode(_FILE.read_bytes(), type=Pins)


def differences(pins: Pins) -> Iterator[str]:
    """Between what is pinned and what can be imported, a line each."""
    for name, called in pins.called.items():
        yield from _named(pins, name, partial(_of_called, pins, called))
    for name, implemented in pins.implemented.items():
        yield from _named(pins, name, partial(_of_implemented, implemented))
    for name, attributes in pins.read.items():
        yield from _named(pins, name, partial(_of_read, attributes))


def find(pins: Pins, name: str) -> Any:
    """Raises ImportError, AttributeError."""
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError:
        if module_name not in pins.moved:
            raise
        found = importlib.import_module(pins.moved[module_name])
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _named(pins: Pins, name: str, compare: Callable[[Any], Iterator[str]]) -> Iterator[str]:
    try:
        found = find(pins, name)
    except (ImportError, AttributeError) as error:
        yield f"{name}: expected to be there, found {error}"
        return
    for line in compare(found):
        yield f"{name}: {line}"


def _of_called(pins: Pins, called: Called, found: Any) -> Iterator[str]:
    there = _parameters(found)
    for name, presence in called.parameters.items():
        if there.get(name) != presence:
            yield f"parameter {name}: expected {presence}, found {there.get(name, 'none')}"
    for name, presence in there.items():
        if presence.startswith("required") and name not in called.parameters:
            yield f"parameter {name}: expected none, found {presence}"
    if called.further is not None:
        fields = _attributes(find(pins, called.further.owner))
        for name in called.further.fields:
            if name not in fields:
                yield f"keyword {name}: expected as a field of {called.further.owner}, found none"


def _of_implemented(pinned: Implemented, found: Any) -> Iterator[str]:
    abstract: frozenset[str] = getattr(found, "__abstractmethods__", frozenset())
    for name in sorted(abstract - pinned.abstract.keys()):
        yield f"{name}: expected none, found an abstract method"
    for name, parameters in {**pinned.abstract, **pinned.inherited}.items():
        method = getattr(found, name, None)
        if method is None:
            yield f"{name}: expected a method, found none"
            continue
        found_parameters = list(_parameters(method))
        if found_parameters != parameters:
            yield f"{name}: expected parameters {parameters}, found {found_parameters}"
        if (name in abstract) != (name in pinned.abstract):
            expected, there = ("inherited", "abstract") if name in abstract else ("abstract", "inherited")
            yield f"{name}: expected as {expected}, found {there}"


def _of_read(attributes: list[str], found: Any) -> Iterator[str]:
    there = _attributes(found)
    for name in attributes:
        if name not in there:
            yield f"attribute {name}: expected, found none"


def _parameters(found: Any) -> dict[str, Presence]:
    """But `self`, `*` and `**`."""
    parameters = dict[str, Presence]()
    for parameter in inspect.signature(found).parameters.values():
        if parameter.name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        is_optional = parameter.default is not parameter.empty
        if parameter.kind is parameter.KEYWORD_ONLY:
            parameters[parameter.name] = "optional keyword" if is_optional else "required keyword"
        else:
            parameters[parameter.name] = "optional" if is_optional else "required"
    return parameters


def _attributes(found: Any) -> set[str]:
    """Of a class's objects: fields of dataclasses and of pydantic's models, properties, C++ members."""
    fields = {*getattr(found, "__dataclass_fields__", {}), *getattr(found, "model_fields", {})}
    return fields | set(dir(found))
