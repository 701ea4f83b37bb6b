"""`python -m megakernel predict`: milliseconds a step before there is a machine to measure them on."""

import argparse
import difflib
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from megakernel import cpu_limits, cuda_limits
from megakernel.artifact import packed_formats
from megakernel.dialect.types import WEIGHT_FORMATS
from megakernel.graph import check_formats, uniform_formats, usual_formats
from megakernel.machine import load_machine, machine_names
from megakernel.model.shape import ModelShape
from megakernel.predict import Question, predict
from megakernel.predict_assumptions import assumptions_of
from megakernel.predict_text import shown
from megakernel.search_command import bar
from megakernel.shapes import SHAPES

USUAL = "usual"
_MAX_ROWS = {"cpu": cpu_limits.MAX_ROWS, "cuda": cuda_limits.MAX_ROWS}


class PredictError(ValueError):
    """A question without an answer; the message names the option, what is wrong and what would be right.

    Handled by the command line.
    """


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--machine", required=True, help=f"{', '.join(machine_names())}, or a .json file")
    command.add_argument("--model", required=True, help=", ".join(SHAPES))
    command.add_argument(
        "--format",
        default=USUAL,
        help=f"of all matrices: {', '.join(WEIGHT_FORMATS)}; default: Q4_1, and Q8_0 for embedding and head",
    )
    command.add_argument("--batch", default="1,2,4,8,16", metavar="ROWS,...", help="rows of a step")
    command.add_argument(
        "--context", default="64,512,2048", metavar="TOKENS,...", help="that each row attends to"
    )
    command.add_argument(
        "--search",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="search for a better schedule, so long for each batch; default 0: list scheduling",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written as well")
    command.set_defaults(run=predict_command)


def predict_command(arguments: argparse.Namespace) -> None:
    shape = _shape_named(arguments.model)
    machine = load_machine(arguments.machine)
    stored = _formats_named(arguments.format, shape)
    if not (math.isfinite(arguments.search) and arguments.search >= 0):
        raise PredictError(f"--search: {arguments.search:g} seconds; give 0 (list scheduling) or more")
    question = Question(
        model=arguments.model,
        shape=shape,
        formats=packed_formats(shape, stored, machine.kind),
        machine=machine,
        batches=_numbers(
            "--batch", arguments.batch, "rows", _MAX_ROWS[machine.kind], f"kernels of {machine.name}"
        ),
        contexts=_numbers(
            "--context", arguments.context, "tokens", shape.max_context_tokens, arguments.model
        ),
        search_s=arguments.search,
    )
    prediction = predict(question, assumptions_of(question, stored), _show)
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(prediction), indent=1) + b"\n")
    print(shown(prediction), end="")


def _shape_named(name: str) -> ModelShape:
    if name not in SHAPES:
        raise PredictError(
            f"--model: unknown model {name!r}{_nearest(name, SHAPES)}; known are {', '.join(SHAPES)}"
        )
    return SHAPES[name]


def _formats_named(name: str, shape: ModelShape) -> dict[str, str]:
    """Raises GraphError for a format that the model's sizes do not go into."""
    if name == USUAL:
        return usual_formats(shape)
    if name not in WEIGHT_FORMATS:
        known = (*WEIGHT_FORMATS, USUAL)
        raise PredictError(
            f"--format: unknown format {name!r}{_nearest(name, known)}; known are {', '.join(known)}"
        )
    formats = uniform_formats(shape, name)
    check_formats(shape, formats)
    return formats


def _nearest(name: str, known: Iterable[str]) -> str:
    lowered = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f", did you mean {lowered[close[0]]!r}?" if close else ""


def _numbers(option: str, text: str, unit: str, most: int, whose: str) -> tuple[int, ...]:
    """Of a list such as `1,2,4`: ascending, each once."""
    numbers = set()
    for part in text.split(","):
        try:
            number = int(part)
        except ValueError:
            raise PredictError(f"{option}: {part!r} is no whole number; give {unit} such as 1,2,4") from None
        if not 1 <= number <= most:
            raise PredictError(f"{option}: {number} {unit}; {whose} take 1 to {most}")
        numbers.add(number)
    return tuple(sorted(numbers))


def _show(what: str, share: float) -> None:
    if sys.stderr.isatty():
        print(f"\r{bar(round(100 * share), 100)} {what}  ", end="", file=sys.stderr, flush=True)
