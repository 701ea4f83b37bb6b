"""What the GPU's decode benchmark measures, and in which order."""

import argparse

import pytest

from benchmarks.gpu_cells import QUICK, Selection, add_options, selection_of
from benchmarks.gpu_table import Cell
from benchmarks.harness import parser


def selected(*arguments: str) -> Selection:
    options = parser("of a test")
    add_options(options)
    return selection_of(options.parse_args(arguments))


def test_what_matters_most_comes_first():
    groups = list(Selection().groups())
    shapes = ["qwen3-1.7b", "qwen2.5-1.5b", "llama-3.2-1b"]
    assert [(cells[0].batch, cells[0].shape) for cells in groups] == [
        (batch, shape) for batch in (1, 16, 4, 8, 2) for shape in shapes
    ]
    assert all({cell.context for cell in cells} == {64, 512, 2048} for cells in groups)
    assert len({cell.name for cells in groups for cell in cells}) == 45


def test_models_are_compiled_in_the_order_in_which_they_are_measured():
    models = Selection().models(search_s=0.0)
    assert len(models) == len({model.name for model in models}) == 45
    assert [model.name for model in models[:4]] == [
        "qwen3-1.7b_Q4_0_rows1",
        "qwen3-1.7b_Q8_0_rows1",
        "qwen3-1.7b_BF16_rows1",
        "qwen2.5-1.5b_Q4_0_rows1",
    ]
    assert models[-1].name == "llama-3.2-1b_BF16_rows2"


def test_without_options_all_is_measured_and_less_of_it_quickly():
    assert selected() == Selection()
    assert selected("--quick") == QUICK
    assert {cell.shape for cells in QUICK.groups() for cell in cells} == {"qwen3-1.7b"}


def test_lists_choose_cells_in_their_order():
    found = selected("--shapes", "llama-3.2-1b,qwen3-1.7b", "--batches", "8,2,8", "--contexts", "64")
    assert list(found.groups()) == [
        (Cell(shape, batch, 64),) for batch in (8, 2) for shape in ("llama-3.2-1b", "qwen3-1.7b")
    ]
    assert selected("--formats", "BF16,Q4_0").formats == ("BF16", "Q4_0")
    assert selected("--quick", "--contexts", "64,2048").contexts == (64, 2048)


def test_peers_are_chosen_or_none():
    assert selected("--peers", "compiled").peers_everywhere == ("compiled",)
    assert selected("--peers", "none").peers == ()
    assert selected("--peers", "compiled").whole_cell is None
    assert Selection().peers_everywhere == ("eager", "compiled", "int4")


def test_the_whole_step_is_compiled_once_where_its_cell_is_chosen():
    assert selected().whole_cell == Cell("qwen3-1.7b", 1, 512)
    assert selected("--quick").whole_cell is None
    assert selected("--batches", "16").whole_cell is None
    assert selected("--contexts", "64").whole_cell is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "gpt2"), "gpt2 is not among smollm2-135m, "),
        (("--shapes", ""), "is not among smollm2-135m"),
        (("--shapes", "none"), "none is not among"),
        (("--formats", "Q3_K"), "Q3_K is not among "),
        (("--peers", "vllm"), "vllm is not among eager, compiled, reduce_overhead, int4"),
        (("--batches", "1,x"), "'1,x' is no list of positive numbers"),
        (("--contexts", "0"), "'0' is no list of positive numbers"),
    ],
)
def test_what_there_is_not_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        selected(*arguments)
    assert message in capsys.readouterr().err


def test_help_names_what_is_usual():
    options = argparse.ArgumentParser()
    add_options(options)
    shown = " ".join(options.format_help().split())
    assert "--batches LIST in this order; 1,16,4,8,2 where not given" in shown
