"""Correct programs for tests, built without the compiler: any shape, workers, K-splits, buckets, barriers."""

import random
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from megakernel.model.shape import ModelShape
from megakernel.program import (
    Buffer,
    Epilogue,
    Geometry,
    Instruction,
    Op,
    Opcode,
    OpKind,
    PageRole,
    PageUse,
    Program,
    Prologue,
    Space,
    Wait,
    attention_columns,
    reads_of,
    writes_of,
)

Barriers = Literal["op", "running", "pairs"]
"""A counter an op; one counter for all, with growing targets; or a counter for each needed pair."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What a test wants of a program. Equal recipes give equal programs."""

    workers: int = 3
    bucket: int = 1
    barriers: Barriers = "op"
    seed: int = 0
    """Of which worker gets which tile."""
    k_tiles: dict[str, int] = {}
    """By role (`qkv`, `o`, `gate_up`, `down`, `head`); 1 where absent."""
    tile_columns: dict[str, int] = {}
    attention_parts: int = 2
    row_tiles: int = 1
    split_tokens: int = 16
    swiglu_group: int = 16
    stats_span: int = 64
    weight_pages: int = 2
    stages: int = 2


def build_program(shape: ModelShape, recipe: Recipe) -> Program:
    graph = _Graph(shape, recipe)
    tiles = [tiles for op in graph.ops for tiles in _phases(graph, op)]
    program = Program(
        model_fingerprint="test",
        machine="test",
        bucket=recipe.bucket,
        geometry=graph.geometry,
        split_tokens=recipe.split_tokens,
        swiglu_group=recipe.swiglu_group,
        stats_span=recipe.stats_span,
        buffers=tuple(graph.buffers),
        ops=tuple(graph.ops),
        partial_buffers=tuple(graph.partials),
        workers=(),
        num_counters=0,
        num_pages=recipe.weight_pages * recipe.stages + 2,
        page_bytes=4096,
    )
    program = _BARRIERS[recipe.barriers](program, _assigned(tiles, recipe), recipe.workers)
    workers = tuple(_with_pages(sequence, recipe) for sequence in program.workers)
    return msgspec.structs.replace(program, workers=workers)


Tiles = list[Instruction]
Assigned = list[list[tuple[int, Instruction]]]
"""By phase, in dataflow order: (worker, instruction)."""


class _Graph:
    def __init__(self, shape: ModelShape, recipe: Recipe) -> None:
        self.recipe = recipe
        self.buffers: list[Buffer] = []
        self.ops: list[Op] = []
        self.partials: list[int] = []
        self.geometry = Geometry(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            max_context_tokens=shape.max_context_tokens,
            rms_norm_eps=shape.rms_norm_eps,
        )
        self.q_columns = shape.num_heads * shape.head_dim
        self.kv_columns = 2 * shape.num_kv_heads * shape.head_dim
        self.splits = -(-shape.max_context_tokens // recipe.split_tokens)
        token = self.buffer("token", 1, Space.INPUT)
        self.hidden = self.buffer("hidden", shape.hidden_size)
        self.queries = self.buffer("queries", self.q_columns)
        self.attention = self.buffer("attention", attention_columns(self.geometry, self.splits))
        self.mlp = self.buffer("mlp", shape.intermediate_size)
        logits = self.buffer("logits", shape.vocab_size, Space.OUTPUT)
        stats = self.buffer("head_stats", 3 * -(-shape.vocab_size // recipe.stats_span), Space.OUTPUT)
        self.op("embed", OpKind.EMBED, token, self.hidden, weights=("embed",))
        for layer in range(shape.num_layers):
            self.layer(shape, layer)
        self.op(
            "head",
            OpKind.LINEAR,
            self.hidden,
            logits,
            stats=stats,
            in_features=shape.hidden_size,
            out_features=shape.vocab_size,
            weights=("embed" if shape.has_tied_head else "head",),
            norm="final_norm",
            prologue=Prologue.RMS_NORM,
            epilogue=Epilogue.LOGITS,
        )

    def layer(self, shape: ModelShape, layer: int) -> None:
        at = f"layers.{layer}."
        kv = self.buffer(at + "kv", self.kv_columns, Space.KV)
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.op(
            at + "qkv",
            OpKind.LINEAR,
            self.hidden,
            self.queries,
            kv=kv,
            in_features=hidden,
            out_features=self.q_columns + self.kv_columns,
            weights=(at + "q", at + "k", at + "v"),
            biases=(at + "q_bias", at + "k_bias", at + "v_bias") if shape.has_qkv_bias else (),
            head_norms=(at + "q_norm", at + "k_norm") if shape.has_qk_norm else (),
            norm=at + "attn_norm",
            prologue=Prologue.RMS_NORM,
            epilogue=Epilogue.ROPE_APPEND,
        )
        self.op(at + "attention", OpKind.ATTENTION, self.queries, self.attention, kv=kv)
        self.op(
            at + "o",
            OpKind.LINEAR,
            self.attention,
            self.hidden,
            in_features=self.q_columns,
            out_features=hidden,
            weights=(at + "o",),
            prologue=Prologue.COMBINE,
            epilogue=Epilogue.RESIDUAL,
        )
        self.op(
            at + "gate_up",
            OpKind.LINEAR,
            self.hidden,
            self.mlp,
            in_features=hidden,
            out_features=2 * inner,
            weights=(at + "gate", at + "up"),
            norm=at + "mlp_norm",
            prologue=Prologue.RMS_NORM,
            epilogue=Epilogue.SWIGLU,
        )
        self.op(
            at + "down",
            OpKind.LINEAR,
            self.mlp,
            self.hidden,
            in_features=inner,
            out_features=hidden,
            weights=(at + "down",),
            epilogue=Epilogue.RESIDUAL,
        )

    def buffer(self, name: str, columns: int, space: Space = Space.ACTIVATION) -> int:
        self.buffers.append(Buffer(index=len(self.buffers), name=name, space=space, columns=columns))
        return len(self.buffers) - 1

    def op(self, name: str, kind: OpKind, source: int, output: int, **fields: object) -> None:
        parts = name.split(".")
        layer = int(parts[1]) if len(parts) == 3 else -1
        op = Op(index=len(self.ops), kind=kind, name=name, layer=layer, input=source, output=output, **fields)
        self.ops.append(op)
        k_tiles = self.recipe.k_tiles.get(parts[-1], 1)
        partial = self.buffer(f"{name}.parts", k_tiles * op.out_features) if k_tiles > 1 else -1
        self.partials.append(partial)


def _phases(graph: _Graph, op: Op) -> Iterable[Tiles]:
    recipe, role = graph.recipe, op.name.split(".")[-1]
    rows = _cuts(recipe.bucket, -(-recipe.bucket // recipe.row_tiles))
    if op.kind is OpKind.EMBED:
        columns = _cuts(graph.geometry.hidden_size, recipe.tile_columns.get(role, 32))
        yield [_tile(Opcode.EMBED, op, c, r) for c in columns for r in rows]
    elif op.kind is OpKind.ATTENTION:
        heads = _cuts(graph.geometry.num_kv_heads, recipe.tile_columns.get(role, 1))
        parts = min(recipe.attention_parts, graph.splits)
        yield [
            _tile(Opcode.ATTENTION, op, h, r, part=part, num_parts=parts)
            for h in heads
            for part in range(parts)
            for r in rows
        ]
    else:
        grain = {
            Epilogue.ROPE_APPEND: graph.geometry.head_dim,
            Epilogue.SWIGLU: 2 * recipe.swiglu_group,
            Epilogue.LOGITS: recipe.stats_span,
        }.get(op.epilogue, 16)
        columns = _cuts(op.out_features, recipe.tile_columns.get(role, grain))
        num_k = recipe.k_tiles.get(role, 1)
        if num_k == 1:
            yield [_tile(Opcode.LINEAR, op, c, r, k1=op.in_features) for c in columns for r in rows]
            return
        k_size = -(-op.in_features // num_k)
        k_size += -k_size % 32 if op.in_features >= 32 * num_k else 0
        yield [
            _tile(Opcode.LINEAR_PARTIAL, op, c, r, part=p, num_parts=num_k, k0=k[0], k1=k[1])
            for c in columns
            for r in rows
            for p, k in enumerate(_cuts(op.in_features, k_size))
        ]
        yield [_tile(Opcode.REDUCE, op, c, r, num_parts=num_k) for c in columns for r in rows]


def _tile(
    opcode: Opcode, op: Op, columns: tuple[int, int], rows: tuple[int, int], **fields: int
) -> Instruction:
    n0, n1 = columns
    return Instruction(opcode=opcode, op=op.index, n0=n0, n1=n1, r0=rows[0], r1=rows[1], **fields)


def _cuts(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _assigned(phases: list[Tiles], recipe: Recipe) -> Assigned:
    rng = random.Random(recipe.seed)
    assigned: Assigned = []
    for tiles in phases:
        shuffled = rng.sample(tiles, len(tiles))
        first = rng.randrange(recipe.workers)
        assigned.append([((first + i) % recipe.workers, tile) for i, tile in enumerate(shuffled)])
    return assigned


def _op_barriers(program: Program, assigned: Assigned, num_workers: int) -> Program:
    """Each worker's first instruction of a phase waits for all of the phase before."""
    workers: list[list[Instruction]] = [[] for _ in range(num_workers)]
    for phase, tiles in enumerate(assigned):
        wait = (Wait(phase - 1, len(assigned[phase - 1])),) if phase else ()
        seen: set[int] = set()
        for worker, tile in tiles:
            waits = () if worker in seen else wait
            seen.add(worker)
            workers[worker].append(msgspec.structs.replace(tile, waits=waits, signal=phase))
    return _with_workers(program, workers, len(assigned))


def _running_barriers(program: Program, assigned: Assigned, num_workers: int) -> Program:
    """As `_op_barriers`, with one counter that goes on growing."""
    workers: list[list[Instruction]] = [[] for _ in range(num_workers)]
    arrivals = 0
    for tiles in assigned:
        seen: set[int] = set()
        for worker, tile in tiles:
            waits = (Wait(0, arrivals),) if arrivals and worker not in seen else ()
            seen.add(worker)
            workers[worker].append(msgspec.structs.replace(tile, waits=waits, signal=0))
        arrivals += len(tiles)
    return _with_workers(program, workers, 1)


def _pair_barriers(program: Program, assigned: Assigned, num_workers: int) -> Program:
    """An instruction waits for just those that it conflicts with and that no earlier wait covers."""
    flat = [entry for tiles in assigned for entry in tiles]
    touched = [(reads_of(program, tile), writes_of(program, tile)) for _, tile in flat]
    before: list[set[int]] = []
    last_on_worker: dict[int, int] = {}
    waited: list[list[int]] = []
    for number, (worker, _) in enumerate(flat):
        known = set()
        if worker in last_on_worker:
            previous = last_on_worker[worker]
            known = before[previous] | {previous}
        needed = []
        for other in range(number - 1, -1, -1):
            if other not in known and _conflict(touched[other], touched[number]):
                needed.append(other)
                known |= before[other] | {other}
        waited.append(needed)
        before.append(known)
        last_on_worker[worker] = number
    counters = {other: counter for counter, other in enumerate(sorted({o for n in waited for o in n}))}
    workers: list[list[Instruction]] = [[] for _ in range(num_workers)]
    for number, (worker, tile) in enumerate(flat):
        waits = tuple(Wait(counters[other], 1) for other in waited[number])
        workers[worker].append(msgspec.structs.replace(tile, waits=waits, signal=counters.get(number, -1)))
    return _with_workers(program, workers, len(counters))


_BARRIERS: dict[str, Callable[[Program, Assigned, int], Program]] = {
    "op": _op_barriers,
    "running": _running_barriers,
    "pairs": _pair_barriers,
}


def _conflict(first: tuple, second: tuple) -> bool:
    (reads, writes), (later_reads, later_writes) = first, second
    return any(_overlap(w, r) for w in writes for r in later_reads) or any(
        _overlap(w, v) for w in (*reads, *writes) for v in later_writes
    )


def _overlap(a, b) -> bool:
    return a.buffer == b.buffer and a.c0 < b.c1 and b.c0 < a.c1 and a.r0 < b.r1 and b.r0 < a.r1


def _with_workers(program: Program, workers: list[list[Instruction]], num_counters: int) -> Program:
    return msgspec.structs.replace(
        program, workers=tuple(tuple(sequence) for sequence in workers), num_counters=num_counters
    )


def _with_pages(sequence: tuple[Instruction, ...], recipe: Recipe) -> tuple[Instruction, ...]:
    """Weights in a ring of stages, loaded as soon as the stage is free; input and output a page each."""
    paged, io = [], recipe.weight_pages * recipe.stages
    for index, instruction in enumerate(sequence):
        pages = (PageUse(PageRole.INPUT, io, 1, index), PageUse(PageRole.OUTPUT, io + 1, 1, index))
        if instruction.opcode in (Opcode.LINEAR, Opcode.LINEAR_PARTIAL):
            stage, live_from = index % recipe.stages, max(0, index - recipe.stages + 1)
            weights = PageUse(PageRole.WEIGHTS, stage * recipe.weight_pages, recipe.weight_pages, live_from)
            pages = (weights, *pages)
        paged.append(msgspec.structs.replace(instruction, pages=pages))
    return tuple(paged)
