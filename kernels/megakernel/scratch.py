"""Scratch pages of a program: held by one use at a time, within what there is, and enough for each tile."""

from collections.abc import Mapping

from megakernel.machine import Machine
from megakernel.memory import footprint, page_needs
from megakernel.program import PageRole, Program
from megakernel.schedule_error import Hazard, ScheduleError, instruction_name


def check_pages(program: Program) -> int:
    """No page is held twice at a time, and all exist. Returns the most pages any worker holds at once."""
    peak = 0
    for worker, sequence in enumerate(program.workers):
        held_until: dict[int, int] = {}
        uses = sorted(
            ((use.live_from, index, use) for index, i in enumerate(sequence) for use in i.pages),
            key=lambda entry: entry[:2],
        )
        for live_from, index, use in uses:
            name = f"{instruction_name(program, worker, index)}: {use.role} pages"
            last = use.first + use.count
            if use.first < 0 or use.count < 1 or last > program.num_pages:
                raise ScheduleError(
                    Hazard.SCRATCH, f"{name} [{use.first}, {last}), of {program.num_pages} there are"
                )
            if not 0 <= live_from <= index:
                raise ScheduleError(
                    Hazard.SCRATCH, f"{name} held from instruction {live_from}, after its own or before all"
                )
            for page in range(use.first, last):
                other = held_until.get(page, -1)
                if other >= live_from:
                    raise ScheduleError(
                        Hazard.SCRATCH,
                        f"{name} [{use.first}, {last}) from instruction {live_from} on: page {page} is held"
                        f" by {instruction_name(program, worker, other)}",
                    )
                held_until[page] = index
            peak = max(peak, sum(until >= live_from for until in held_until.values()))
    return peak


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
    scratch = program.num_pages * program.page_bytes
    if scratch > machine.scratch_bytes:
        raise ScheduleError(
            Hazard.SCRATCH,
            f"{program.num_pages} pages of {program.page_bytes} bytes, where a worker of {machine.name} has"
            f" {machine.scratch_bytes} bytes",
        )
