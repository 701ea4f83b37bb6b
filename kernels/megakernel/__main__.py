"""`python -m megakernel compile MODEL --machine NAME --bucket N`: a model's shape to a frozen program; and
`predict`, what steps would take."""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from megakernel import predict_command
from megakernel.default_plan import default_plan
from megakernel.graph import DEFAULT_SPLIT_TOKENS, usual_formats
from megakernel.machine import PROBED, Machine, load_machine, machine_names
from megakernel.model.load import open_model
from megakernel.model.shape import ModelShape
from megakernel.model.weights import ModelFormatError, Weights
from megakernel.pipeline import STAGE_NAMES, compile_program, encode_program, ir_after
from megakernel.plan_search import SearchQuestion
from megakernel.program import Opcode, Program
from megakernel.report import compile_report
from megakernel.search_command import search_with_bars
from megakernel.shapes import SHAPES
from megakernel.timeline_svg import schedule_svg
from megakernel.validate import Proof, validate


class CompiledModel(msgspec.Struct, frozen=True, kw_only=True):
    """What compiling needs of a model."""

    shape: ModelShape
    formats: Mapping[str, str]
    fingerprint: str
    weights: Weights | None = None
    """None for a shape alone: it can be compiled, but not run."""


def model_named(name: str) -> CompiledModel:
    """A well-known shape, or whatever `open_model` opens. Raises ModelFormatError."""
    if name in SHAPES:
        shape = SHAPES[name]
        fingerprint = hashlib.blake2b(msgspec.json.encode(shape), digest_size=16).hexdigest()
        return CompiledModel(shape=shape, formats=usual_formats(shape), fingerprint=fingerprint)
    try:
        opened = open_model(name)
    except ModelFormatError as error:
        raise ModelFormatError(f"{error}; shapes known without weights: {', '.join(SHAPES)}") from error
    weights = opened.weights
    return CompiledModel(
        shape=weights.shape, formats=weights.formats, fingerprint=opened.fingerprint, weights=weights
    )


def summary(program: Program, machine: Machine, proof: Proof) -> str:
    instructions = [instruction for worker in program.workers for instruction in worker]
    opcodes = Counter(instruction.opcode for instruction in instructions)
    by_opcode = ", ".join(f"{opcodes[code]} {code.name.lower()}" for code in Opcode if opcodes[code])
    longest = max((len(worker) for worker in program.workers), default=0)
    lines = {
        "machine": f"{machine.name}, {machine.num_workers} workers",
        "bucket": f"{program.bucket} rows",
        "ops": str(len(program.ops)),
        "instructions": f"{len(instructions)} ({by_opcode}), at most {longest} a worker",
        "counters": str(program.num_counters),
        "signals": str(sum(instruction.signal >= 0 for instruction in instructions)),
        "waits": str(proof.num_waits),
        "proved": f"no deadlock, no race in {proof.num_ordered_accesses} accesses; at most "
        f"{proof.peak_pages} of {program.num_pages} scratch pages at once",
    }
    return "\n".join(f"{name:14}{value}" for name, value in lines.items())


def compile_command(arguments: argparse.Namespace) -> None:
    model = model_named(arguments.model)
    machine = load_machine(arguments.machine)
    plan = default_plan(model.shape, machine, arguments.bucket, model.formats)
    baseline_us = None
    if arguments.search:
        question = SearchQuestion(
            shape=model.shape,
            formats=model.formats,
            fingerprint=model.fingerprint,
            # Only the CPU in hand can be measured, and only with weights.
            weights=model.weights if arguments.machine == PROBED else None,
            machine=machine,
            bucket=arguments.bucket,
            split_tokens=arguments.split_tokens,
            seed=arguments.seed,
        )
        searched = search_with_bars(question)
        plan, baseline_us = searched.plan, searched.found.baseline_us
    if arguments.stop_after is not None:
        module = ir_after(
            model.shape,
            machine,
            arguments.bucket,
            arguments.stop_after,
            plan,
            split_tokens=arguments.split_tokens,
            formats=model.formats,
        )
        emit(f"{module!s}\n".encode(), arguments.out)
        return
    program = compile_program(
        model.shape,
        model.fingerprint,
        machine,
        arguments.bucket,
        plan,
        split_tokens=arguments.split_tokens,
        formats=model.formats,
    )
    proof = validate(program, machine, model.formats)
    if arguments.out is not None:
        emit(encode_program(program), arguments.out)
    if arguments.picture is not None:
        arguments.picture.write_text(schedule_svg(program, machine, model.formats), encoding="utf-8")
    print(summary(program, machine, proof))
    if arguments.report:
        report = compile_report(
            model.shape, machine, program, plan, formats=model.formats, baseline_us=baseline_us
        )
        print(f"\n{report}", end="")


def emit(data: bytes, out: Path | None) -> None:
    """To a file, or to standard output."""
    if out is None:
        sys.stdout.write(data.decode())
    else:
        out.write_bytes(data)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m megakernel", description="The megakernel compiler.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    predicting = commands.add_parser("predict", help="what decode steps take, under the cost model")
    predict_command.add_arguments(predicting)
    command = commands.add_parser(
        "compile", help="compile a model's decode step for a machine and a row bucket"
    )
    command.add_argument(
        "model", metavar="MODEL", help=f"a .gguf file, a model folder, or one of {', '.join(SHAPES)}"
    )
    command.add_argument("--machine", default="cpu", help=f"{', '.join(machine_names())}, or a .json file")
    command.add_argument("--bucket", type=int, default=1, help="rows of a step")
    command.add_argument("--split-tokens", type=int, default=DEFAULT_SPLIT_TOKENS)
    command.add_argument("--stop-after", metavar="PASS", help=f"print the IR after {', '.join(STAGE_NAMES)}")
    command.add_argument(
        "--search",
        action="store_true",
        help="search for a better schedule, up to a minute; on this CPU the best are measured too",
    )
    command.add_argument("--seed", type=int, default=0, help="of the search")
    command.add_argument("--report", action="store_true", help="scratch memory and predicted time as well")
    command.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="where the predicted schedule is drawn"
    )
    command.add_argument("--out", type=Path, help="where the program (msgpack) or the IR is written")
    command.set_defaults(run=compile_command)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (OSError, ValueError) as error:  # the compiler's own errors about its input are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
