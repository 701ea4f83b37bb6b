"""The simulator by table on hand-made programs, and its laws on whole ones."""

from itertools import pairwise

import msgspec
import pytest

from megakernel.bubbles import bubbles
from megakernel.cost import (
    SimulationError,
    bandwidth_bound_us,
    ends_by_op,
    extrapolated_us,
    simulate,
)
from megakernel.machine import Machine, MachineError, load_machine
from megakernel.memory import plan_pages
from megakernel.pipeline import compile_program
from megakernel.program import (
    Buffer,
    Geometry,
    Instruction,
    Op,
    Opcode,
    OpKind,
    PageRole,
    PageUse,
    Program,
    Space,
    Wait,
)
from megakernel.shapes import SHAPES
from megakernel.timeline import predicted_timeline
from megakernel.work import Work, WorkTable, grouped_rows, work_of
from tests.megakernel.model.model_files import tiny_shape
from tests.megakernel.programs import Recipe, build_program

L20 = load_machine("l20")
FORMATS = {"w": "F32"}
K = 250
"""With F32 weights a tile of n columns is n KB: n microseconds at 1 GB/s."""

PLAIN = Machine(
    name="plain",
    kind="cuda",
    num_workers=2,
    scratch_bytes=1 << 20,
    page_bytes=1024,
    bandwidth_gb_s=2.0,
    worker_bandwidth_gb_s=1.0,
    load_latency_us=0.0,
    sync_us=3.0,
    macs_per_us={"F32": 250.0},
    instruction_us=0.0,
)
"""Loads and computes a column a microsecond; reading the input row costs a quarter of a microsecond."""

PROLOGUE_US = 2 * K * 4 / 4e3
"""The input is read, and kept as floats: 1 KB each, four times as fast as from memory."""


def tile(columns: int, *, waits=(), signal=-1, live_from=None) -> Instruction:
    pages = () if live_from is None else (PageUse(PageRole.WEIGHTS, 0, 1, live_from),)
    return Instruction(
        opcode=Opcode.LINEAR,
        op=0,
        n0=0,
        n1=columns,
        k1=K,
        r1=1,
        waits=tuple(Wait(0, target) for target in waits),
        signal=signal,
        pages=pages,
    )


def program_of(*workers: list[Instruction]) -> Program:
    buffers = (
        Buffer(index=0, name="x", space=Space.INPUT, columns=K),
        Buffer(index=1, name="y", space=Space.OUTPUT, columns=100),
    )
    op = Op(
        index=0,
        kind=OpKind.LINEAR,
        name="layers.0.down",
        layer=0,
        input=0,
        output=1,
        in_features=K,
        out_features=100,
        weights=("w",),
    )
    geometry = Geometry(
        num_layers=1,
        hidden_size=K,
        intermediate_size=K,
        num_heads=1,
        num_kv_heads=1,
        head_dim=K,
        vocab_size=100,
        max_context_tokens=128,
        rms_norm_eps=1e-6,
    )
    return Program(
        model_fingerprint="f",
        machine="plain",
        bucket=1,
        geometry=geometry,
        split_tokens=128,
        swiglu_group=16,
        stats_span=256,
        buffers=buffers,
        ops=(op,),
        partial_buffers=(-1,),
        workers=tuple(map(tuple, workers)),
        num_counters=1,
        num_pages=1,
        page_bytes=1024,
    )


P = PROLOGUE_US
TABLE = [
    ("load, then compute", [[tile(4)]], {}, [[8 + P]]),
    ("computed while it is loaded", [[tile(16)]], {"computes_while_loading": True}, [[16 + (16 + P) / 16]]),
    ("latency comes on top", [[tile(4)]], {"load_latency_us": 0.5}, [[8.5 + P + 0.5]]),
    ("fixed cost", [[tile(4)]], {"instruction_us": 0.25}, [[8.25 + P]]),
    ("nothing ahead: load after load", [[tile(4), tile(4)]], {}, [[8 + P, 16 + P]]),
    ("one ahead: loaded while the first computes", [[tile(4), tile(4, live_from=0)]], {}, [[8 + P, 12 + P]]),
    ("each worker at its own rate", [[tile(4)], [tile(4)]], {}, [[8 + P], [8 + P]]),
    ("shared bandwidth", [[tile(4)], [tile(4)]], {"bandwidth_gb_s": 1.0}, [[12 + P], [12 + P]]),
    ("a short load frees bandwidth", [[tile(2)], [tile(4)]], {"bandwidth_gb_s": 1.0}, [[6 + P], [10 + P]]),
    ("a barrier costs a sync", [[tile(4, signal=0)], [tile(4, waits=[1])]], {}, [[8 + P], [15 + 2 * P]]),
    (
        "weights come in at a barrier",
        [[tile(8, signal=0)], [tile(4), tile(4, waits=[1], live_from=0)]],
        {},
        [[16 + P], [8 + P, 23 + P]],
    ),
    (
        "two arrivals",
        [[tile(1, signal=0), tile(1, signal=0)], [tile(1, waits=[2])]],
        {},
        [[2 + P, 4 + P], [8 + 2 * P]],
    ),
    ("a wait for nothing", [[tile(4, waits=[0])]], {}, [[8 + P]]),
]


@pytest.mark.parametrize(
    ("workers", "change", "ends"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_timeline_of_a_hand_made_program(workers, change, ends):
    trace = simulate(program_of(*workers), msgspec.structs.replace(PLAIN, **change), FORMATS)
    assert [list(times) for times in trace.ends_us] == [pytest.approx(times) for times in ends]
    assert trace.makespan_us == max(max(times) for times in trace.ends_us)


def test_stalls_are_told_by_reason():
    workers = [[tile(8, signal=0)], [tile(4, waits=[1]), tile(2)]]
    stalls = simulate(program_of(*workers), PLAIN, FORMATS).stalls
    assert stalls.barrier_us == pytest.approx(16 + P + 3)
    assert stalls.load_us == pytest.approx(8 + 2)
    assert stalls.busy_us == pytest.approx(8 + P + 4 + P + 2)
    assert stalls.idle_us == pytest.approx((4 + P + 2) + 3 + 2)


def test_bubbles_are_what_the_timeline_calls_so():
    program = tiny_program(bucket=2, k_tiles={"down": 3})
    timeline = predicted_timeline(program, L20)
    expected = sum(bubble.us for bubble in bubbles(timeline)) / timeline.total_us
    assert simulate(program, L20).bubble_share == pytest.approx(expected)
    assert 0 < expected < 1


def test_a_wait_in_vain_is_an_error_that_names_it():
    with pytest.raises(SimulationError, match=r"worker 1 .* instruction 0 \(layers\.0\.down\).*1 of 2"):
        simulate(program_of([tile(4, signal=0)], [tile(4, waits=[2])]), PLAIN, FORMATS)


@pytest.mark.parametrize(("rows", "paid"), [(1, 8), (8, 8), (9, 16), (64, 64)])
def test_rows_are_paid_for_in_groups(rows, paid):
    assert grouped_rows(rows, L20) == paid


def test_a_format_without_a_rate_is_refused():
    machine = msgspec.structs.replace(PLAIN, macs_per_us={"Q4_0": 1.0})
    with pytest.raises(MachineError, match="F32"):
        simulate(program_of([tile(4)]), machine, FORMATS)


def tiny_program(**recipe: object) -> Program:
    program = build_program(tiny_shape("qwen3", num_layers=3), Recipe(**recipe))
    return plan_pages(program, msgspec.structs.replace(L20, num_workers=3))


@pytest.mark.parametrize("barriers", ["op", "running", "pairs"])
@pytest.mark.parametrize("k_tiles", [{}, {"down": 3, "qkv": 2}])
def test_no_step_is_faster_than_its_bytes(barriers, k_tiles):
    program = tiny_program(barriers=barriers, k_tiles=k_tiles, bucket=4)
    trace = simulate(program, L20)
    assert trace.makespan_us >= bandwidth_bound_us(program, L20) > 0
    assert simulate(program, L20) == trace
    for starts, ends in zip(trace.starts_us, trace.ends_us, strict=True):
        assert all(start <= end for start, end in zip(starts, ends, strict=True))
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


@pytest.mark.parametrize("name", ["l4", "l20", "rtx4090"])
def test_more_of_anything_is_never_slower(name):
    machine = load_machine(name)
    program = tiny_program(bucket=2, k_tiles={"down": 3})
    scales = (1, 4, 16)
    for change in (
        [{"bandwidth_gb_s": 20.0 * scale} for scale in scales],
        [{"worker_bandwidth_gb_s": 0.5 * scale} for scale in scales],
        [{"sync_us": 16.0 / scale} for scale in scales],
        [{"macs_per_us": {"BF16": 1e3 * scale}} for scale in scales],
    ):
        times = [
            simulate(program, msgspec.structs.replace(machine, **fields)).makespan_us for fields in change
        ]
        assert all(later <= earlier for earlier, later in pairwise(times))


def test_a_longer_context_costs_more_and_only_attention():
    program = tiny_program()
    (attention,) = {op.index for op in program.ops if op.name == "layers.0.attention"}
    instruction = next(i for worker in program.workers for i in worker if i.op == attention and i.part == 0)
    near, far = (work_of(program, L20, instruction, None, tokens).load_bytes for tokens in (8, 64))
    assert far > near > 0
    assert bandwidth_bound_us(program, L20, None, 64) > bandwidth_bound_us(program, L20, None, 8)


def attention_works(machine: Machine, context_tokens: int, **options: bool) -> dict[int, Work]:
    """By part, of one KV head in the first layer: 8 rows, splits of 16 tokens."""
    program = tiny_program(bucket=8)
    return {
        i.part: work_of(program, machine, i, None, context_tokens, **options)
        for worker in program.workers
        for i in worker
        if program.ops[i.op].name == "layers.0.attention" and i.n0 == 0
    }


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_rows_read_one_context_or_each_its_own(kind):
    machine = msgspec.structs.replace(L20, kind=kind)
    shape = tiny_shape("qwen3", num_layers=3)
    for tokens in (16, 20, 64):
        shared = attention_works(machine, tokens)
        own = attention_works(machine, tokens, is_shared=False)
        heads = sum(work.load_bytes for work in shared.values()) / (tokens * shape.head_dim * 2 * 2)
        assert heads == int(heads) >= 1
        for part, work in own.items():
            assert work.load_bytes == 8 * shared[part].load_bytes
            assert work.compute_us == shared[part].compute_us


def test_on_a_gpu_what_lies_past_the_context_costs_an_instruction_and_nothing_else():
    works = attention_works(L20, 16)
    assert works.pop(0).load_bytes > 0
    assert works
    assert set(works.values()) == {Work(0.0, 0.0, 0.0)}


def test_on_a_gpu_rows_and_splits_of_an_instruction_wait_for_their_reads_in_turn():
    slow, slower = (msgspec.structs.replace(L20, load_latency_us=latency) for latency in (1.0, 2.0))
    own, later = (attention_works(machine, 16, is_shared=False)[0] for machine in (slow, slower))
    assert own.is_direct
    assert later.latency_us - own.latency_us == pytest.approx(
        8
    )  # the queries' and those of rows after the first
    assert attention_works(slow, 16)[0].latency_us > own.latency_us  # read again, from the cache
    assert not attention_works(msgspec.structs.replace(slow, kind="cpu"), 16)[0].is_direct


def test_attention_of_a_gpu_reads_once_its_waits_are_over_and_beside_the_loader():
    program = tiny_program(bucket=2)
    machine = msgspec.structs.replace(L20, num_workers=3)
    trace = simulate(program, machine, None, 64, is_shared=False)
    works = WorkTable(program, machine, None, 64, is_shared=False)
    direct = 0
    for worker, ready, starts in zip(program.workers, trace.ready_us, trace.starts_us, strict=True):
        for instruction, satisfied, start in zip(worker, ready, starts, strict=True):
            work = works(instruction)
            if work.is_direct:
                alone_us = work.load_bytes / (machine.worker_bandwidth_gb_s * 1e3)
                assert start - satisfied >= alone_us + machine.load_latency_us - 1e-9
                direct += 1
    assert direct


def test_attention_and_prologues_have_rates_of_their_own_where_these_are_stated():
    program = tiny_program(bucket=4, k_tiles={"down": 2})

    def works(**changes: float | None) -> dict[str, Work]:
        machine = msgspec.structs.replace(L20, **({"attention_macs_per_us": None} | changes))
        instructions = (instruction for worker in program.workers for instruction in worker)
        computing = [i for i in instructions if i.part == 0 and i.opcode is not Opcode.REDUCE]
        return {program.ops[i.op].name: work_of(program, machine, i) for i in computing}

    usual, stated = works(), works(attention_macs_per_us=L20.macs_per_us["F16"] / 4, prepared_per_us=10.0)
    assert stated["layers.0.attention"].compute_us == 4 * usual["layers.0.attention"].compute_us
    assert stated["layers.0.qkv"].prologue_us == 4 * 64 / 10
    k_tile = 64
    assert stated["layers.0.down"].prologue_us == stated["layers.0.down"].refill_us == 4 * k_tile / 10
    assert stated["layers.0.qkv"].compute_us == usual["layers.0.qkv"].compute_us
    columns = program.geometry.num_heads * program.geometry.head_dim  # attention has merged the splits
    assert stated["layers.0.o"].prologue_us == 4 * columns / 10


def test_ops_end_in_dependency_order():
    program = tiny_program()
    ends = ends_by_op(program, simulate(program, L20))
    in_order = [ends[op.index] for op in program.ops]
    assert in_order == sorted(in_order)


def test_a_few_layers_tell_of_many():
    """A full model of 16 layers within 2% of its first three."""
    shape = SHAPES["llama-3.2-1b"]
    machine = msgspec.structs.replace(L20, num_workers=23)

    def run(layers: int, vocab_size: int) -> tuple[Program, float, float]:
        cut = msgspec.structs.replace(shape, num_layers=layers, vocab_size=vocab_size)
        program = compile_program(cut, "f", machine, 1)
        trace = simulate(program, machine)
        return program, trace.makespan_us, extrapolated_us(program, trace, 16, 8192)

    _, full_us, unchanged_us = run(16, 8192)
    _, _, predicted_us = run(3, 4096)
    assert unchanged_us == full_us
    assert predicted_us == pytest.approx(full_us, rel=0.02)
