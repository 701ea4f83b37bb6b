"""What the CUDA kernels take: row counts, sizes, tiles, shared memory."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from megakernel.codegen_limits import CodegenError, KvFormat, check_same_artifact
from megakernel.cuda_constants import K_BLOCK, MAX_LOADS_AHEAD, RESERVED_BYTES, STATS_SPAN
from megakernel.machine import Machine
from megakernel.packing import GROUP
from megakernel.program import Epilogue, Instruction, Opcode, PageRole, Program, is_within_heads

MAX_ROWS = 64
MAX_HIDDEN_SIZE = 8192
"""A warp sums a row's squares in registers, 16 a lane."""
MAX_GROUP = 16
"""Query heads of a KV head."""
SPLIT_TOKENS = 128
_HEAD_DIMS = (16, 32, 64, 128, 256)


def check_cuda_programs(
    programs: Sequence[Program], *, kv_format: KvFormat = "float16", machine: Machine | None = None
) -> None:
    """Of one artifact. `machine` adds that it has the SMs and the shared memory. Raises CodegenError."""
    check_same_artifact(programs)
    if kv_format != "float16":
        raise CodegenError(f"KV as {kv_format}; CUDA kernels keep it as float16")
    if programs[-1].bucket > MAX_ROWS:
        raise CodegenError(f"bucket {programs[-1].bucket} has more than {MAX_ROWS} rows")
    _check_sizes(programs[0])
    for program in programs:
        _check_tiles(program)
        if machine is not None:
            _check_fits(program, machine)


def _check_sizes(program: Program) -> None:
    geometry = program.geometry
    if geometry.head_dim not in _HEAD_DIMS:
        known = ", ".join(map(str, _HEAD_DIMS))
        raise CodegenError(f"head_dim is {geometry.head_dim}; CUDA kernels take {known}")
    for name in ("hidden_size", "intermediate_size"):
        if (size := getattr(geometry, name)) % GROUP:
            raise CodegenError(f"{name} is {size}; CUDA kernels take multiples of {GROUP}")
    if (size := geometry.hidden_size) > MAX_HIDDEN_SIZE:
        raise CodegenError(f"hidden_size is {size}; CUDA kernels take up to {MAX_HIDDEN_SIZE}")
    if (group := geometry.num_heads // geometry.num_kv_heads) > MAX_GROUP:
        raise CodegenError(f"{group} query heads share a KV head; CUDA kernels take up to {MAX_GROUP}")
    wanted = {"split_tokens": SPLIT_TOKENS, "stats_span": STATS_SPAN, "swiglu_group": GROUP}
    for name, size in wanted.items():
        if (found := getattr(program, name)) != size:
            raise CodegenError(f"{name} is {found}; CUDA kernels take {size}")


def _check_tiles(program: Program) -> None:
    """That linear tiles are whole column groups and whole units of K, as weights are packed, that QKV's
    fit heads, and that weights are not loaded further ahead than loads are counted."""
    for instruction, loads_ahead in _instructions(program):
        op, name = program.ops[instruction.op], _tile_name(program, instruction)
        if loads_ahead > MAX_LOADS_AHEAD:
            raise CodegenError(
                f"{name}: weights are loaded before those of more than {MAX_LOADS_AHEAD} tiles are used"
            )
        if instruction.opcode is Opcode.ATTENTION:
            continue
        if not _is_whole(instruction.n0, instruction.n1, GROUP, op.out_features):
            raise CodegenError(f"{name}: not whole groups of {GROUP} columns")
        if instruction.opcode is Opcode.EMBED:
            continue
        dim = program.geometry.head_dim
        has_heads = op.epilogue is Epilogue.ROPE_APPEND
        if has_heads and not is_within_heads(instruction.n0, instruction.n1, dim):
            raise CodegenError(f"{name}: neither whole heads of {dim} nor an equal part of one")
        if not _is_whole(instruction.k0, instruction.k1, K_BLOCK, op.in_features):
            raise CodegenError(f"{name}: K is not divided in {K_BLOCK}s")
        if instruction.x0 % K_BLOCK:
            raise CodegenError(f"{name}: its input is not divided in {K_BLOCK}s")


def _instructions(program: Program) -> Iterator[tuple[Instruction, int]]:
    """With each how many weight tiles are still to be used when its own may be loaded."""
    for worker in program.workers:
        has_loaded = [any(use.role is PageRole.WEIGHTS for use in one.pages) for one in worker]
        loads = [0, *accumulate(has_loaded)]
        for index, one in enumerate(worker):
            first = min((use.live_from for use in one.pages), default=index)
            yield one, loads[index] - loads[first]


def _is_whole(start: int, end: int, step: int, size: int) -> bool:
    return start % step == 0 and (end % step == 0 or end == size)


def _tile_name(program: Program, instruction: Instruction) -> str:
    name = f"{program.ops[instruction.op].name}, columns [{instruction.n0}, {instruction.n1})"
    return name + (f" of K [{instruction.k0}, {instruction.k1})" if instruction.k1 else "")


def _check_fits(program: Program, machine: Machine) -> None:
    needed = RESERVED_BYTES + program.num_pages * program.page_bytes
    if needed > machine.scratch_bytes:
        raise CodegenError(
            f"bucket {program.bucket} takes {needed} bytes of shared memory, {RESERVED_BYTES} of them "
            f"reserved; a block of {machine.name} has {machine.scratch_bytes}"
        )
    if len(program.workers) > machine.num_workers:
        raise CodegenError(f"{len(program.workers)} workers; {machine.name} has {machine.num_workers} SMs")
