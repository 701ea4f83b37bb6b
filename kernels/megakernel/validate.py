"""Proves a program safe to run: whatever the timing of its workers, it ends, and computes one result.

Proved are: structure; that every op's output is computed exactly once (columns, rows, K-tiles, heads and
splits); freedom from deadlock; that no scratch page is held twice at a time; and that every two accesses of
a buffer or of KV that conflict are ordered by program order and barriers, the way the graph orders their ops.
Given the weights' formats, also that every tile's pages are as many as it needs. Whether the graph is the
model's is not judged here.
"""

from collections.abc import Mapping

import msgspec

from megakernel.happens_before import execution_order, stream_of, vector_clocks
from megakernel.machine import Machine
from megakernel.program import Program
from megakernel.races import RaceCheck
from megakernel.scratch import check_page_counts, check_pages, check_scratch
from megakernel.structure import check_machine, check_structure


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at; that it exists is the proof."""

    num_instructions: int
    num_waits: int
    num_ordered_accesses: int
    """Accesses found to follow every access that they conflict with."""
    peak_pages: int
    """The most scratch pages a worker holds at once."""


def validate(
    program: Program, machine: Machine | None = None, formats: Mapping[str, str] | None = None
) -> Proof:
    """Raises ScheduleError, which names the instructions at fault.

    `machine` adds the check that workers and scratch pages exist on it; `formats`, by weight name, that each
    instruction holds the pages its tile needs.
    """
    check_structure(program)
    if machine is not None:
        check_machine(program, machine)
        check_scratch(program, machine)
    peak_pages = check_pages(program)
    if formats is not None:
        check_page_counts(program, formats)
    stream = stream_of(program)
    order = execution_order(stream)
    races = RaceCheck(stream, vector_clocks(stream, order))
    races.run()
    return Proof(
        num_instructions=len(stream.instructions),
        num_waits=sum(len(instruction.waits) for instruction in stream.instructions),
        num_ordered_accesses=races.num_ordered,
        peak_pages=peak_pages,
    )
