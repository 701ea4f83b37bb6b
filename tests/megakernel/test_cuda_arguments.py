"""The ctypes twin of step.h, against the header as a compiler reads it."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megakernel.build import INCLUDE_FOLDER
from megakernel.cuda_arguments import (
    LAST_STEP,
    NO_INDEX,
    Failure,
    FailureCode,
    MultiStepArguments,
    RowFlag,
    StepArguments,
)
from megakernel.draft_automaton import EMPTY_KEY, NO_STATE, NO_TOKEN

HEADER = INCLUDE_FOLDER / "cuda" / "step.h"
STRUCTURES = {
    "Failure": Failure,
    "MultiStepArguments": MultiStepArguments,
    "StepArguments": StepArguments,
}
SOURCE = Path(__file__).parent / "native" / "step_arguments.cpp"
COMPILER = shutil.which("g++") or shutil.which("clang++")


def expected() -> set[str]:
    lines = set()
    for name, structure in STRUCTURES.items():
        lines.add(f"{name} sizeof 0 {ctypes.sizeof(structure)}")
        for member, _ in structure._fields_:
            field = getattr(structure, member)
            lines.add(f"{name} {member} {field.offset} {field.size}")
    for values in (RowFlag, FailureCode):
        lines |= {f"{values.__name__} {value.name} {value.value} 0" for value in values}
    numbers = {
        "NO_INDEX": NO_INDEX,
        "LAST_STEP": LAST_STEP,
        "EMPTY_KEY": EMPTY_KEY,
        "NO_TOKEN": NO_TOKEN,
        "NO_STATE": NO_STATE,
    }
    return {*lines, *(f"{name} value {value} 0" for name, value in numbers.items())}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_every_member_lies_where_the_header_has_it(tmp_path):
    shown = " ".join(
        f"SHOW({name}, {member})"
        for name, structure in STRUCTURES.items()
        for member, _ in structure._fields_
    )
    made = tmp_path / "show"
    command = [COMPILER, "-std=c++17", f"-I{INCLUDE_FOLDER}", f"-DMEMBERS={shown}", str(SOURCE), "-o", made]
    subprocess.run(command, check=True, capture_output=True)
    printed = subprocess.run([made], check=True, capture_output=True, text=True).stdout
    assert set(printed.splitlines()) == expected()


def test_the_header_has_no_member_that_the_twin_lacks():
    text = re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8"))
    for name, structure in STRUCTURES.items():
        body = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)[1]
        members = [
            re.sub(r"^.*[\s*]", "", declarator.strip())
            for statement in body.split(";")
            if statement.strip()
            for declarator in statement.split(",")
        ]
        assert members == [member for member, _ in structure._fields_]
