"""Random models, plans and steps for the CUDA kernels, all from a seed."""

import math
import random

import msgspec
import numpy as np

from megakernel.cuda_constants import K_BLOCK, RESERVED_BYTES
from megakernel.footprint import footprint, page_needs
from megakernel.graph import STATS_SPANS
from megakernel.group_formats import GROUP_FORMATS, GroupQuantizedWeights
from megakernel.machine import Machine
from megakernel.model.names import expected_shapes
from megakernel.model.shape import ModelShape
from megakernel.pack_cuda import PACKED_FORMATS, common_format
from megakernel.pipeline import compile_program
from megakernel.plan import OpPlan, Plan
from megakernel.program import Epilogue, Opcode, OpKind, Program, fits_heads
from megakernel.step import Rows
from megakernel.tiles import COLUMN_GROUP, packed_grain
from megakernel.validate import validate
from megakernel.vm_state import VmKv
from tests.megakernel.emulated_model import toy_gpu
from tests.megakernel.native_steps import BLOCK
from tests.megakernel.random_rows import ASKS, MAX_CONTEXT_TOKENS, draw_rows
from tests.megakernel.stored_weights import StoredAs
from tests.tiny_model import LLAMA3_SCALING, tiny_weights

FAMILIES = ("llama", "qwen2", "qwen3")
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
NUM_WORKERS = (2, 3, 4, 5)
FORMATS = PACKED_FORMATS
WHOLE_BLOCKS = ("Q4_0", "Q4_1", "Q8_0")
"""Formats whose rows are whole blocks of 32."""
MANY_ROWS = 16
"""With more of them than these a case is kept small otherwise."""
ROLES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Matrices of a layer, by role."""


class Case(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A model, a program of it, and a step."""

    seed: int
    shape: ModelShape
    formats: dict[str, str]
    """By name, of matrices; those without one are F32."""
    machine: Machine
    plan: Plan
    is_bulk: bool
    """Whether weights come by bulk copies."""
    ask: str
    rows: Rows
    num_blocks: int
    program: Program

    def __str__(self) -> str:
        shape, rows = self.shape, self.rows
        tiles = [
            f"{role} {op.tile_columns}x{op.load_k}({op.input_k})/{op.stages}"
            for role, op in self.plan.ops.items()
        ]
        formats = sorted({f"{name.rpartition('.')[2]} {format}" for name, format in self.formats.items()})
        head = "tied" if shape.has_tied_head else "own"
        return (
            f"case {self.seed}: {shape.architecture}, {shape.num_layers} layers, hidden {shape.hidden_size}, "
            f"mlp {shape.intermediate_size}, heads {shape.num_heads} of {shape.num_kv_heads} x "
            f"{shape.head_dim}, vocabulary {shape.vocab_size}, {head} head; {', '.join(formats)}; "
            f"bucket {self.program.bucket}, {len(rows.token_ids)} rows after "
            f"{rows.context_lengths.tolist()} that ask {self.ask}, top {rows.top_k}; "
            f"{self.machine.num_workers} SMs of {self.program.num_pages} pages, {', '.join(tiles)}, "
            f"{self.plan.prefetch_instructions} ahead{', bulk copies' * self.is_bulk}"
        )

    def weights(self) -> GroupQuantizedWeights:
        names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        names += ("vocab_size", "max_context_tokens", "rope_scaling", "has_tied_head")
        plain = tiny_weights(
            self.seed,
            self.shape.architecture,
            **{name: getattr(self.shape, name) for name in names},
        )
        grouped = {name: format for name, format in self.formats.items() if format in GROUP_FORMATS}
        stored = {name: format for name, format in self.formats.items() if format not in GROUP_FORMATS}
        return GroupQuantizedWeights(StoredAs(plain, stored), grouped)

    def kv(self) -> VmKv:
        """What every slot holds of earlier steps, whether a sequence has it or not."""
        rng = np.random.default_rng(self.seed)
        columns = 2 * self.shape.num_kv_heads * self.shape.head_dim
        kv = VmKv(self.shape.num_layers, self.num_blocks * BLOCK, columns, block_size=BLOCK, dtype=np.float16)
        for layer in kv.layers:
            layer[...] = rng.standard_normal(layer.shape)
        return kv

    @property
    def tiles_a_head(self) -> int:
        return max(1, self.shape.head_dim // self.plan.ops["qkv"].tile_columns)

    def covers(self) -> set[tuple[object, ...]]:
        """(opcode, format) and (role, opcode, format) of its instructions, bucket, family and the like."""
        found: set[tuple[object, ...]] = {
            ("bucket", self.program.bucket),
            ("family", self.shape.architecture),
        }
        found |= {("ask", self.ask), ("head_dim", self.shape.head_dim), ("is_bulk", self.is_bulk)}
        found |= {("SMs", self.machine.num_workers), ("is_tied", self.shape.has_tied_head)}
        found |= {("splits", int(self.rows.positions.max()) // self.program.split_tokens + 1)}
        for opcode, index in {(i.opcode, i.op) for worker in self.program.workers for i in worker}:
            op = self.program.ops[index]
            found |= {(opcode,), (opcode, op.epilogue)}
            if op.epilogue is Epilogue.ROPE_APPEND and self.tiles_a_head > 1:
                found |= {("part of a head", opcode), ("part of a head", self.shape.architecture)}
                found |= {("part of a head", self.program.bucket), ("tiles a head", self.tiles_a_head)}
            if opcode is Opcode.ATTENTION:
                continue
            names = ("embed",) if op.kind is OpKind.EMBED else op.weights
            in_features = expected_shapes(self.shape)[names[0]][1]
            format = common_format([self.formats.get(name, "F32") for name in names], in_features)
            found |= {(opcode, format), (op.name.rpartition(".")[2], opcode, format)}
        return found


def draw_case(seed: int) -> Case:
    """Buckets and families go round with the seed; everything else is drawn."""
    rng = random.Random(seed)
    bucket, family = BUCKETS[seed % len(BUCKETS)], FAMILIES[seed // len(BUCKETS) % len(FAMILIES)]
    is_in_blocks = rng.random() < 0.45
    shape = _shape(rng, family, is_in_blocks=is_in_blocks, is_small=bucket > MANY_ROWS)
    formats = _formats(rng, shape)
    num_workers = rng.choice(NUM_WORKERS)
    plan = _plan(rng, shape, num_workers, is_in_blocks=is_in_blocks)
    plan = _with_parts_of_heads(random.Random(seed + 1_000_000), plan, shape, num_workers)
    machine, program = _compiled(rng, shape, formats, num_workers, bucket, plan)
    ask = rng.choice(ASKS)
    rows, num_blocks = draw_rows(rng, shape, bucket, ask)
    return Case(
        seed=seed,
        shape=shape,
        formats=formats,
        machine=machine,
        plan=plan,
        is_bulk=rng.random() < 0.25,
        ask=ask,
        rows=rows,
        num_blocks=num_blocks,
        program=program,
    )


def _shape(rng: random.Random, family: str, *, is_in_blocks: bool, is_small: bool) -> ModelShape:
    """Sizes are multiples of 16, of which few are multiples of 64; where K is split, past 128."""
    head_dim = rng.choice((16, 16, 32, 64))
    num_kv_heads = rng.choice((1, 1, 2, 2, 3)) if head_dim < 64 else 1
    least_group = math.ceil(144 / (num_kv_heads * head_dim)) if is_in_blocks else 1
    group = rng.choice([size for size in (1, 2, 3, 4, 6, 8, 9) if size >= least_group][:4])
    sizes = [*range(144, 273 if is_small else 337, 16)] if is_in_blocks else [*range(32, 177, 16)]
    return tiny_weights(
        0,
        family,
        num_layers=1 if is_small else rng.choices((1, 2, 3), (5, 6, 1))[0],
        hidden_size=rng.choice(sizes),
        intermediate_size=rng.choice(sizes),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=rng.randrange(70, 200),
        max_context_tokens=MAX_CONTEXT_TOKENS,
        rope_scaling=LLAMA3_SCALING if family == "llama" and rng.random() < 0.5 else None,
        has_tied_head=rng.random() < 0.5,
    ).shape


def _formats(rng: random.Random, shape: ModelShape) -> dict[str, str]:
    """One for all, one a role, or one a matrix: of an op in several formats kernels have BF16."""
    sizes = {name: size for name, size in expected_shapes(shape).items() if len(size) == 2}
    kind = rng.choices(("one", "role", "layer", "matrix"), (3, 6, 2, 1))[0]
    drawn: dict[str, str] = {}
    formats = {}
    for name, (_, in_features) in sizes.items():
        matrix = name.rpartition(".")[2]
        role = next((role for role, matrices in ROLES.items() if matrix in matrices), name)
        key = {"one": "", "role": role, "layer": name.removesuffix(matrix) + role, "matrix": name}[kind]
        wanted = drawn.setdefault(key, rng.choice(FORMATS))
        is_whole = wanted not in WHOLE_BLOCKS or in_features % 32 == 0
        formats[name] = wanted if is_whole else rng.choice(("W4G128", "W8G128", "BF16", "F16", "F32"))
    if kind == "matrix":
        formats = {name: format for name, format in formats.items() if rng.random() < 0.8}
    return {name: format for name, format in formats.items() if format != "F32"}


def _plan(rng: random.Random, shape: ModelShape, num_workers: int, *, is_in_blocks: bool) -> Plan:
    columns = shape.num_heads * shape.head_dim
    qkv, head_dim = columns + 2 * shape.num_kv_heads * shape.head_dim, shape.head_dim
    splits_all = rng.random() < 0.4

    def op_plan(width: int, grain: int, in_features: int = 0) -> OpPlan:
        most = -(-in_features // K_BLOCK)
        has_blocks = is_in_blocks and most > 1 and (splits_all or rng.random() < 0.5)
        load_k = K_BLOCK * rng.randint(1, most - 1) if has_blocks else 0
        input_k = load_k * rng.randint(1, 2) if has_blocks and rng.random() < 0.5 else 0
        tile = grain * rng.randint(1, max(1, min(6, -(-width // grain))))
        workers = None
        if rng.random() < 0.3:
            workers = tuple(rng.randrange(num_workers) for _ in range(-(-width // tile)))
        return OpPlan(
            tile_columns=tile,
            load_k=load_k,
            input_k=input_k,
            stages=rng.randint(1, 4),
            tile_workers=workers,
        )

    hidden, inner = shape.hidden_size, shape.intermediate_size
    return Plan(
        ops={
            "embed": op_plan(hidden, 16),
            "attention": OpPlan(tile_columns=1),
            "qkv": op_plan(qkv, packed_grain(head_dim), hidden),
            "o": op_plan(hidden, 16, columns),
            "gate_up": op_plan(2 * inner, 32, hidden),
            "down": op_plan(hidden, 16, inner),
            "head": op_plan(shape.vocab_size, STATS_SPANS["cuda"], hidden),
        },
        prefetch_instructions=rng.randint(0, 5),
    )


def _with_parts_of_heads(rng: random.Random, plan: Plan, shape: ModelShape, num_workers: int) -> Plan:
    """QKV tiles narrower than a head, in most plans of a model that may have them."""
    widths = range(COLUMN_GROUP, shape.head_dim, COLUMN_GROUP)
    if not widths or rng.random() < 0.3:
        return plan
    qkv = plan.ops["qkv"]
    tile = rng.choice([width for width in widths if fits_heads(width, shape.head_dim)])
    num_tiles = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // tile * qkv.num_k_tiles
    workers = qkv.tile_workers and tuple(rng.randrange(num_workers) for _ in range(num_tiles))
    changed = msgspec.structs.replace(qkv, tile_columns=tile, tile_workers=workers)
    return msgspec.structs.replace(plan, ops=plan.ops | {"qkv": changed})


def _compiled(
    rng: random.Random,
    shape: ModelShape,
    formats: dict[str, str],
    num_workers: int,
    bucket: int,
    plan: Plan,
) -> tuple[Machine, Program]:
    """With shared memory for the largest tile and up to three more stages of its weights."""
    stored = {name: formats.get(name, "F32") for name in expected_shapes(shape)}
    machine = toy_gpu(num_workers)
    unpaged = compile_program(shape, "toy", machine, bucket, plan, formats=stored, page_planner=None)
    needs = [
        page_needs(footprint(unpaged, instruction, stored), machine.page_bytes)
        for worker in unpaged.workers
        for instruction in worker
    ]
    num_pages = max(need.total for need in needs) + rng.randint(0, 3 * max(need.weights for need in needs))
    machine = toy_gpu(num_workers, RESERVED_BYTES + num_pages * machine.page_bytes)
    program = compile_program(shape, "toy", machine, bucket, plan, formats=stored)
    validate(program, machine, stored)
    return machine, program
