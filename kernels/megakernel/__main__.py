"""`python -m megakernel compile MODEL --machine NAME --bucket N`: a model's shape to a frozen program."""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from xdsl.utils.exceptions import VerifyException

from megakernel.graph import DEFAULT_SPLIT_TOKENS, GraphError, usual_formats
from megakernel.machine import Machine, MachineError, load_machine, machine_names
from megakernel.memory import ScratchError
from megakernel.model.load import open_model
from megakernel.model.shape import ModelShape
from megakernel.model.weights import ModelFormatError
from megakernel.passes.context import PlanError
from megakernel.pipeline import STAGE_NAMES, compile_program, encode_program, ir_after
from megakernel.program import Opcode, Program
from megakernel.shapes import SHAPES


class CompiledModel(msgspec.Struct, frozen=True, kw_only=True):
    """What compiling needs of a model."""

    shape: ModelShape
    formats: Mapping[str, str]
    fingerprint: str


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
    return CompiledModel(shape=weights.shape, formats=weights.formats, fingerprint=opened.fingerprint)


def summary(program: Program, machine: Machine) -> str:
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
        "waits": str(sum(len(instruction.waits) for instruction in instructions)),
    }
    return "\n".join(f"{name:14}{value}" for name, value in lines.items())


def compile_command(arguments: argparse.Namespace) -> None:
    model = model_named(arguments.model)
    machine = load_machine(arguments.machine)
    if arguments.stop_after is not None:
        module = ir_after(
            model.shape,
            machine,
            arguments.bucket,
            arguments.stop_after,
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
        split_tokens=arguments.split_tokens,
        formats=model.formats,
    )
    if arguments.out is not None:
        emit(encode_program(program), arguments.out)
    print(summary(program, machine))


def emit(data: bytes, out: Path | None) -> None:
    """To a file, or to standard output."""
    if out is None:
        sys.stdout.write(data.decode())
    else:
        out.write_bytes(data)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m megakernel", description="The megakernel compiler.")
    command = top.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "compile", help="compile a model's decode step for a machine and a row bucket"
    )
    command.add_argument(
        "model", metavar="MODEL", help=f"a .gguf file, a model folder, or one of {', '.join(SHAPES)}"
    )
    command.add_argument("--machine", default="cpu", help=f"{', '.join(machine_names())}, or a .json file")
    command.add_argument("--bucket", type=int, default=1, help="rows of a step")
    command.add_argument("--split-tokens", type=int, default=DEFAULT_SPLIT_TOKENS)
    command.add_argument("--stop-after", metavar="PASS", help=f"print the IR after {', '.join(STAGE_NAMES)}")
    command.add_argument("--out", type=Path, help="where the program (msgpack) or the IR is written")
    command.set_defaults(run=compile_command)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except VerifyException:
        raise  # a pass left invalid IR: a fault of the compiler, not of its input
    except (
        GraphError,
        MachineError,
        ModelFormatError,
        PlanError,
        ScratchError,
        OSError,
        ValueError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
