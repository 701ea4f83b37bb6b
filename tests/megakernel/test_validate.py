"""What the validator says of each kind of fault, and that it accepts what is right, at any size."""

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.happens_before import execution_order, stream_of, vector_clocks
from megakernel.hazards import find_hazard, runnable_without
from megakernel.machine import Machine
from megakernel.program import (
    Buffer,
    Epilogue,
    Instruction,
    Op,
    Opcode,
    OpKind,
    Program,
    Prologue,
    Space,
    Wait,
)
from megakernel.schedule_error import Hazard, ScheduleError
from megakernel.shapes import SHAPES
from megakernel.validate import validate
from tests.megakernel.mutations import MUTATIONS, NUM_BARRIER_MUTATIONS
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import tiny_weights

SHAPE = tiny_weights(max_context_tokens=64, num_layers=1).shape
QWEN3_1_7B = SHAPES["qwen3-1.7b"]
K_SPLIT = {"qkv": 2, "o": 3, "gate_up": 2, "down": 3, "head": 2}


@pytest.fixture(scope="module")
def program() -> Program:
    """Two workers, a counter an op: embed 0, qkv 1, attention 2, o 3, gate_up 4, down 5, head 6."""
    return build_program(SHAPE, Recipe(workers=2))


def change(program, worker, index, **fields) -> Program:
    streams = [list(sequence) for sequence in program.workers]
    streams[worker][index] = msgspec.structs.replace(streams[worker][index], **fields)
    return msgspec.structs.replace(program, workers=tuple(tuple(stream) for stream in streams))


def place(program, op_name, is_wanted=lambda instruction: True) -> tuple[int, int]:
    """Worker and index of the first such instruction."""
    return next(
        (worker, index)
        for worker, sequence in enumerate(program.workers)
        for index, instruction in enumerate(sequence)
        if program.ops[instruction.op].name == op_name and is_wanted(instruction)
    )


def refused(program, hazard) -> str:
    with pytest.raises(ScheduleError) as caught:
        validate(program)
    assert caught.value.hazard is hazard, caught.value
    return str(caught.value)


@given(
    workers=st.integers(1, 6),
    bucket=st.sampled_from([1, 2, 4, 8]),
    row_tiles=st.integers(1, 3),
    barriers=st.sampled_from(["op", "running", "pairs"]),
    k_tiles=st.sampled_from([{}, {"down": 2}, K_SPLIT]),
    attention_parts=st.integers(1, 4),
    stages=st.integers(1, 4),
    architecture=st.sampled_from(["llama", "qwen2", "qwen3"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_correct_programs_are_accepted(architecture, **recipe):
    shape = tiny_weights(0, architecture, num_layers=1, max_context_tokens=64).shape
    proof = validate(build_program(shape, Recipe(**recipe)))
    assert proof.num_ordered_accesses > proof.num_instructions > 0


@pytest.mark.parametrize("barriers", ["op", "running"])
def test_a_full_size_model_on_92_workers_is_accepted_and_its_missing_wait_is_found(barriers):
    recipe = Recipe(
        workers=92,
        barriers=barriers,
        split_tokens=128,
        stats_span=256,
        attention_parts=11,
        tile_columns={"gate_up": 64, "embed": 256, "o": 64, "down": 64},
        k_tiles={"down": 2},
    )
    program = build_program(QWEN3_1_7B, recipe)
    assert validate(program).num_instructions > 12_000
    worker, index = place(program, "layers.20.o", lambda i: i.waits)
    message = refused(change(program, worker, index, waits=()), Hazard.RAW)
    assert f"layers.20.o LINEAR columns [{program.workers[worker][index].n0}," in message
    assert "written by layers.20.attention" in message


@given(st.integers(0, 10_000), st.sampled_from(["op", "running", "pairs"]))
@settings(max_examples=40, deadline=None)
def test_what_clocks_call_earlier_is_earlier_in_every_order(seed, barriers):
    """Held to the brute-force oracle, on programs with up to three broken waits or signals."""
    rng = random.Random(seed)
    program = build_program(SHAPE, Recipe(workers=3, barriers=barriers, seed=seed))
    exact = True
    for _ in range(rng.randrange(4)):
        mutant = MUTATIONS[rng.randrange(NUM_BARRIER_MUTATIONS)](rng, program)
        program, exact = mutant or program, False
    stream = stream_of(program)
    try:
        order = execution_order(stream)
    except ScheduleError:
        return
    clocks = vector_clocks(stream, order)
    precedes = clocks[:, stream.workers] > stream.positions
    certain = ~runnable_without(program, order)
    assert not (precedes & ~certain).any()
    if exact:
        np.testing.assert_array_equal(precedes, certain)


def test_a_missing_wait_names_reader_writer_and_buffer(program):
    worker, index = place(program, "layers.0.gate_up", lambda i: i.waits)
    message = refused(change(program, worker, index, waits=()), Hazard.RAW)
    assert message.startswith("read after write: layers.0.gate_up LINEAR columns")
    assert f"(worker {worker}, instruction {index}) reads columns [0, 48) rows [0, 1) of hidden" in message
    assert "written by layers.0.o LINEAR columns" in message
    assert "(worker " + str(1 - worker) in message


def test_a_weakened_target_is_not_enough(program):
    worker, index = place(program, "head", lambda i: i.waits)
    wait = program.workers[worker][index].waits[0]
    weaker = (Wait(wait.counter, wait.target - 1),)
    assert "of hidden, written by layers.0.down" in refused(
        change(program, worker, index, waits=weaker), Hazard.RAW
    )


def test_overwriting_what_is_still_read_is_found():
    """Two layers share `queries`: the second's qkv must wait for the first's attention."""
    program = build_program(tiny_weights(max_context_tokens=64).shape, Recipe(workers=2, barriers="pairs"))
    found = set()
    for worker, sequence in enumerate(program.workers):
        for index, instruction in enumerate(sequence):
            if instruction.waits:
                with pytest.raises(ScheduleError) as caught:
                    validate(change(program, worker, index, waits=()))
                found.add(caught.value.hazard)
    assert Hazard.RAW in found
    assert found <= {Hazard.RAW, Hazard.WAR, Hazard.WAW}


def test_waiting_in_a_circle_names_all_who_wait(program):
    worker, index = place(program, "embed")
    message = refused(change(program, worker, index, waits=(Wait(1, 1),)), Hazard.DEADLOCK)
    assert f"embed EMBED columns [{program.workers[worker][index].n0}," in message
    assert "waits for 1 arrivals at counter 1, which gets 0 (" in message
    assert f"(worker {1 - worker}, " in message


def test_more_arrivals_than_signals_is_a_deadlock(program):
    worker, index = place(program, "layers.0.down", lambda i: i.waits)
    total = program.workers[worker][index].waits[0].target
    message = refused(change(program, worker, index, waits=(Wait(4, total + 1),)), Hazard.DEADLOCK)
    assert f"waits for {total + 1} arrivals at counter 4, which gets {total} ({total} instructions" in message


@pytest.mark.parametrize(
    ("op", "fields", "hazard", "message"),
    [
        (
            "layers.0.o",
            {"n0": 1},
            Hazard.COVERAGE,
            "no instruction of layers.0.o computes columns [0, 1)",
        ),
        ("layers.0.o", {"n0": 0, "n1": 48}, Hazard.COVERAGE, "of hidden: computed by both layers.0.o LINEAR"),
        ("layers.0.o", {"n1": 49}, Hazard.STRUCTURE, "the op's range is [0, 48)"),
        ("layers.0.qkv", {"n1": 8}, Hazard.STRUCTURE, "does not start and end at multiples of 16"),
        ("layers.0.o", {"r1": 2}, Hazard.STRUCTURE, "the bucket has 1 rows"),
        ("layers.0.o", {"opcode": Opcode.REDUCE}, Hazard.STRUCTURE, "the op takes LINEAR"),
        ("layers.0.o", {"op": 99}, Hazard.STRUCTURE, "op 99 LINEAR"),
        ("layers.0.o", {"k0": 16}, Hazard.STRUCTURE, "waits in the middle of a tile"),
        ("layers.0.o", {"k0": 16, "waits": ()}, Hazard.STRUCTURE, "begins at 16 of K"),
        ("layers.0.o", {"k1": 80}, Hazard.STRUCTURE, "K range [0, 80), which is to be the whole of K"),
        ("layers.0.o", {"signal": 7}, Hazard.STRUCTURE, "signals counter 7, of 7"),
        ("layers.0.o", {"waits": (Wait(3, 0),)}, Hazard.STRUCTURE, "waits for 0 arrivals"),
        ("layers.0.attention", {"part": 2}, Hazard.STRUCTURE, "of 2 parts, where there are 4 splits"),
        ("layers.0.attention", {"num_parts": 3}, Hazard.COVERAGE, "of attention"),
    ],
)
def test_faults_of_one_instruction_are_named(program, op, fields, hazard, message):
    worker, index = place(program, op, lambda i: i.n0 == 0 and i.part == 0)
    refusal = refused(change(program, worker, index, **fields), hazard)
    assert message in refusal


def test_k_tiles_that_leave_out_or_repeat_products_are_found():
    program = build_program(SHAPE, Recipe(workers=2, k_tiles={"down": 3}))
    is_second = {"is_wanted": lambda i: i.opcode is Opcode.LINEAR_PARTIAL and i.part == 1}
    worker, index = place(program, "layers.0.down", **is_second)
    message = refused(change(program, worker, index, k0=16), Hazard.COVERAGE)
    assert "K-tile 1 is [" in message
    streams = [
        [
            msgspec.structs.replace(i, k0=33) if i.opcode is Opcode.LINEAR_PARTIAL and i.part == 1 else i
            for i in sequence
        ]
        for sequence in program.workers
    ]
    everywhere = msgspec.structs.replace(program, workers=tuple(tuple(s) for s in streams))
    assert "layers.0.down: K-tiles 0: [0, 32], 1: [33, 64]" in refused(everywhere, Hazard.COVERAGE)


def test_pages_held_twice_or_beyond_the_scratch_are_named(program):
    worker, index = place(program, "layers.0.o", lambda i: len(i.pages) == 3)
    weights, source, output = program.workers[worker][index].pages
    same = msgspec.structs.replace(output, first=source.first)
    message = refused(change(program, worker, index, pages=(weights, source, same)), Hazard.SCRATCH)
    assert f"page {source.first} is held by layers.0.o LINEAR" in message
    beyond = msgspec.structs.replace(output, count=9)
    message = refused(change(program, worker, index, pages=(beyond,)), Hazard.SCRATCH)
    assert f"output pages [5, 14) from instruction {index} on, of {program.num_pages} there" in message
    late = msgspec.structs.replace(output, live_from=index + 1)
    assert "after its own" in refused(change(program, worker, index, pages=(late,)), Hazard.SCRATCH)


def test_graph_and_buffers_must_fit_each_other(program):
    ops = list(program.ops)
    ops[4] = msgspec.structs.replace(ops[4], input=0)
    message = refused(msgspec.structs.replace(program, ops=tuple(ops)), Hazard.STRUCTURE)
    assert "op layers.0.gate_up: buffer token has 1 columns, 48 are needed" in message
    ops[4] = msgspec.structs.replace(ops[4], input=77)
    message = refused(msgspec.structs.replace(program, ops=tuple(ops)), Hazard.STRUCTURE)
    assert "op layers.0.gate_up: input buffer 77 is not one of" in message


def test_an_op_that_nobody_computes_is_missing():
    program = build_program(SHAPE, Recipe(workers=1))
    kept = tuple(i for i in program.workers[0] if program.ops[i.op].name != "head")
    bare = tuple(msgspec.structs.replace(i, pages=()) for i in kept)
    message = refused(msgspec.structs.replace(program, workers=(bare,)), Hazard.COVERAGE)
    assert "no instruction of head computes columns [0, 160) rows [0, 1) of logits" in message


def test_a_program_fits_its_machine(program):
    machine = Machine(
        name="test",
        kind="cpu",
        num_workers=2,
        scratch_bytes=6 * 4096,
        page_bytes=4096,
        bandwidth_gb_s=10.0,
        worker_bandwidth_gb_s=5.0,
        load_latency_us=1.0,
        sync_us=1.0,
        macs_per_us={"F32": 1000.0},
        instruction_us=0.1,
    )
    assert validate(program, machine).peak_pages <= 6
    for fields, message in (
        ({"name": "other"}, "compiled for machine 'test', not 'other'"),
        ({"num_workers": 1}, "2 workers, where test has 1"),
        ({"scratch_bytes": 8192}, "6 pages of 4096 bytes, where a worker of test has 8192 bytes"),
    ):
        with pytest.raises(ScheduleError, match=message):
            validate(program, msgspec.structs.replace(machine, **fields))


HEADS = {"token": 1, "queries": 32, "other": 32, "kv": 64, "next_kv": 64, "parts": 64}
"""Columns of buffers, for one Q head of 32 columns and its K and V."""
ALL_OF_QKV = (Wait(0, 2), Wait(1, 2), Wait(2, 2))


def qkv_of_two_workers(following: Op, *paths: tuple[Instruction, ...]) -> Program:
    """On a GPU, each head of two tiles, one a worker: number i of a worker signals counter i. `paths` are
    what follows on each worker."""
    names = list(HEADS)
    op = Op(
        index=0,
        kind=OpKind.LINEAR,
        name="layers.0.qkv",
        layer=0,
        input=names.index("token"),
        output=names.index("queries"),
        kv=names.index("kv"),
        in_features=1,
        out_features=96,
        epilogue=Epilogue.ROPE_APPEND,
    )
    spaces = {"token": Space.INPUT, "kv": Space.KV, "next_kv": Space.KV}
    base = build_program(SHAPE, Recipe())
    return msgspec.structs.replace(
        base,
        kind="cuda",
        geometry=msgspec.structs.replace(base.geometry, num_heads=1, num_kv_heads=1, head_dim=32),
        buffers=tuple(
            Buffer(index=index, name=name, space=spaces.get(name, Space.ACTIVATION), columns=columns)
            for index, (name, columns) in enumerate(HEADS.items())
        ),
        ops=(op, following),
        partial_buffers=(-1, names.index("parts") if following.epilogue is Epilogue.STORE else -1),
        workers=tuple(
            tuple(tile(0, 32 * head + 16 * worker, signal=head) for head in range(3)) + path
            for worker, path in enumerate(paths)
        ),
        num_counters=4,
    )


def tile(op: int, n0: int, **fields: object) -> Instruction:
    one = Instruction(opcode=Opcode.LINEAR, op=op, n0=n0, n1=n0 + 16, r1=1)
    return msgspec.structs.replace(one, **fields)


@pytest.mark.parametrize("output", ["queries", "other"])
def test_a_head_s_tiles_come_after_all_that_made_it_up_before(output):
    """Its sums are in memory that all ops share: their own columns, buffers or not, are not enough."""
    names = list(HEADS)
    following = Op(
        index=1,
        kind=OpKind.LINEAR,
        name="layers.1.qkv",
        layer=1,
        input=names.index("token"),
        output=names.index(output),
        kv=names.index("next_kv"),
        in_features=1,
        out_features=96,
        epilogue=Epilogue.ROPE_APPEND,
    )

    def program(*waits: Wait) -> Program:
        """`waits`: of the second op on worker 1."""
        first = tuple(tile(1, 32 * head, waits=(wait,)) for head, wait in enumerate(ALL_OF_QKV))
        second = tuple(tile(1, 32 * head + 16, waits=waits[head : head + 1]) for head in range(3))
        return qkv_of_two_workers(following, first, second)

    validate(program(*ALL_OF_QKV))
    assert find_hazard(program(*ALL_OF_QKV)) is None
    early = program(*ALL_OF_QKV[:2])
    message = refused(early, Hazard.WAR)
    assert message.startswith("write after read: layers.1.qkv LINEAR columns [80, 96)")
    assert "finished by layers.0.qkv LINEAR columns [64, 80)" in message
    assert find_hazard(early) is not None


def test_a_column_is_there_once_all_tiles_of_its_head_are_done():
    """A reader knows of its own columns' tile, and not of the other: whichever was last wrote them."""
    names = list(HEADS)
    following = Op(
        index=1,
        kind=OpKind.LINEAR,
        name="layers.0.o",
        layer=0,
        input=names.index("queries"),
        output=names.index("other"),
        in_features=32,
        out_features=32,
        epilogue=Epilogue.STORE,
    )

    def program(*waits: Wait) -> Program:
        """Each worker reads the columns that are its own tile's."""
        parts = [
            tile(1, 0, opcode=Opcode.LINEAR_PARTIAL, n1=32, k0=16 * part, k1=16 * part + 16, part=part)
            for part in range(2)
        ]
        parts = [msgspec.structs.replace(part, num_parts=2, waits=waits) for part in parts]
        second = msgspec.structs.replace(parts[1], signal=3)
        reduce = tile(1, 0, opcode=Opcode.REDUCE, n1=32, num_parts=2, waits=(Wait(3, 1),))
        return qkv_of_two_workers(following, (parts[0], reduce), (second,))

    validate(program(Wait(0, 2)))
    assert find_hazard(program(Wait(0, 2))) is None
    message = refused(program(), Hazard.RAW)
    assert "layers.0.o LINEAR_PARTIAL" in message
    assert "written by layers.0.qkv LINEAR columns [16, 32)" in message
    assert find_hazard(program()) is not None


@pytest.mark.parametrize(("n0", "n1"), [(8, 24), (0, 12), (4, 12), (0, 24)])
def test_a_tile_is_whole_heads_or_an_equal_part_of_one(n0, n1):
    recipe = Recipe(workers=2, attention_parts=2, tile_columns={"qkv": 8})
    program = msgspec.structs.replace(build_program(SHAPE, recipe), kind="cuda")
    worker, index = place(program, "layers.0.qkv", lambda one: one.n0 == 0)
    message = refused(change(program, worker, index, n0=n0, n1=n1), Hazard.STRUCTURE)
    assert "neither whole heads of 16 nor an equal part of one" in message


NUMBERS = st.sampled_from([-2, -1, 0, 1, 2, 3, 5, 16, 48, 96, 1000])
OP_FIELDS = ("index", "input", "output", "kv", "stats", "in_features", "out_features")
GEOMETRY_FIELDS = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "max_context_tokens")
PROGRAM_FIELDS = ("bucket", "split_tokens", "swiglu_group", "stats_span", "num_counters", "num_pages")


@given(data=st.data(), k_tiles=st.sampled_from([{}, {"o": 2}]))
@settings(max_examples=150, deadline=None)
def test_any_wrong_number_is_refused_and_nothing_crashes(data, k_tiles):
    """A change that is accepted has left the program as good as it was."""
    program = build_program(SHAPE, Recipe(workers=2, k_tiles=k_tiles))
    part = data.draw(st.sampled_from(["op", "kinds", "buffer", "geometry", "program", "partial"]))
    value = data.draw(NUMBERS)
    if part in ("op", "kinds"):
        index = data.draw(st.integers(0, len(program.ops) - 1))
        fields = {data.draw(st.sampled_from(OP_FIELDS)): value}
        if part == "kinds":
            fields = data.draw(
                st.one_of(
                    st.fixed_dictionaries({"kind": st.sampled_from(OpKind)}),
                    st.fixed_dictionaries({"prologue": st.sampled_from(Prologue)}),
                    st.fixed_dictionaries({"epilogue": st.sampled_from(Epilogue)}),
                )
            )
        ops = list(program.ops)
        ops[index] = msgspec.structs.replace(ops[index], **fields)
        changed = msgspec.structs.replace(program, ops=tuple(ops))
    elif part == "buffer":
        index = data.draw(st.integers(0, len(program.buffers) - 1))
        buffers = list(program.buffers)
        buffers[index] = msgspec.structs.replace(buffers[index], columns=value)
        changed = msgspec.structs.replace(program, buffers=tuple(buffers))
    elif part == "geometry":
        fields = {data.draw(st.sampled_from(GEOMETRY_FIELDS)): value}
        geometry = msgspec.structs.replace(program.geometry, **fields)
        changed = msgspec.structs.replace(program, geometry=geometry)
    elif part == "program":
        changed = msgspec.structs.replace(program, **{data.draw(st.sampled_from(PROGRAM_FIELDS)): value})
    else:
        index = data.draw(st.integers(0, len(program.ops) - 1))
        partials = [*program.partial_buffers[:index], value, *program.partial_buffers[index + 1 :]]
        changed = msgspec.structs.replace(program, partial_buffers=tuple(partials))
    try:
        validate(changed)
    except ScheduleError:
        return
    assert find_hazard(changed) is None
