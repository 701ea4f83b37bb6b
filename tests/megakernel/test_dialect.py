"""The `mk` dialect: verifiers that name what is wrong, and text that we and stock MLIR tools parse."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from xdsl.dialects.builtin import ModuleOp
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError, VerifyException

from megakernel.dialect import parse
from megakernel.dialect.types import KvType, RowsType, WeightsType
from megakernel.pipeline import STAGE_NAMES, ir_after
from tests.megakernel.compiler_cases import small_machine, small_plan, small_shape


def small_ir(stage: str) -> ModuleOp:
    return ir_after(small_shape(), small_machine(), 4, stage, small_plan())


def generic_text(module: ModuleOp) -> str:
    out = io.StringIO()
    Printer(out, print_generic_format=True).print_op(module)
    return out.getvalue()


def stock_mlir_tool() -> str | None:
    """`mlir-opt`, or IREE's: beside the interpreter where only the environment has it."""
    beside = str(Path(sys.executable).parent)
    for name in ("mlir-opt", "iree-opt"):
        if found := shutil.which(name) or shutil.which(name, path=beside):
            return found
    return None


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_text_round_trips(stage: str):
    text = str(small_ir(stage))
    assert str(parse(text)) == text


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_generic_text_round_trips(stage: str):
    module = small_ir(stage)
    assert str(parse(generic_text(module))) == str(module)


@pytest.mark.parametrize("stage", ["graph", "barriers"])
def test_stock_mlir_parses_it_and_we_parse_what_it_prints(stage: str):
    tool = stock_mlir_tool()
    if tool is None:
        pytest.skip("neither mlir-opt nor iree-opt is installed")
    module = small_ir(stage)
    done = subprocess.run(
        [tool, "--allow-unregistered-dialect", "--mlir-print-op-generic"],
        input=generic_text(module),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert parse(done.stdout).is_structurally_equivalent(module)


@pytest.mark.parametrize(
    ("sizes", "element", "message"),
    [
        ((64, 96), "Q4_1", None),
        ((64, 48), "Q4_1", "in_features in blocks of 32, got 48"),
        ((64, 48), "BF16", None),
        ((64, 48), "Q5_K", "format Q5_K is not one of"),
        ((0, 32), "F32", "sizes must be positive"),
    ],
)
def test_weights_check_their_format(sizes: tuple[int, int], element: str, message: str | None):
    if message is None:
        assert WeightsType.of(*sizes, element=element).sizes == sizes
    else:
        with pytest.raises(VerifyException, match=message):
            WeightsType.of(*sizes, element=element)


def test_kv_has_no_format_of_weights():
    with pytest.raises(VerifyException, match="format Q8_0 is not one of F32, F16"):
        KvType.of(2, 16, element="Q8_0")


def test_a_type_prints_as_it_is_named():
    assert str(RowsType.of(576)) == "!mk.rows<576, F32>"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("!mk.weights<64, 96, Q4_1>", "!mk.weights<64, 128, Q4_1>", "128 in_features for 96 input columns"),
        ("!mk.vector<16, F32>", "!mk.vector<24, F32>", "64 columns are not whole heads of 24"),
        ("!mk.kv<2, 16, F16>", "!mk.kv<3, 16, F16>", "32 columns of keys for 3 heads of 16"),
        ("!mk.splits<4, 16, F32>", "!mk.splits<2, 16, F32>", "64 query columns for 2 heads of 16"),
        ("head_dim = 16", "head_dim = 15", "head_dim must be even, got 15"),
        ("!mk.stats<3, F32>", "!mk.stats<2, F32>", "2 spans of 256 for 700 columns"),
        ("split_tokens = 128", "split_tokens = 0", "split_tokens must be positive"),
    ],
)
def test_a_graph_that_does_not_fit_together_is_refused(before: str, after: str, message: str):
    text = str(small_ir("graph"))
    assert before in text
    with pytest.raises((VerifyException, ParseError), match=message):
        parse(text.replace(before, after))


GQA = """
%queries, %kv = "test.values"() : () -> (!mk.rows<80, F32>, !mk.kv<2, 16, F16>)
%splits = "mk.attention"(%queries, %kv) {label = "layers.0.attention", split_tokens = 128 : i64}
  : (!mk.rows<80, F32>, !mk.kv<2, 16, F16>) -> !mk.splits<5, 16, F32>
"""


def test_heads_share_kv_heads_evenly():
    from xdsl.context import Context
    from xdsl.dialects.builtin import Builtin
    from xdsl.parser import Parser

    from megakernel.dialect import MK

    context = Context(allow_unregistered=True)
    context.load_dialect(Builtin)
    context.load_dialect(MK)
    module = Parser(context, GQA).parse_module()
    with pytest.raises(VerifyException, match="5 heads cannot share 2 KV heads evenly"):
        module.verify()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('prologue = "rms_norm"', 'prologue = "none"', "a norm weight goes with the rms_norm prologue"),
        ('prologue = "combine"', 'prologue = "none"', "attention splits go with the combine prologue"),
        ('epilogue = "swiglu"', 'epilogue = "store"', "96 result columns, 192 follow from 192 sums"),
        ('epilogue = "residual"', 'epilogue = "store"', "a residual goes with the residual epilogue"),
        ('epilogue = "logits"', 'epilogue = "nothing"', "unknown epilogue nothing"),
    ],
)
def test_a_fused_op_that_does_not_fit_together_is_refused(before: str, after: str, message: str):
    text = str(small_ir("fuse"))
    assert before in text
    with pytest.raises((VerifyException, ParseError), match=message):
        parse(text.replace(before, after))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("signals = array<i32: 0, 1>", "signals = array<i32: 0, 7>", "name a tile beyond its 2"),
        ("counter = 0 : i64, ", "", "both counter and signals, or neither"),
        ("waits = array<i32: 1, 5, 3>", "waits = array<i32: 1, 5>", "are not triples"),
        ("workers = array<i32: 0, 1>", "workers = array<i64: 0, 1>", "must be an array of i32"),
    ],
)
def test_a_schedule_that_does_not_fit_together_is_refused(before: str, after: str, message: str):
    text = str(small_ir("barriers"))
    assert before in text
    with pytest.raises((VerifyException, ParseError), match=message):
        parse(text.replace(before, after))
