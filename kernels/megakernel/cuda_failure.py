"""What a kernel said when it gave up, in words."""

from collections.abc import Iterator

from megakernel.cuda_arguments import Failure, FailureCode
from megakernel.cuda_constants import NUM_CONSUMER_WARPS
from megakernel.cuda_counters import split_arrivals_at
from megakernel.program import Program

_SHOWN_SIGNALS = 3


def describe_failure(failure: Failure, program: Program, first_counter: int, epoch: int) -> str:
    """Of the bucket's program, its first counter among all buckets', and the steps before the launch."""
    place = f"SM {failure.block}, warp {failure.warp}, {_instruction(failure, program)}"
    if failure.step:
        place = f"step {failure.step} of the launch, {place}"
    match failure.code:
        case FailureCode.COUNTER_WAIT:
            return f"{place}: {_counter_wait(failure, program, first_counter, epoch + failure.step)}"
        case FailureCode.WEIGHTS_WAIT:
            return f"{place}: weight tile {failure.expected} of this SM has not landed in shared memory"
        case FailureCode.PROGRESS_WAIT:
            return (
                f"{place}: its weights wait until this SM has ended {failure.expected // NUM_CONSUMER_WARPS} "
                f"instructions; {failure.actual} of {failure.expected} arrivals of its warps came"
            )
        case FailureCode.STEP_WAIT:
            return (
                f"{place}: the next step has not begun: {failure.actual} where {failure.expected} is needed"
            )
        case _:
            return f"{place}: failure code {failure.code}, counter {failure.counter}"


def _instruction(failure: Failure, program: Program) -> str:
    worker = program.workers[failure.block] if failure.block < len(program.workers) else ()
    index = failure.instruction - failure.step * len(worker)
    if not 0 <= index < len(worker):
        return f"instruction {index} (after its last instruction)"
    found = worker[index]
    tile = f"{found.opcode.name} of {program.ops[found.op].name}, columns [{found.n0}, {found.n1})"
    return f"instruction {index} ({tile})"


def _counter_wait(failure: Failure, program: Program, first_counter: int, epoch: int) -> str:
    counter = failure.counter - first_counter
    row, num_rows = counter - split_arrivals_at(program), program.bucket
    if 0 <= row < num_rows * program.geometry.num_kv_heads:
        return (
            f"{failure.actual} of {failure.expected} splits of row {row % num_rows}, "
            f"KV head {row // num_rows}, were there"
        )
    if counter == program.num_counters:
        arrivals, signals = len(program.workers), "every SM at its end"
    else:
        producers = list(_producers(program, counter))
        arrivals, signals = len(producers), ", ".join(producers[:_SHOWN_SIGNALS])
        if len(producers) > _SHOWN_SIGNALS:
            signals += f" and {len(producers) - _SHOWN_SIGNALS} more"
    before = (epoch * arrivals) & 0xFFFFFFFF
    expected, actual = ((value - before) & 0xFFFFFFFF for value in (failure.expected, failure.actual))
    if actual > arrivals:  # not even those of earlier steps
        return (
            f"counter {counter} stands at {failure.actual}, before the {before} arrivals of earlier steps; "
            f"{failure.expected} are waited for"
        )
    came = f"counter {counter} had {actual} of {expected} arrivals of this step"
    return f"{came}; it gets {arrivals}, from {signals}"


def _producers(program: Program, counter: int) -> Iterator[str]:
    for sm, worker in enumerate(program.workers):
        for index, instruction in enumerate(worker):
            if instruction.signal == counter:
                yield f"SM {sm}'s instruction {index} ({program.ops[instruction.op].name})"
