import re

import msgspec
import pytest

from megakernel.artifact import lay_out_weights
from megakernel.codegen_cpu import generate
from megakernel.codegen_limits import CodegenError
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import tiny_weights

WEIGHTS = tiny_weights(0, "qwen2")
RECIPE = Recipe(workers=2, k_tiles={"down": 2})


def programs(*buckets: int, recipe: Recipe = RECIPE, shape=WEIGHTS.shape):
    return [build_program(shape, msgspec.structs.replace(recipe, bucket=bucket)) for bucket in buckets]


def test_equal_programs_give_equal_source():
    first, second = (generate(programs(1, 8), WEIGHTS.formats) for _ in range(2))
    assert first == second


def test_each_worker_and_bucket_has_a_function_with_one_call_an_instruction():
    made = programs(1, 8)
    source = generate(made, WEIGHTS.formats).source
    for program in made:
        for worker, instructions in enumerate(program.workers):
            body = source.split(f"bool rows{program.bucket}_worker{worker}(")[1].split("\n}\n")[0]
            assert len(re.findall(r"w\.reach\(\d+\)", body)) == len(instructions)
            calls = re.findall(r"^  (?:linear|reduce|attention|embed)<", body, flags=re.MULTILINE)
            assert len(calls) == len(instructions)
            assert len(re.findall(r"w\.wait\(", body)) == sum(len(each.waits) for each in instructions)
            assert "switch" not in body


def test_an_input_is_prepared_once_for_all_of_a_workers_tiles():
    program = programs(1, recipe=Recipe(workers=1, tile_columns={"gate_up": 32}))[0]
    source = generate([program], WEIGHTS.formats).source
    num_linear_ops = sum(bool(op.weights) and op.name != "embed" for op in program.ops)
    assert len(re.findall(r"^  prepare_", source, flags=re.MULTILINE)) == num_linear_ops
    assert source.count("// 0: embed") == 1


def test_what_is_for_logits_alone_runs_where_some_row_wants_them():
    program = programs(8)[0]
    last_kv_op = max(index for index, op in enumerate(program.ops) if op.name.endswith(".qkv"))
    source = generate([program], WEIGHTS.formats).source
    for worker, instructions in enumerate(program.workers):
        body = source.split(f"bool rows8_worker{worker}(")[1].split("\n}\n")[0]
        parts = re.split(r"^  // \d+: .*$", body, flags=re.MULTILINE)[1:]
        for instruction, part in zip(instructions, parts, strict=True):
            is_for_logits = instruction.op > last_kv_op
            assert ("  if (s.head.num_rows() > 0) {" in part) == is_for_logits
            if is_for_logits:
                fetched = re.findall(r"s\.weights \+ \d+, (.*)\)\) return", part)
                assert all(
                    re.fullmatch(r"0|s\.head\.(num_rows\(\)|num_full) > 0 \? \d+ : 0", lines)
                    for lines in fetched
                )


def test_a_tied_head_and_the_embedding_lie_there_once():
    tied = lay_out_weights(programs(1)[0], WEIGHTS.formats)
    assert [names for names in tied.segments if "embed" in names] == [("embed",)]
    untied_weights = tiny_weights(0, "qwen2", has_tied_head=False)
    untied = lay_out_weights(programs(1, shape=untied_weights.shape)[0], untied_weights.formats)
    assert untied.num_bytes > tied.num_bytes
    assert ("head",) in untied.segments


def test_segments_do_not_overlap():
    layout = lay_out_weights(programs(1)[0], WEIGHTS.formats)
    ends = [0]
    for segment in sorted(layout.segments.values(), key=lambda segment: segment.offset):
        assert segment.offset >= ends[-1]
        assert segment.offset % 4096 == 0
        ends.append(segment.offset + segment.num_bytes)
    assert ends[-1] <= layout.num_bytes


def test_weights_of_an_op_in_several_formats_are_packed_as_f32():
    formats = {**WEIGHTS.formats, "layers.0.q": "F16", "layers.0.o": "Q6_K"}
    layout = lay_out_weights(programs(1)[0], formats)
    assert layout.at("layers.0.q", "layers.0.k", "layers.0.v").format == "F32"
    assert layout.at("layers.0.o").format == "F32"


def test_buckets_share_buffers():
    small, both = (generate(programs(*buckets), WEIGHTS.formats) for buckets in ((8,), (1, 8)))
    assert both.buffer_offsets == small.buffer_offsets
    assert all(offset % 64 == 0 for offset in both.buffer_offsets.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (list, "at least one program"),
        (lambda: programs(8, 1), "ascending by bucket"),
        (lambda: programs(512), "bucket 512 has more than 256 rows"),
        (
            lambda: [*programs(1), *programs(8, recipe=Recipe(workers=3, k_tiles={"down": 2}))],
            "the same workers",
        ),
        (lambda: [*programs(1), *programs(8, shape=tiny_weights(0).shape)], "buckets 1 and 8 differ in ops"),
        (lambda: programs(1, shape=tiny_weights(0, "qwen2", head_dim=8).shape), "head_dim is 8"),
    ],
)
def test_what_kernels_cannot_run_is_refused(make, message):
    with pytest.raises(CodegenError, match=message):
        generate(make(), WEIGHTS.formats)
