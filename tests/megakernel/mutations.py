"""Ways to break a program, each one change; some happen to do no harm."""

import random
from collections.abc import Callable

import msgspec

from megakernel.program import Instruction, Opcode, Program, Wait

Mutation = Callable[[random.Random, Program], Program | None]
"""None where the program has nothing to break that way."""

Streams = list[list[Instruction]]


def drop_wait(rng: random.Random, program: Program) -> Program | None:
    return _change(rng, program, lambda i: i.waits, lambda i: {"waits": _without(rng, i.waits)})


def weaken_target(rng: random.Random, program: Program) -> Program | None:
    def weaker(i: Instruction) -> dict[str, object]:
        at = rng.choice([n for n, w in enumerate(i.waits) if w.target > 1])
        return {"waits": _with(i.waits, at, target=rng.randrange(1, i.waits[at].target))}

    return _change(rng, program, lambda i: any(w.target > 1 for w in i.waits), weaker)


def raise_target(rng: random.Random, program: Program) -> Program | None:
    def higher(i: Instruction) -> dict[str, object]:
        at = rng.randrange(len(i.waits))
        return {"waits": _with(i.waits, at, target=i.waits[at].target + rng.choice((1, 1, 5)))}

    return _change(rng, program, lambda i: i.waits, higher)


def wait_on_another_counter(rng: random.Random, program: Program) -> Program | None:
    def other(i: Instruction) -> dict[str, object]:
        at = rng.randrange(len(i.waits))
        return {"waits": _with(i.waits, at, counter=rng.randrange(program.num_counters))}

    return _change(rng, program, lambda i: i.waits, other)


def move_wait_later(rng: random.Random, program: Program) -> Program | None:
    """To the next instruction of the worker."""
    streams, places = _streams(program), _places(program, lambda i: i.waits)
    places = [(w, n) for w, n in places if n + 1 < len(streams[w])]
    if not places:
        return None
    worker, index = rng.choice(places)
    now, following = streams[worker][index : index + 2]
    streams[worker][index] = msgspec.structs.replace(now, waits=())
    streams[worker][index + 1] = msgspec.structs.replace(following, waits=now.waits + following.waits)
    return _with_streams(program, streams)


def drop_signal(rng: random.Random, program: Program) -> Program | None:
    return _change(rng, program, lambda i: i.signal >= 0, lambda i: {"signal": -1})


def signal_another_counter(rng: random.Random, program: Program) -> Program | None:
    counter = rng.randrange(program.num_counters)
    return _change(rng, program, lambda i: i.signal >= 0, lambda i: {"signal": counter})


def swap_order(rng: random.Random, program: Program) -> Program | None:
    """Of two instructions of a worker, barriers and pages staying or going along."""
    streams = _streams(program)
    worker = rng.choice([w for w, stream in enumerate(streams) if len(stream) > 1])
    stream = streams[worker]
    first = rng.randrange(len(stream) - 1)
    second = first + 1 if rng.random() < 0.7 else rng.randrange(first + 1, len(stream))
    stays = ("waits", "signal", "pages") if rng.random() < 0.5 else ("pages",)
    a, b = stream[first], stream[second]
    stream[first] = msgspec.structs.replace(b, **{name: getattr(a, name) for name in stays})
    stream[second] = msgspec.structs.replace(a, **{name: getattr(b, name) for name in stays})
    return _with_streams(program, streams)


def move_to_another_worker(rng: random.Random, program: Program) -> Program | None:
    """Without pages, so that it is the order that is judged."""
    streams = _without_pages(program)
    if len(streams) < 2:
        return None
    source = rng.choice([w for w, stream in enumerate(streams) if stream])
    target = rng.choice([w for w in range(len(streams)) if w != source])
    index = rng.randrange(len(streams[source]))
    moved = streams[source].pop(index)
    near = min(len(streams[target]), max(0, index + rng.randrange(-2, 3)))
    streams[target].insert(near, moved)
    return _with_streams(program, streams)


def duplicate(rng: random.Random, program: Program) -> Program | None:
    streams = _without_pages(program)
    worker = rng.choice([w for w, stream in enumerate(streams) if stream])
    index = rng.randrange(len(streams[worker]))
    copy = streams[worker][index]
    if rng.random() < 0.5:
        copy = msgspec.structs.replace(copy, signal=-1)
    streams[rng.choice((worker, rng.randrange(len(streams))))].insert(index + 1, copy)
    return _with_streams(program, streams)


def drop_instruction(rng: random.Random, program: Program) -> Program | None:
    """What it signalled, its worker's instruction before does instead, where that signals nothing."""
    streams = _without_pages(program)
    worker = rng.choice([w for w, stream in enumerate(streams) if stream])
    index = rng.randrange(len(streams[worker]))
    dropped = streams[worker].pop(index)
    if index and streams[worker][index - 1].signal < 0:
        streams[worker][index - 1] = msgspec.structs.replace(
            streams[worker][index - 1], signal=dropped.signal
        )
    return _with_streams(program, streams)


def change_range(rng: random.Random, program: Program) -> Program | None:
    """Shift, shrink or stretch a tile: of columns, of K, or of rows."""
    low, high = rng.choice((("n0", "n1"), ("n0", "n1"), ("k0", "k1"), ("r0", "r1")))
    step = rng.choice((1, 8, 16, 32, 64)) * rng.choice((1, -1)) if low != "r0" else rng.choice((1, -1))
    moved = rng.choice(((low, high), (low,), (high,)))

    def changed(i: Instruction) -> dict[str, object]:
        return {name: getattr(i, name) + step for name in moved}

    return _change(rng, program, lambda i: low != "k0" or i.opcode is Opcode.LINEAR_PARTIAL, changed)


def wrong_part(rng: random.Random, program: Program) -> Program | None:
    def other(i: Instruction) -> dict[str, object]:
        return {"part": rng.randrange(i.num_parts + 1)}

    return _change(rng, program, lambda i: i.num_parts > 1, other)


def wrong_number_of_parts(rng: random.Random, program: Program) -> Program | None:
    def other(i: Instruction) -> dict[str, object]:
        return {"num_parts": max(1, i.num_parts + rng.choice((-1, 1)))}

    return _change(rng, program, lambda i: i.num_parts > 1, other)


def exchange_parts(rng: random.Random, program: Program) -> Program | None:
    """Two K-tiles or attention parts of one tile, on whichever workers, take each other's number."""
    streams = _streams(program)
    first = rng.choice(_places(program, lambda i: i.num_parts > 1) or [None])
    if first is None:
        return None
    one = streams[first[0]][first[1]]
    same = ("opcode", "op", "n0", "n1", "r0", "r1")
    others = _places(
        program,
        lambda i: i.part != one.part and all(getattr(i, name) == getattr(one, name) for name in same),
    )
    if not others:
        return None
    second = rng.choice(others)
    two = streams[second[0]][second[1]]
    streams[first[0]][first[1]] = msgspec.structs.replace(one, part=two.part)
    streams[second[0]][second[1]] = msgspec.structs.replace(two, part=one.part)
    return _with_streams(program, streams)


def change_pages(rng: random.Random, program: Program) -> Program | None:
    """Elsewhere, more of them, fewer, or held from another instruction on."""
    name = rng.choice(("first", "count", "live_from"))

    def changed(i: Instruction) -> dict[str, object]:
        pages = list(i.pages)
        at = rng.randrange(len(pages))
        value = getattr(pages[at], name) + rng.choice((-2, -1, 1, 2))
        pages[at] = msgspec.structs.replace(pages[at], **{name: value})
        return {"pages": tuple(pages)}

    return _change(rng, program, lambda i: i.pages, changed)


def wrong_op(rng: random.Random, program: Program) -> Program | None:
    """The same tile of another op of that kind: such as the same op of another layer."""
    ops = program.ops

    def others(i: Instruction) -> list[int]:
        mine = ops[i.op]
        same = [op.index for op in ops if op.kind is mine.kind and op.epilogue is mine.epilogue]
        return [index for index in same if index != i.op]

    return _change(rng, program, others, lambda i: {"op": rng.choice(others(i))})


MUTATIONS: tuple[Mutation, ...] = (
    drop_wait,
    weaken_target,
    raise_target,
    wait_on_another_counter,
    move_wait_later,
    drop_signal,
    signal_another_counter,
    swap_order,
    move_to_another_worker,
    duplicate,
    drop_instruction,
    change_range,
    wrong_part,
    wrong_number_of_parts,
    exchange_parts,
    change_pages,
    wrong_op,
)
NUM_BARRIER_MUTATIONS = 7
"""The first of them change waits and signals alone."""


def _streams(program: Program) -> Streams:
    return [list(sequence) for sequence in program.workers]


def _without_pages(program: Program) -> Streams:
    return [[msgspec.structs.replace(i, pages=()) for i in sequence] for sequence in program.workers]


def _with_streams(program: Program, streams: Streams) -> Program:
    return msgspec.structs.replace(program, workers=tuple(tuple(stream) for stream in streams))


def _places(program: Program, can: Callable[[Instruction], object]) -> list[tuple[int, int]]:
    return [
        (worker, index)
        for worker, sequence in enumerate(program.workers)
        for index, instruction in enumerate(sequence)
        if can(instruction)
    ]


def _change(
    rng: random.Random,
    program: Program,
    can: Callable[[Instruction], object],
    change: Callable[[Instruction], dict[str, object]],
) -> Program | None:
    places = _places(program, can)
    if not places:
        return None
    worker, index = rng.choice(places)
    streams = _streams(program)
    instruction = streams[worker][index]
    streams[worker][index] = msgspec.structs.replace(instruction, **change(instruction))
    return None if streams[worker][index] == instruction else _with_streams(program, streams)


def _without(rng: random.Random, waits: tuple[Wait, ...]) -> tuple[Wait, ...]:
    at = rng.randrange(len(waits))
    return waits[:at] + waits[at + 1 :]


def _with(waits: tuple[Wait, ...], at: int, **fields: int) -> tuple[Wait, ...]:
    return (*waits[:at], msgspec.structs.replace(waits[at], **fields), *waits[at + 1 :])
