"""The `mk` dialect: a decode step as a graph, and as the tiled ops that passes make of it."""

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, ModuleOp
from xdsl.ir import Dialect
from xdsl.parser import Parser

from megakernel.dialect import graph_ops, tiled_ops, types

MK = Dialect(
    "mk",
    [
        graph_ops.TokensOp,
        graph_ops.WeightOp,
        graph_ops.VectorOp,
        graph_ops.KvOp,
        graph_ops.RmsNormOp,
        graph_ops.HeadNormOp,
        graph_ops.LinearOp,
        graph_ops.RopeOp,
        graph_ops.KvAppendOp,
        graph_ops.CombineOp,
        graph_ops.AddOp,
        graph_ops.SwigluOp,
        graph_ops.HeadStatsOp,
        graph_ops.OutputOp,
        tiled_ops.EmbedOp,
        tiled_ops.AttentionOp,
        tiled_ops.FusedLinearOp,
        tiled_ops.PartialLinearOp,
        tiled_ops.ReduceOp,
    ],
    [
        types.TokensType,
        types.RowsType,
        types.WeightsType,
        types.VectorType,
        types.KvType,
        types.SplitsType,
        types.PartsType,
        types.StatsType,
    ],
)


def parse(text: str) -> ModuleOp:
    """The module a text is; verified. Raises xDSL's ParseError and VerifyException."""
    context = Context()
    context.load_dialect(Builtin)
    context.load_dialect(MK)
    module = Parser(context, text).parse_module()
    module.verify()
    return module
