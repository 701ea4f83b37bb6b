"""Tiled IR -> the frozen program."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue

from megakernel.dialect.graph_ops import TokensOp, label_of, sizes_of
from megakernel.dialect.tiled_ops import (
    AttentionOp,
    EmbedOp,
    FusedLinearOp,
    PartialLinearOp,
    ReduceOp,
    TiledOp,
)
from megakernel.graph import STATS_SPANS, SWIGLU_GROUP
from megakernel.model.shape import ModelShape
from megakernel.passes.context import PassContext
from megakernel.program import (
    Buffer,
    Epilogue,
    Geometry,
    Instruction,
    Op,
    Opcode,
    OpKind,
    Program,
    Prologue,
    Space,
    Wait,
    attention_columns,
    split_blocks,
)
from megakernel.tiles import tiles_of

_OPCODES: dict[type[TiledOp], Opcode] = {
    EmbedOp: Opcode.EMBED,
    AttentionOp: Opcode.ATTENTION,
    FusedLinearOp: Opcode.LINEAR,
    PartialLinearOp: Opcode.LINEAR_PARTIAL,
    ReduceOp: Opcode.REDUCE,
}
_OUTPUTS = {
    Epilogue.RESIDUAL: "hidden",
    Epilogue.ROPE_APPEND: "queries",
    Epilogue.SWIGLU: "mlp",
    Epilogue.LOGITS: "logits",
}


def geometry_of(shape: ModelShape) -> Geometry:
    return Geometry(
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


def lower(module: ModuleOp, fingerprint: str, context: PassContext) -> Program:
    """The program, without scratch pages."""
    outline = outline_of(module, fingerprint, context)
    workers: list[list[Instruction]] = [[] for _ in range(context.machine.num_workers)]
    num_counters = 0
    for number, op in enumerate_ops(module):
        num_counters += op.counter is not None
        for worker, instruction in zip(
            op.decided_list("workers"), instructions_of(op, number, context), strict=True
        ):
            workers[worker].append(instruction)
    return Program(
        **{name: getattr(outline, name) for name in Program.__struct_fields__}
        | {"workers": tuple(tuple(sequence) for sequence in workers), "num_counters": num_counters}
    )


def tiled_ops(module: ModuleOp) -> Iterator[TiledOp]:
    for op in module.body.block.ops:
        if isinstance(op, TiledOp):
            yield op


def enumerate_ops(module: ModuleOp) -> Iterator[tuple[int, TiledOp]]:
    """Tiled ops with their number in the program, where the two waves of a K-split op are one op."""
    number = -1
    for op in tiled_ops(module):
        number += not isinstance(op, ReduceOp)
        yield number, op


def instructions_of(op: TiledOp, number: int, context: PassContext) -> list[Instruction]:
    """One a tile, in the order of tiles, with the waits and signals that `barriers` left."""
    opcode = _OPCODES[type(op)]
    signals = set(op.decided_list("signals"))
    waits = waits_by_tile(op.decided_list("waits"))
    counter = op.decided("counter") if signals else -1
    return [
        Instruction(
            opcode=opcode,
            op=number,
            n0=tile.n0,
            n1=tile.n1,
            k0=tile.k0,
            k1=tile.k1,
            part=tile.part,
            num_parts=tile.num_parts,
            r1=context.bucket,
            waits=waits.get(index, ()),
            signal=counter if index in signals else -1,
        )
        for index, tile in enumerate(tiles_of(op, context.num_attention_parts, context.machine.kind))
    ]


def waits_by_tile(triples: Sequence[int]) -> dict[int, tuple[Wait, ...]]:
    waits: dict[int, tuple[Wait, ...]] = defaultdict(tuple)
    for tile, counter, target in zip(triples[::3], triples[1::3], triples[2::3], strict=True):
        waits[tile] += (Wait(counter, target),)
    return waits


def outline_of(module: ModuleOp, fingerprint: str, context: PassContext) -> Program:
    """The program's ops and buffers; its workers have no instructions yet."""
    outline = _Outline(context)
    for op in module.body.block.ops:
        if isinstance(op, TokensOp):
            outline.place(op.tokens, "token", Space.INPUT, 1)
        elif isinstance(op, TiledOp):
            outline.add(op)
    return Program(
        model_fingerprint=fingerprint,
        machine=context.machine.name,
        bucket=context.bucket,
        geometry=outline.geometry,
        split_tokens=context.split_tokens,
        swiglu_group=SWIGLU_GROUP,
        stats_span=STATS_SPANS[context.machine.kind],
        buffers=tuple(outline.buffers.values()),
        ops=tuple(outline.ops),
        partial_buffers=tuple(outline.partial_buffers),
        workers=(),
        num_counters=0,
        num_pages=0,
        page_bytes=context.machine.page_bytes,
        kind=context.machine.kind,
    )


class _Outline:
    """Collects ops and the buffers of their values. A buffer serves all layers, KV apart."""

    def __init__(self, context: PassContext) -> None:
        self.context = context
        self.geometry = geometry_of(context.shape)
        self.buffers: dict[str, Buffer] = {}
        self.ops: list[Op] = []
        self.partial_buffers: list[int] = []
        self._buffer_of: dict[SSAValue, int] = {}

    def place(self, value: SSAValue, name: str, space: Space, columns: int) -> int:
        if name not in self.buffers:
            self.buffers[name] = Buffer(index=len(self.buffers), name=name, space=space, columns=columns)
        assert self.buffers[name].columns == columns, f"buffer {name} is shared by unlike values"
        self._buffer_of[value] = self.buffers[name].index
        return self.buffers[name].index

    def add(self, op: TiledOp) -> None:
        match op:
            case EmbedOp():
                self._add_embed(op)
            case AttentionOp():
                self._add_attention(op)
            case FusedLinearOp():
                self._add_linear(op, op)
            case PartialLinearOp():
                self._add_split(op)
            case _:
                pass  # a reduce belongs to the op of its partial sums

    def _add_embed(self, op: EmbedOp) -> None:
        columns = sizes_of(op.result)[0]
        output = self.place(op.result, "hidden", Space.ACTIVATION, columns)
        self._append(
            Op(
                index=len(self.ops),
                kind=OpKind.EMBED,
                name=op.label.data,
                layer=-1,
                input=self._buffer_of[op.tokens],
                output=output,
                weights=(label_of(op.table),),
            )
        )

    def _add_attention(self, op: AttentionOp) -> None:
        context = self.context
        blocks = split_blocks(context.machine.kind, context.num_splits, context.num_attention_parts)
        columns = attention_columns(self.geometry, blocks)
        output = self.place(op.splits, "attention", Space.ACTIVATION, columns)
        self._append(
            Op(
                index=len(self.ops),
                kind=OpKind.ATTENTION,
                name=op.label.data,
                layer=op.layer,
                input=self._buffer_of[op.queries],
                output=output,
                kv=self._buffer_of[op.kv],
            )
        )

    def _add_split(self, op: PartialLinearOp) -> None:
        reduce = next(iter(op.parts.uses)).operation
        assert isinstance(reduce, ReduceOp)
        num_parts, columns = sizes_of(op.parts)
        parts = self.place(op.parts, f"{op.role}.parts", Space.ACTIVATION, num_parts * columns)
        self._add_linear(op, reduce, parts)

    def _add_linear(
        self, head: FusedLinearOp | PartialLinearOp, tail: FusedLinearOp | ReduceOp, partial_buffer: int = -1
    ) -> None:
        epilogue = Epilogue(tail.epilogue.data)
        space = Space.OUTPUT if epilogue is Epilogue.LOGITS else Space.ACTIVATION
        name = _OUTPUTS.get(epilogue, tail.label.data)
        output = self.place(tail.result, name, space, sizes_of(tail.result)[0])
        self._append(
            Op(
                index=len(self.ops),
                kind=OpKind.LINEAR,
                name=tail.label.data,
                layer=tail.layer,
                input=self._buffer_of[head.input],
                output=output,
                kv=self._place_kv(tail),
                stats=self._place_stats(tail),
                in_features=head.in_features,
                out_features=sum(sizes_of(weight)[0] for weight in head.weights),
                weights=tuple(label_of(weight) for weight in head.weights),
                biases=tuple(label_of(bias) for bias in tail.biases),
                norm=label_of(head.norm) if head.norm is not None else "",
                head_norms=tuple(label_of(norm) for norm in tail.head_norms),
                prologue=Prologue(head.prologue.data),
                epilogue=epilogue,
            ),
            partial_buffer,
        )

    def _place_kv(self, tail: FusedLinearOp | ReduceOp) -> int:
        if tail.kv_result is None:
            return -1
        heads, dim = sizes_of(tail.kv_result)
        return self.place(tail.kv_result, f"layers.{tail.layer}.kv", Space.KV, 2 * heads * dim)

    def _place_stats(self, tail: FusedLinearOp | ReduceOp) -> int:
        if tail.stats is None:
            return -1
        return self.place(tail.stats, "head_stats", Space.OUTPUT, 3 * sizes_of(tail.stats)[0])

    def _append(self, op: Op, partial_buffer: int = -1) -> None:
        self.ops.append(op)
        self.partial_buffers.append(partial_buffer)
