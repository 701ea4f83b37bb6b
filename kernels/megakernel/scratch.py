"""Scratch pages of a program: held by one use at a time, within what there is, and enough for each tile."""

from collections.abc import Mapping
from itertools import accumulate

from megakernel.footprint import footprint, page_needs
from megakernel.machine import Machine
from megakernel.program import PageRole, PageUse, Program
from megakernel.schedule_error import Hazard, ScheduleError, instruction_name


def check_pages(program: Program) -> int:
    """No page is held twice at a time, and all exist. Returns the most pages any worker holds at once."""
    peak = 0
    for worker, sequence in enumerate(program.workers):
        uses = [(use, index) for index, instruction in enumerate(sequence) for use in instruction.pages]
        change = [0] * (len(sequence) + 1)
        held_until: dict[int, int] = {}
        for use, index in sorted(uses, key=lambda entry: (entry[0].live_from, entry[1])):
            _check_use(program, worker, use, index)
            for page in range(use.first, use.first + use.count):
                other = held_until.get(page, -1)
                if other >= use.live_from:
                    raise ScheduleError(
                        Hazard.SCRATCH,
                        f"{_shown(program, worker, use, index)}: page {page} is held by"
                        f" {instruction_name(program, worker, other)}",
                    )
                held_until[page] = index
            change[use.live_from] += use.count
            change[index + 1] -= use.count
        peak = max(peak, max(accumulate(change), default=0))
    return peak


def _check_use(program: Program, worker: int, use: PageUse, index: int) -> None:
    last = use.first + use.count
    if use.first < 0 or use.count < 1 or last > program.num_pages:
        raise ScheduleError(
            Hazard.SCRATCH, f"{_shown(program, worker, use, index)}, of {program.num_pages} there are"
        )
    if not 0 <= use.live_from <= index:
        raise ScheduleError(
            Hazard.SCRATCH, f"{_shown(program, worker, use, index)}, which is after its own or before all"
        )


def _shown(program: Program, worker: int, use: PageUse, index: int) -> str:
    return (
        f"{instruction_name(program, worker, index)}: {use.role} pages [{use.first},"
        f" {use.first + use.count}) from instruction {use.live_from} on"
    )


def check_page_counts(program: Program, formats: Mapping[str, str]) -> None:
    """Every instruction holds the pages that `megakernel.memory` says its tile needs."""
    for worker, sequence in enumerate(program.workers):
        for index, instruction in enumerate(sequence):
            needs = page_needs(footprint(program, instruction, formats), program.page_bytes)
            needed = {
                PageRole.WEIGHTS: needs.weights,
                PageRole.INPUT: needs.input,
                PageRole.OUTPUT: needs.output,
            }
            held = dict.fromkeys(PageRole, 0)
            for use in instruction.pages:
                held[use.role] += use.count
            for role in PageRole:
                if held[role] < needed[role]:
                    raise ScheduleError(
                        Hazard.SCRATCH,
                        f"{instruction_name(program, worker, index)} holds {held[role]} {role} pages of"
                        f" {program.page_bytes} bytes, where its tile needs {needed[role]}",
                    )


def check_scratch(program: Program, machine: Machine) -> None:
    if program.num_pages * program.page_bytes > machine.usable_bytes:
        raise ScheduleError(
            Hazard.SCRATCH,
            f"{program.num_pages} pages of {program.page_bytes} bytes, where a worker of {machine.name} has"
            f" {machine.usable_bytes} bytes for them",
        )
