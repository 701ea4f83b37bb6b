"""What tiles need of an SM, worked out by hand; grains of tiles; bytes of weights as packing makes them."""

from itertools import pairwise

import msgspec
import pytest

from megakernel.footprint import cuda_attention_footprint, cuda_linear_footprint, footprint, max_stages
from megakernel.footprint_cuda import attention_bytes, input_tile_bytes, output_tile_bytes, weight_tile_bytes
from megakernel.graph import STATS_SPANS, uniform_formats
from megakernel.machine import load_machine
from megakernel.memory import ScratchError
from megakernel.pack_cuda import PACKED_FORMATS, group_bytes
from megakernel.passes.context import PlanError
from megakernel.pipeline import compile_program
from megakernel.plan import OpPlan
from megakernel.program import Opcode, PageRole, Program
from megakernel.schedule import geometry_of
from megakernel.shapes import SHAPES
from megakernel.tiles import k_bounds
from tests.megakernel.compiler_cases import cuda_machine, small_plan, small_shape

L20 = load_machine("l20")
SHAPE = small_shape(hidden_size=256, intermediate_size=640, num_heads=8, num_kv_heads=2, head_dim=32)
PLAN = small_plan(
    qkv=OpPlan(tile_columns=32),
    o=OpPlan(tile_columns=16),
    down=OpPlan(tile_columns=48, load_k=256),
    head=OpPlan(tile_columns=32),
)


def compiled(bucket: int = 4, **changes: OpPlan) -> Program:
    plan = msgspec.structs.replace(PLAN, ops=PLAN.ops | changes)
    return compile_program(SHAPE, "f", cuda_machine(), bucket, plan)


@pytest.mark.parametrize(
    ("stored", "columns", "k", "num_bytes"),
    [
        (("Q4_1",), 32, 2048, 2 * 32 * 640),
        (("Q4_0",), 16, 96, 2 * 576),  # K is padded to two units of 64
        (("Q8_0",), 32, 2048, 2 * 32 * 1088),
        (("W4G128",), 48, 576, 3 * 5 * 1088),  # and to five of 128
        (("W8G128",), 16, 128, 2080),
        (("BF16",), 20, 64, 2 * 2048),  # columns to groups of 16
        (("F16", "F16"), 16, 65, 2 * 2048),
        (("F32",), 16, 64, 2048),  # multiplied as BF16
        (("Q4_1", "Q8_0"), 16, 64, 2048),  # as are several formats in one op
    ],
)
def test_weights_are_whole_units_of_whole_column_groups(stored, columns, k, num_bytes):
    assert weight_tile_bytes(stored, columns, k) == num_bytes


@pytest.mark.parametrize("name", PACKED_FORMATS)
@pytest.mark.parametrize("in_features", [576, 1536, 2048, 8960])
def test_k_tiles_together_are_what_is_packed(name, in_features):
    for num_k_tiles in (1, 2, 4):
        bounds = k_bounds(in_features, num_k_tiles, "cuda")
        tiles = [weight_tile_bytes((name,), 48, k1 - k0) for k0, k1 in pairwise(bounds)]
        assert sum(tiles) == 3 * group_bytes(name, in_features)


@pytest.mark.parametrize(
    ("k", "rows", "num_bytes"),
    [
        (2048, 1, 1 * (4096 + 64)),
        (2048, 9, 9 * (4096 + 64)),
        (2048, 64, 16 * (4096 + 64)),
        (576, 2, 2 * (640 * 2 + 64)),
    ],
)
def test_input_is_rows_of_16_bit_numbers(k, rows, num_bytes):
    assert input_tile_bytes(k, rows) == num_bytes


def test_output_is_the_finished_tile():
    assert output_tile_bytes(96, 3) == 3 * 96 * 4
    assert output_tile_bytes(96, 40) == 16 * 96 * 4


def test_attention_holds_what_its_warps_made_of_a_split():
    """Of Qwen2.5-1.5B: six query heads of 128 a KV head."""
    needed = cuda_attention_footprint(geometry_of(SHAPES["qwen2.5-1.5b"]), 128, L20.usable_bytes)
    assert needed.input_bytes == attention_bytes(6, 128) == 8 * 6 * 130 * 4
    assert (needed.weight_stage_bytes, needed.output_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("shape", "machine", "staged_bytes"),
    [
        ("qwen3-1.7b", "h100", 2 * 128 * 128 * 2),
        ("qwen2.5-1.5b", "h100", 2 * 128 * 128 * 2),
        ("llama-3.2-1b", "h100", 2 * 128 * 64 * 2),
        ("qwen3-1.7b", "l20", 0),
    ],
)
def test_keys_and_values_are_staged_where_there_is_room(shape, machine, staged_bytes):
    geometry = geometry_of(SHAPES[shape])
    needed = cuda_attention_footprint(geometry, 128, load_machine(machine).usable_bytes)
    group = geometry.num_heads // geometry.num_kv_heads
    assert needed.input_bytes - attention_bytes(group, geometry.head_dim) == staged_bytes


def test_a_head_tile_of_32_columns_fits_whole():
    """With statistics of 256 columns it would not, in any format."""

    def stages(columns: int, name: str) -> int:
        needed = cuda_linear_footprint(
            columns=columns, k=2048, input_k=2048, in_features=2048, rows=1, stored=(name,)
        )
        return max_stages(needed, L20)

    assert (stages(32, "Q8_0"), stages(32, "W4G128"), stages(256, "W4G128")) == (1, 2, 0)


def test_statistics_span_what_the_kind_of_machine_has():
    assert STATS_SPANS == {"cpu": 256, "cuda": 32}
    program = compiled()
    stats = next(buffer for buffer in program.buffers if buffer.name == "head_stats")
    assert (program.stats_span, stats.columns, program.kind) == (32, 3 * 22, "cuda")


def test_pages_are_held_as_the_footprint_says():
    program = compiled(bucket=16)
    seen = set()
    for instruction in (i for worker in program.workers for i in worker):
        held = {use.role: use.count for use in instruction.pages}
        match instruction.opcode:
            case Opcode.EMBED:
                assert held == {}
            case Opcode.ATTENTION:
                assert held == {PageRole.INPUT: -(-(8 * 4 * 34 * 4 + 2 * 128 * 32 * 2) // 1024)}
            case _:
                assert held.keys() == set(PageRole)
        seen.add(instruction.opcode)
    assert seen == set(Opcode) - {Opcode.LINEAR_PARTIAL, Opcode.REDUCE}


def test_rows_are_taken_in_chunks_of_16():
    chunk, many = (compiled(bucket, down=OpPlan(tile_columns=48)) for bucket in (16, 64))
    for one, other in zip(chunk.workers, many.workers, strict=True):
        assert [i.pages for i in one] == [i.pages for i in other]


def test_what_does_not_fit_is_named_with_all_three_parts():
    message = (
        r"layers\.0\.gate_up: columns \[0, 1280\) of 16 rows need 295936 bytes \(204800 weights, "
        r"9216 input, 81920 output\), 289 pages; a worker of small-gpu has 82 pages"
    )
    with pytest.raises(ScratchError, match=message):
        compiled(bucket=16, gate_up=OpPlan(tile_columns=1280))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed": OpPlan(tile_columns=24)}, "embed: .* multiple of 16, got 24"),
        ({"qkv": OpPlan(tile_columns=24)}, r"layers\.0\.qkv: .* multiple of 16, got 24"),
        (
            {"qkv": OpPlan(tile_columns=48)},
            r"layers\.0\.qkv: tile_columns must divide a head's 32 or be a multiple of them, got 48",
        ),
        ({"o": OpPlan(tile_columns=8)}, r"layers\.0\.o: .* multiple of 16, got 8"),
        ({"gate_up": OpPlan(tile_columns=16)}, "multiple of 32, got 16"),
        ({"head": OpPlan(tile_columns=48)}, "head: .* multiple of 32, got 48"),
        (
            {"attention": OpPlan(tile_columns=2)},
            "attention: CUDA's attention takes one KV head a tile, got 2",
        ),
        ({"o": OpPlan(tile_columns=16, num_k_tiles=2)}, r"layers\.0\.o: num_k_tiles must be 1 to 1, got 2"),
        (
            {"o": OpPlan(tile_columns=16, load_k=64)},
            r"layers\.0\.o: load_k must be a multiple of 128, got 64",
        ),
        (
            {"o": OpPlan(tile_columns=16, load_k=128, input_k=192)},
            r"layers\.0\.o: input_k must be a multiple of load_k, 128, got 192",
        ),
    ],
)
def test_tiles_that_weights_are_not_packed_for_are_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        compiled(**changes)


def test_k_is_cut_at_whole_units_of_every_format():
    assert k_bounds(640, 2, "cuda") == (0, 256, 640)
    assert k_bounds(576, 3, "cuda") == (0, 128, 384, 576)
    program = compiled()
    down = next(op.index for op in program.ops if op.name == "layers.0.down")
    cuts = {(i.k0, i.k1, i.opcode) for w in program.workers for i in w if i.op == down}
    first, second = Opcode.LINEAR_ACCUMULATE, Opcode.LINEAR
    assert cuts == {(0, 256, first), (256, 512, first), (512, 640, second)}


def test_rows_past_a_chunk_take_a_tile_of_several_loads_chunk_by_chunk():
    program = compiled(bucket=40)
    down = next(op.index for op in program.ops if op.name == "layers.0.down")
    own = [i for i in program.workers[0] if i.op == down][:9]
    assert [(i.r0, i.r1, i.k0) for i in own] == [
        (r0, min(40, r0 + 16), k0) for r0 in (0, 16, 32) for k0 in (0, 256, 512)
    ]
    signals = [i.signal >= 0 for i in program.workers[0] if i.op == down]
    assert signals == [False] * (len(signals) - 1) + [True]


def test_formats_of_groups_of_128_are_planned_with_their_padding():
    formats = uniform_formats(SHAPE, "W4G128")
    program = compile_program(SHAPE, "f", cuda_machine(), 1, PLAN, formats=formats)
    tile = next(i for worker in program.workers for i in worker if program.ops[i.op].name == "layers.0.o")
    assert footprint(program, tile, formats).weight_stage_bytes == 2 * 1088
