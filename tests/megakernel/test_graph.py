"""From a model's shape to its graph."""

from collections import Counter

import pytest
from xdsl.dialects.builtin import ModuleOp

from megakernel.dialect.graph_ops import VectorOp, WeightOp
from megakernel.dialect.types import WeightsType
from megakernel.graph import GraphError, build_graph, uniform_formats, usual_formats
from megakernel.model.names import expected_shapes
from megakernel.shapes import SHAPES
from tests.megakernel.compiler_cases import small_shape


def graph_of(**changes: object) -> ModuleOp:
    shape = small_shape(**changes)
    module = build_graph(shape, usual_formats(shape))
    module.verify()
    return module


def op_counts(module: ModuleOp) -> Counter[str]:
    return Counter(op.name.removeprefix("mk.") for op in module.body.block.ops)


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_model_uses_each_of_its_weights_once(name: str):
    shape = SHAPES[name]
    module = build_graph(shape, usual_formats(shape))
    module.verify()
    labels = [op.label.data for op in module.body.block.ops if isinstance(op, WeightOp | VectorOp)]
    assert sorted(labels) == sorted(expected_shapes(shape))


def test_layers_are_ops_of_their_own():
    counts = op_counts(graph_of(num_layers=3))
    assert counts["attention"] == counts["combine"] == counts["swiglu"] == counts["kv_append"] == 3
    assert counts["linear"] == 3 * 7 + 1
    assert counts["add"] == counts["rope"] == 2 * 3
    assert counts["rms_norm"] == 2 * 3 + 1


@pytest.mark.parametrize(("has_qk_norm", "norms"), [(True, 2), (False, 0)])
def test_heads_are_normed_where_the_model_does(has_qk_norm: bool, norms: int):
    assert op_counts(graph_of(has_qk_norm=has_qk_norm))["head_norm"] == norms


@pytest.mark.parametrize(("has_qkv_bias", "biases"), [(True, 3), (False, 0)])
def test_projections_are_biased_where_the_model_does(has_qkv_bias: bool, biases: int):
    module = graph_of(has_qkv_bias=has_qkv_bias)
    labels = [op.label.data for op in module.body.block.ops if isinstance(op, VectorOp)]
    assert sum(label.endswith("bias") for label in labels) == biases


@pytest.mark.parametrize("has_tied_head", [True, False])
def test_a_tied_head_is_the_embedding(has_tied_head: bool):
    module = graph_of(has_tied_head=has_tied_head)
    weights = {op.label.data: op for op in module.body.block.ops if isinstance(op, WeightOp)}
    assert ("head" in weights) is not has_tied_head
    assert len(list(weights["embed"].weight.uses)) == 1 + has_tied_head


def test_weights_carry_their_stored_format():
    shape = small_shape()
    formats = uniform_formats(shape, "Q8_0") | {"layers.0.down": "BF16"}
    module = build_graph(shape, formats)
    types = {op.label.data: op.weight.type for op in module.body.block.ops if isinstance(op, WeightOp)}
    assert types["layers.0.down"] == WeightsType.of(64, 96, element="BF16")
    assert types["layers.0.q"] == WeightsType.of(64, 64, element="Q8_0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "5 heads cannot share 2 KV heads"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"intermediate_size": 100}, "intermediate_size must be a multiple of 16, got 100"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
    ],
)
def test_a_shape_that_cannot_be_compiled_is_refused(changes: dict[str, int], message: str):
    shape = small_shape(**changes)
    with pytest.raises(GraphError, match=message):
        build_graph(shape, uniform_formats(shape, "F32"))


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"layers.0.q": "Q6_K"}, "weight layers.0.q is Q6_K; supported are"),
        ({"layers.0.down": "Q4_0"}, "weight layers.0.down is Q4_0, which needs in_features in blocks of 32"),
    ],
)
def test_a_format_that_cannot_be_compiled_is_refused(formats: dict[str, str], message: str):
    shape = small_shape(intermediate_size=80)
    with pytest.raises(GraphError, match=message):
        build_graph(shape, uniform_formats(shape, "F32") | formats)


@pytest.mark.parametrize("format", ["W4G128", "W8G128"])
def test_a_group_of_128_may_end_with_its_row(format: str):
    shape = small_shape(intermediate_size=80)
    module = build_graph(shape, uniform_formats(shape, format))
    module.verify()
    weights = [op for op in module.body.block.ops if isinstance(op, WeightOp)]
    assert {op.results[0].type.element for op in weights} == {format}


def test_a_missing_format_is_named():
    shape = small_shape()
    formats = uniform_formats(shape, "F32")
    del formats["layers.0.up"]
    with pytest.raises(GraphError, match=r"no format is given for weight layers\.0\.up"):
        build_graph(shape, formats)
