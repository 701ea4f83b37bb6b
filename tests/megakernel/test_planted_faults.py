"""Faults planted in random cases' programs, kernels and weights: each shows, under emulation or op by op."""

import random
from collections.abc import Callable
from zlib import crc32

import msgspec
import pytest

from megakernel.build import INCLUDE_FOLDER
from megakernel.cuda_constants import MAX_LOADS_AHEAD
from megakernel.emulation_errors import (
    DeadlockError,
    EmulationError,
    InFlightError,
    RaceError,
    UninitialisedError,
)
from megakernel.footprint import stages_attention
from megakernel.memory import role_of
from megakernel.program import Instruction, Opcode, OpKind, PageRole, Program
from megakernel.schedule_error import ScheduleError
from megakernel.validate import validate
from megakernel.vm_state import Arithmetic, OpWeights
from tests.megakernel.emulated_cases import Case, draw_case
from tests.megakernel.op_by_op import check_ops
from tests.megakernel.test_cuda_kernels import (
    IN_BLOCKS,
    check_blocks_of_input,
    check_whole_step,
    model_of,
)

CASES = {"K in blocks": 31, "bucket 32": 33}
CASE_OF_INPUT_IN_BLOCKS, CASE_OF_ONE_BIT, CASE_OF_THREE_SPLITS = 18, 45, 3
CASES_WITH_PARTS_OF_HEADS = {"K in blocks": 16, "K whole": 30}
NUM_INTERLEAVINGS = 30
NUM_CASES = 48
CASES_A_GROUP = 8
LINEAR = (Opcode.LINEAR, Opcode.LINEAR_ACCUMULATE)

Change = Callable[[int, Instruction], Instruction]
"""Of an instruction and its index in its worker's order."""


def changed(program: Program, change: Change) -> Program:
    workers = tuple(
        tuple(change(index, one) for index, one in enumerate(worker)) for worker in program.workers
    )
    return msgspec.structs.replace(program, workers=workers)


def without_waits(program: Program, rng: random.Random) -> Program:
    """An op's, in all layers."""
    waiting = sorted(
        {
            (role_of(program.ops[one.op]), one.opcode)
            for worker in program.workers
            for one in worker
            if one.waits and one.opcode in LINEAR and role_of(program.ops[one.op]) != "head"
        }
    )
    role, opcode = rng.choice(waiting) if waiting else ("", None)

    def change(_: int, one: Instruction) -> Instruction:
        is_meant = role_of(program.ops[one.op]) == role and one.opcode is opcode
        return msgspec.structs.replace(one, waits=()) if is_meant else one

    return changed(program, change)


def with_early_loads(program: Program, _: random.Random) -> Program:
    """Weights come as early as may be, into pages that are still held."""

    def change(index: int, one: Instruction) -> Instruction:
        early = max(0, index - MAX_LOADS_AHEAD)
        pages = tuple(
            msgspec.structs.replace(use, live_from=early) if use.role is PageRole.WEIGHTS else use
            for use in one.pages
        )
        return msgspec.structs.replace(one, pages=pages)

    return changed(program, change)


def with_tiles_one_off(program: Program, rng: random.Random) -> Program:
    """An op's first tile is computed twice and its last not at all."""
    roles = sorted({role_of(program.ops[one.op]) for one in every(program) if can_shift(program, one)})
    role = rng.choice(roles) if roles else ""

    def change(_: int, one: Instruction) -> Instruction:
        is_meant = role_of(program.ops[one.op]) == role and one.opcode in LINEAR
        if not is_meant or one.n0 == 0:
            return one
        width = next(other.n1 for other in every(program) if other.op == one.op and other.n0 == 0)
        return msgspec.structs.replace(one, n0=one.n0 - width, n1=one.n1 - width)

    return changed(program, change)


def every(program: Program) -> list[Instruction]:
    return [one for worker in program.workers for one in worker]


def can_shift(program: Program, one: Instruction) -> bool:
    """Whether an op has several tiles of one width."""
    if one.opcode not in LINEAR or role_of(program.ops[one.op]) == "head":
        return False
    widths = {other.n1 - other.n0 for other in every(program) if other.op == one.op}
    return len(widths) == 1 and widths != {program.ops[one.op].out_features}


def without_arrivals(program: Program, rng: random.Random) -> Program:
    """A worker forgets to say that it is done."""
    awaited = {wait.counter for one in every(program) for wait in one.waits}
    counter = rng.choice(sorted(awaited))
    worker = next(
        number for number, path in enumerate(program.workers) if any(one.signal == counter for one in path)
    )
    workers = list(program.workers)
    workers[worker] = tuple(
        msgspec.structs.replace(one, signal=-1) if one.signal == counter else one for one in workers[worker]
    )
    return msgspec.structs.replace(program, workers=tuple(workers))


FAULTS = {
    "dropped waits": (without_waits, (RaceError, UninitialisedError)),
    "early page reuse": (with_early_loads, (InFlightError, RaceError)),
    "tiles one off": (with_tiles_one_off, (UninitialisedError, RaceError, AssertionError)),
    "a dropped arrival": (without_arrivals, DeadlockError),
}
"""How a program is broken, and how that shows."""


def check_interleavings(case: Case, edit=None, flags=()) -> None:
    """Until one is found wrong."""
    weights, kv = case.weights(), case.kv()
    op_weights = OpWeights(weights, Arithmetic.CUDA)
    model = model_of(case, weights, edit, flags)
    for seed in range(NUM_INTERLEAVINGS):
        found = model.run(case.program.bucket, kv, case.rows, seed=seed, has_journal=True)
        check_ops(case.program, op_weights, kv, found, case.rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_programs_are_caught(fault, name):
    plant, error = FAULTS[fault]
    case = draw_case(CASES[name])
    check_fault(case, plant(case.program, random.Random(1)), error)


def check_fault(case: Case, program: Program, error) -> None:
    with pytest.raises(ScheduleError):
        validate(program)
    with pytest.raises(error):
        check_interleavings(msgspec.structs.replace(case, program=program))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_CASES, CASES_A_GROUP))
def test_faults_of_random_cases_are_caught(first):
    """Each case with one fault; what the validator still proves safe is none."""
    planted = [is_planted_and_caught(seed) for seed in range(first, first + CASES_A_GROUP)]
    assert sum(planted) > CASES_A_GROUP / 2


def is_planted_and_caught(seed: int) -> bool:
    plant, error = FAULTS[list(FAULTS)[seed % len(FAULTS)]]
    case = draw_case(seed)
    program = plant(case.program, random.Random(seed))
    try:
        validate(program)
    except ScheduleError:
        try:
            check_fault(case, program, error)
        except BaseException as failure:
            failure.add_note(str(case))
            raise
        return True
    return False


BLOCK_FAULTS = {
    "blocks of K that overlap": (
        "u1 = u0 + kLoadUnits < kUnits ? u0 + kLoadUnits : kUnits;\n                const uint32_t x0",
        "u1 = u0 + kLoadUnits + (load == 0);\n                const uint32_t x0",
    ),
    "a block that is not waited for": (
        "                wait_landed(w);\n                if (load == 0)",
        "if (load == 0)",
    ),
    "pages told free before they are": (
        "accumulate<F, kRows, kGroups, kInputUnits>(w, c, page_of(load), input, count, u0, u1, x0);\n"
        "                if (load + 1 == kLoads) continue;  // the tile's output keeps the last one's pages\n"
        "                report_progress(w);\n                w.next(1);",
        "const SharedAddress page = page_of(load);"
        "if (load + 1 < kLoads) { report_progress(w); w.next(1); }"
        "accumulate<F, kRows, kGroups, kInputUnits>(w, c, page, input, count, u0, u1, x0);",
    ),
}
"""What is replaced of ops/linear.h, and by what."""


def with_fault(tmp_path, header: str, right: str, wrong: str) -> tuple[str, ...]:
    """Flags for a compiler that then sees the changed header."""
    text = (INCLUDE_FOLDER / header).read_text()
    assert text.count(right) == 1
    changed_header = tmp_path / header
    changed_header.parent.mkdir(parents=True)
    changed_header.write_text(text.replace(right, wrong))
    return f"-iquote{tmp_path}", f"-DHEADRACE_FAULT={crc32(wrong.encode())}"


def check_is_caught(tmp_path, header: str, fault: tuple[str, str], case: Case) -> None:
    flags = with_fault(tmp_path, header, *fault)
    with pytest.raises((EmulationError, AssertionError)):
        check_interleavings(case, flags=flags)


@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_faults_between_blocks_of_k_are_caught(fault, tmp_path):
    check_is_caught(tmp_path, "cuda/ops/linear.h", BLOCK_FAULTS[fault], draw_case(CASES["K in blocks"]))


COPIES_ARE_THERE = "    ptx::copy_async_wait<0>();\n    sync_consumers();\n}"


def test_an_input_that_is_not_waited_for_is_caught(tmp_path):
    fault = COPIES_ARE_THERE, COPIES_ARE_THERE.replace("sync_consumers();", "")
    check_is_caught(tmp_path, "cuda/ops/input.h", fault, draw_case(CASE_OF_INPUT_IN_BLOCKS))


def test_rows_that_are_copied_and_not_waited_for_are_caught(tmp_path):
    flags = with_fault(tmp_path, "cuda/ops/input.h", COPIES_ARE_THERE, COPIES_ARE_THERE.partition("\n")[2])
    with pytest.raises(InFlightError):
        check_blocks_of_input("BF16", IN_BLOCKS, flags=flags)


BLOCK_IS_THERE = "    ptx::copy_async_wait<0>();\n    sync_consumers();  // this block"
NEXT = (
    "if (k0 + kStaged < kPadded) "
    "copy_input<kRows, kIn, kPadded, kStaged>(w, source.rows, r0, count, k0 + kStaged, other);"
)
BLOCKED_INPUT_FAULTS = {
    "multiplied before it has come": (BLOCK_IS_THERE, "    sync_consumers();  // this block"),
    "the next where this one is": (NEXT, NEXT.replace("other", "here")),
    "the next before this one has been read": (
        f"sync_consumers();  // this block is there, and the one before has been read\n    {NEXT}",
        f"{NEXT} sync_consumers();",
    ),
}
"""What is replaced of ops/input.h, and by what."""


@pytest.mark.parametrize("fault", BLOCKED_INPUT_FAULTS)
@pytest.mark.parametrize("format", ["BF16", "Q4_1"])
def test_faults_between_blocks_of_an_input_are_caught(fault, format, tmp_path):
    flags = with_fault(tmp_path, "cuda/ops/input.h", *BLOCKED_INPUT_FAULTS[fault])
    with pytest.raises((EmulationError, AssertionError)):
        check_blocks_of_input(format, IN_BLOCKS, flags=flags)


COPY_FAULTS = {
    "not weighted": ("pack_pair<F>(value * weighted_by, 0)", "pack_pair<F>(value, 0)"),
    "squares of half the columns": (
        "mask < kSquaredColumns; mask *= 2",
        "mask < kSquaredColumns / 2; mask *= 2",
    ),
    "squares beside their place": (
        "(row * columns + column) / kSquaredColumns",
        "(row * columns + column) / kSquaredColumns + 1",
    ),
}
"""What is replaced of rows.h, and by what."""


@pytest.mark.parametrize("fault", COPY_FAULTS)
def test_faults_of_what_is_stored_for_the_next_norm_are_caught(fault, tmp_path):
    flags = with_fault(tmp_path, "cuda/rows.h", *COPY_FAULTS[fault])
    with pytest.raises((EmulationError, AssertionError)):
        check_blocks_of_input("BF16", IN_BLOCKS, flags=flags)


STAGING_FAULTS = {
    "a copy fewer waited for": ("ptx::copy_async_wait<1>()", "ptx::copy_async_wait<2>()"),
    "values where keys are": ("slots, Shape::kPartOfTokens, is_wanted", "slots, 0, is_wanted"),
    "warps on top of each other": (
        "w.warp * (Shape::kTokens * Shape::kTokenBytes)",
        "w.warp * ((Shape::kTokens - 1) * Shape::kTokenBytes)",
    ),
    "before other lanes have read": ("ptx::sync_warp();  // the tokens before have been read", ""),
    "before other lanes' copies are there": (
        "ptx::copy_async_wait<1>();\n        ptx::sync_warp();",
        "ptx::copy_async_wait<1>();",
    ),
}
"""What is replaced of ops/attention_split.h, and by what."""


@pytest.mark.parametrize("fault", STAGING_FAULTS)
def test_faults_of_keys_and_values_in_shared_memory_are_caught(fault, tmp_path):
    case = draw_case(CASES["bucket 32"])
    assert stages_attention(case.program)
    check_is_caught(tmp_path, "cuda/ops/attention_split.h", STAGING_FAULTS[fault], case)


MERGE_FAULTS = {
    "before the others' are there": ("num_splits, kCounterWait", "1, kCounterWait"),
    "arrivals not set back": ("ptx::store_global(arrivals, uint32_t{0});", ""),
    "by two": ("first_of(tile) == 0", "first_of(tile) <= 1"),
    "arrivals before what the warps made": (
        "sync_consumers();  // what the warps made of the splits is there",
        "",
    ),
}
"""What is replaced of ops/attention.h, and by what."""


@pytest.mark.parametrize("fault", MERGE_FAULTS)
def test_faults_of_merged_splits_are_caught(fault, tmp_path):
    case = draw_case(CASE_OF_THREE_SPLITS)
    assert ("splits", 3) in case.covers()
    check_is_caught(tmp_path, "cuda/ops/attention.h", MERGE_FAULTS[fault], case)


LAST = "const bool is_last = ptx::add_acquire_release(arrived, kColumns) == kDim - kColumns;"
HEAD_FAULTS = {
    "finished by the first": (LAST, LAST.replace("kDim - kColumns", "0")),
    "arrivals not set back": ("if (is_last) ptx::store_global(arrived, 0u);", ""),
    "sums read without acquire": (
        LAST,
        "uint32_t seen = 0, before = 1;"
        "while (before != seen)"
        "  if (before = ptx::compare_exchange(arrived, seen, seen + kColumns); before != seen) {"
        "    seen = before;"
        "    before = seen + 1;"
        "  }"
        "const bool is_last = seen == kDim - kColumns;",
    ),
    "arrival before the warps' sums": (
        "        sync_consumers();\n        if (w.thread == 0) {\n            uint32_t* arrived",
        "        if (w.thread == 0) {\n            uint32_t* arrived",
    ),
}
"""What is replaced of ops/epilogue.h, and by what."""


@pytest.mark.parametrize("name", CASES_WITH_PARTS_OF_HEADS)
@pytest.mark.parametrize("fault", HEAD_FAULTS)
def test_faults_of_heads_that_several_tiles_make_up_are_caught(fault, name, tmp_path):
    case = draw_case(CASES_WITH_PARTS_OF_HEADS[name])
    assert case.tiles_a_head > 1
    check_is_caught(tmp_path, "cuda/ops/epilogue.h", HEAD_FAULTS[fault], case)


def test_one_bit_of_the_weights_is_caught_op_by_op_and_not_by_the_whole_step():
    case = draw_case(CASE_OF_ONE_BIT)
    weights, kv = case.weights(), case.kv()
    op_weights, model = OpWeights(weights, Arithmetic.CUDA), model_of(case, weights)
    for op in case.program.ops:
        if op.kind is not OpKind.LINEAR:
            continue
        at = model.generated.layout.at(*op.weights).offset  # of the first column's first number the last bit
        model.packed[at] ^= 1
        found = model.run(case.program.bucket, kv, case.rows, has_journal=True)
        check_whole_step(case, op_weights, kv, found)
        with pytest.raises(AssertionError, match=op.name):
            check_ops(case.program, op_weights, kv, found, case.rows)
        model.packed[at] ^= 1
