"""What no CUDA kernel is generated for is refused, by name."""

import msgspec
import pytest

from megakernel.codegen_limits import CodegenError
from megakernel.cuda_constants import MAX_LOADS_AHEAD
from megakernel.cuda_limits import check_cuda_programs
from megakernel.machine import load_machine
from megakernel.program import Opcode, PageRole, PageUse
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import tiny_weights

SIZES = {"hidden_size": 256, "intermediate_size": 192, "max_context_tokens": 512, "vocab_size": 163}
RECIPE = Recipe(workers=2, split_tokens=128, stats_span=32, k_tiles={"qkv": 2})


def programs(*buckets: int, recipe: Recipe = RECIPE, **sizes: int) -> list:
    shape = tiny_weights(0, **{**SIZES, **sizes}).shape
    return [build_program(shape, msgspec.structs.replace(recipe, bucket=bucket)) for bucket in buckets]


def changed(**fields: object) -> Recipe:
    return msgspec.structs.replace(RECIPE, **fields)


def with_hidden_size(size: int):
    program = programs(1)[0]
    return msgspec.structs.replace(
        program, geometry=msgspec.structs.replace(program.geometry, hidden_size=size)
    )


def with_instruction(opcode: Opcode, **fields: object) -> list:
    """One program, whose first instruction of that kind is another."""
    program = programs(8)[0]
    worker = next(w for w, path in enumerate(program.workers) if any(i.opcode is opcode for i in path))
    path = list(program.workers[worker])
    at = next(index for index, instruction in enumerate(path) if instruction.opcode is opcode)
    path[at] = msgspec.structs.replace(path[at], **fields)
    workers = list(program.workers)
    workers[worker] = tuple(path)
    return [msgspec.structs.replace(program, workers=tuple(workers))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: programs(1, 8, 64),
        lambda: programs(1, num_heads=16, num_kv_heads=1),
        lambda: programs(1, head_dim=256, num_heads=1, num_kv_heads=1),
        lambda: programs(1, head_dim=64, recipe=changed(tile_columns={"qkv": 32})),
    ],
)
def test_what_kernels_take_passes(make):
    check_cuda_programs(make(), machine=load_machine("l4"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (list, "at least one program"),
        (lambda: programs(8, 1), "ascending by bucket"),
        (lambda: programs(1, 65), "bucket 65 has more than 64 rows"),
        (lambda: [*programs(1), *programs(8, recipe=changed(workers=3))], "the same workers"),
        (lambda: [*programs(1), *programs(8, num_layers=1)], "buckets 1 and 8 differ in geometry, ops"),
        (lambda: programs(1, head_dim=48), "head_dim is 48; CUDA kernels take 16, 32, 64, 128, 256"),
        (lambda: programs(1, head_dim=8), "head_dim is 8;"),
        (lambda: programs(1, hidden_size=264), "hidden_size is 264"),
        (lambda: [with_hidden_size(8208)], "hidden_size is 8208; CUDA kernels take up to 8192"),
        (lambda: with_instruction(Opcode.LINEAR, x0=64), "its input is not divided in 128s"),
        (lambda: programs(1, intermediate_size=200, recipe=changed(swiglu_group=8)), "intermediate_size is"),
        (lambda: programs(1, num_heads=17, num_kv_heads=1), "17 query heads share a KV head"),
        (lambda: programs(1, recipe=changed(split_tokens=64)), "split_tokens is 64; CUDA kernels take 128"),
        (lambda: programs(1, recipe=changed(stats_span=24)), "stats_span is 24; CUDA kernels take 32"),
        (lambda: programs(1, recipe=changed(swiglu_group=32)), "swiglu_group is 32"),
        (lambda: with_instruction(Opcode.LINEAR, n0=8), r"o, columns \[8, .*whole groups of 16"),
        (lambda: with_instruction(Opcode.REDUCE, n1=24), "whole groups of 16"),
        (lambda: programs(1, head_dim=64, recipe=changed(tile_columns={"qkv": 48})), "heads of 64 nor"),
        (lambda: with_instruction(Opcode.LINEAR_PARTIAL, k0=64), r"of K \[64, .*divided in 128s"),
    ],
)
def test_what_kernels_do_not_take_is_refused(make, message):
    with pytest.raises(CodegenError, match=message):
        check_cuda_programs(make())


def test_the_last_group_of_a_vocabulary_may_be_short():
    program = programs(1)[0]
    ends = {i.n1 for path in program.workers for i in path if program.ops[i.op].name == "head"}
    assert 163 in ends
    check_cuda_programs([program])


def test_loads_are_counted_only_so_far_ahead():
    program = programs(8)[0]
    path = program.workers[0]
    loading = [at for at, i in enumerate(path) if any(use.role is PageRole.WEIGHTS for use in i.pages)]
    late = loading[-1]
    for ahead in (7, 8):
        pages = (PageUse(PageRole.WEIGHTS, 0, 1, loading[-1 - ahead]),)
        instruction = msgspec.structs.replace(path[late], pages=pages)
        changed_path = (*path[:late], instruction, *path[late + 1 :])
        changed_program = msgspec.structs.replace(program, workers=(changed_path, program.workers[1]))
        if ahead > MAX_LOADS_AHEAD:
            with pytest.raises(CodegenError, match="before those of more than 7 tiles are used"):
                check_cuda_programs([changed_program])
        else:
            check_cuda_programs([changed_program])


def test_kv_is_kept_in_half_precision_alone():
    with pytest.raises(CodegenError, match="KV as float32"):
        check_cuda_programs(programs(1), kv_format="float32")


def test_a_machine_must_have_the_memory_and_the_multiprocessors():
    machine = load_machine("l4")
    program = msgspec.structs.replace(programs(1)[0], num_pages=82, page_bytes=1024)
    check_cuda_programs([program], machine=machine)
    too_large = msgspec.structs.replace(program, num_pages=83)
    with pytest.raises(CodegenError, match="takes 102400 bytes of shared memory, 17408 of them reserved"):
        check_cuda_programs([too_large], machine=machine)
    with pytest.raises(CodegenError, match="2 workers; l4 has 1 SMs"):
        check_cuda_programs([program], machine=msgspec.structs.replace(machine, num_workers=1))
