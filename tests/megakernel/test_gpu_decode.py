"""The GPU's decode benchmark without a GPU: what is measured in which order; peers are the same model."""

import json
import math
import time
from contextlib import nullcontext
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from benchmarks import gpu_decode
from benchmarks.gpu_builds import BuildMissingError
from benchmarks.gpu_cells import Selection
from benchmarks.gpu_decode import GpuDecode, decode_rows, step_bytes
from benchmarks.gpu_memory import host_view, opened
from benchmarks.gpu_peers import Peer, PeerWeights
from benchmarks.gpu_results import markdown, read_figures
from benchmarks.gpu_steps import Pool, chain, groups_of, key_slots, num_blocks_of, rows_of, slot_of
from benchmarks.gpu_table import Cell, Line
from tests.hardware.reference import reference_step
from tests.megakernel.emulated_model import toy_gpu
from tests.megakernel.fake_cuda import FakeDriver
from tests.megakernel.test_gpu_parts import tiny_shape
from tests.megakernel.test_gpu_reference import compiled_for

SELECTION = Selection(
    shapes=("tiny",), formats=("Q4_0", "BF16"), batches=(1, 2), contexts=(20,), peers=("eager",)
)


def test_bytes_of_a_step_are_weights_and_kv():
    compiled, _ = compiled_for(tiny_shape(), "BF16", (1,))
    shape = compiled.shape
    kv_bytes = 2 * 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers
    assert step_bytes(compiled, Cell("tiny", 3, 9)) == compiled.layout.num_bytes + 3 * 10 * kv_bytes


def small_peers(kind="eager", batch=2, context=5):
    return Peer(kind, PeerWeights(tiny_shape(), "cpu"), batch, context)


def test_a_peer_is_the_model_that_it_is_said_to_be():
    """Beside the float64 reference, over the same weights and KV."""
    shape, batch, context = tiny_shape(), 2, 5
    peer = small_peers("eager", batch, context)
    groups = groups_of([(context, chain(1))] * batch, Pool(batch * num_blocks_of(context)), shape.vocab_size)
    tokens = peer.tokens.tolist()
    groups = [
        msgspec.structs.replace(group, tokens=(token,)) for group, token in zip(groups, tokens, strict=True)
    ]
    pool = torch.zeros((shape.num_layers, 64, 2, shape.num_kv_heads, shape.head_dim), dtype=torch.float64)
    for layer, (keys, values) in enumerate(peer.cache):
        for row, group in enumerate(groups):
            for position in range(context):
                pool[layer, slot_of(group, position), 0] = keys[row, :, position].double()
                pool[layer, slot_of(group, position), 1] = values[row, :, position].double()
    weights = {
        "embed": peer.weights.embed,
        "final_norm": peer.weights.norm,
        "head": peer.weights.head[0],
    }
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for layer, parts in enumerate(peer.weights.layers):
        norm, (qkv,), _, q_norm, k_norm, (output,), mlp_norm, (gate_up,), (down,) = parts
        named = dict(zip("qkv", qkv.split([q, kv, kv]), strict=True))
        named |= {"attn_norm": norm, "q_norm": q_norm, "k_norm": k_norm, "o": output, "mlp_norm": mlp_norm}
        named |= {"gate": gate_up.chunk(2)[0], "up": gate_up.chunk(2)[1], "down": down}
        weights |= {f"layers.{layer}.{name}": values for name, values in named.items()}
    weights = {name: values.double() for name, values in weights.items()}
    expected = reference_step(shape, weights, rows_of(groups), key_slots(groups), pool, is_rounded=False)
    x = peer.logits()
    np.testing.assert_allclose(x.float(), expected.logits, rtol=0, atol=0.05 * expected.logits.abs().max())


@pytest.fixture
def decode(monkeypatch):
    """Over a device that runs nothing, and peers on the CPU."""
    clock = iter(range(10**6))
    monkeypatch.setattr(gpu_decode, "SHAPES", dict.fromkeys(("tiny", "other"), tiny_shape()))
    monkeypatch.setattr(gpu_decode, "PeerWeights", lambda shape, **named: PeerWeights(shape, "cpu", **named))
    monkeypatch.setattr(gpu_decode, "measured_bandwidth", lambda: {"copy_gb_s": 90.0, "read_gb_s": 100.0})
    monkeypatch.setattr(gpu_decode, "replays", lambda peer: lambda steps: [2.0 + next(clock) * 1e-6] * steps)
    monkeypatch.setattr(
        gpu_decode,
        "opened",
        lambda compiled, blocks: opened(compiled, blocks, driver=FakeDriver(), view=host_view),
    )

    def compiled(model):
        if model.format == "BF16" and model.bucket == 2:
            raise BuildMissingError("no BF16 in twos", is_final=True)
        return compiled_for(tiny_shape(), model.format, (model.bucket,))[0]

    def made(seconds=100.0, selection=SELECTION):
        return GpuDecode(compiled, time.monotonic() + seconds, selection, is_quick=True, search_s=0.0)

    return made


def test_decode_measures_ours_and_peers_in_turn(decode):
    measured = decode()
    measured.run()
    assert measured.left_out == ["tiny_BF16_rows2: no BF16 in twos"]
    assert [(line.cell.batch, line.format) for line in measured.lines] == [
        (1, "Q4_0"),
        (1, "BF16"),
        (2, "Q4_0"),
    ]
    figures = measured.figures
    assert figures["ours_Q4_0_ms_tiny_batch1_ctx20"] == 1.0
    assert math.isclose(figures["eager_over_ours_Q4_0_tiny_batch2_ctx20"], 2.0, rel_tol=1e-3)
    assert figures["read_gb_s"] == 100.0
    line = measured.lines[0]
    assert figures["share_of_bound_Q4_0_tiny_batch1_ctx20"] == line.num_bytes / (100e9 * line.ms * 1e-3)
    shown = measured.table().splitlines()
    assert len(shown) == 4
    assert "x eager" in shown[0]


def test_peers_of_one_shape_alone_are_in_memory(decode):
    selection = msgspec.structs.replace(SELECTION, shapes=("tiny", "other"), batches=(1,))
    measured = decode(selection=selection)
    held = []
    measured.run(lambda: held.append(list(measured.weights)))
    assert held == [[("tiny", False)], [("other", False)], [("other", False)]]
    assert [line.cell.name for line in measured.lines[::2]] == ["tiny_batch1_ctx20", "other_batch1_ctx20"]
    assert {"ours_BF16_ms_tiny_batch1_ctx20", "ours_BF16_ms_other_batch1_ctx20"} <= measured.figures.keys()


def test_ours_alone_are_measured_without_peers(decode):
    measured = decode(selection=msgspec.structs.replace(SELECTION, batches=(1,), peers=()))
    measured.run()
    assert [line.ratios for line in measured.lines] == [{}, {}]
    assert measured.weights == {}
    assert not [name for name in measured.figures if "_over_" in name]


def test_figures_are_written_after_every_cell(decode, monkeypatch, tmp_path):
    """So that a run that is ended early leaves a file, and one that `gpu_results` reads."""
    compiled_of = decode().compiled_of
    written = []

    def write_figures(path, *rest):
        write(path, *rest)
        written.append(read_figures(path))

    write = gpu_decode.write_figures
    monkeypatch.setattr(gpu_decode, "write_figures", write_figures)
    monkeypatch.setattr(gpu_decode, "open_driver", FakeDriver)
    monkeypatch.setattr(gpu_decode, "pick_machine", lambda facts, path: toy_gpu())
    built = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(gpu_decode, "Builds", lambda models, machine, folder: nullcontext(built))
    monkeypatch.setattr(
        gpu_decode,
        "built",
        lambda folder, model, deadline_s: SimpleNamespace(compiled=compiled_of(model)),
    )
    path = tmp_path / "figures.json"
    monkeypatch.setitem(gpu_decode.SHAPES, "qwen3-1.7b", tiny_shape())
    arguments = ["--quick", "--contexts", "20,30", "--peers", "eager", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["gpu_decode.py", *arguments])
    gpu_decode.main()
    shares = [sum(name.startswith("share_of_bound_") for name in each.figures) for each in written]
    assert shares == [2, 4, 4]
    machine = json.loads(path.read_text())["machine"]
    assert machine["gpu"] == "fake"
    assert machine["sms"] == 4
    assert machine["copy_gb_s"] == 90.0
    assert machine["date"].endswith("+00:00")
    assert {"driver", "torch", "nvcc"} <= machine.keys()
    rows = [line.split("|")[1:3] for line in markdown([written[-1]]).splitlines() if line.startswith("| 1 ")]
    assert rows == [[" 1 ", " 20 "], [" 1 ", " 30 "]]


def test_decode_ends_with_its_time(decode):
    measured = decode(seconds=0.0)
    measured.run()
    assert measured.lines == []
    assert measured.left_out == ["tiny, batch 1: no time left", "tiny, batch 2: no time left"]


def test_peers_that_may_take_too_long_to_compile_are_left_out(decode):
    measured = decode(seconds=20.0)
    assert measured.peer("compiled", Cell("tiny", 1, 20)) is None
    assert measured.left_out == ["tiny_batch1_ctx20, compiled: compiling it may take 30 s"]
    assert measured.peer("eager", Cell("tiny", 1, 20)) is not None


def test_a_cell_that_is_measured_again_adds_peers(decode):
    measured = decode()
    line = Line(
        cell=Cell("tiny", 1, 20),
        format="Q4_0",
        ms=1.0,
        spread_ms=(1.0, 1.0),
        num_bytes=5,
        ratios={"eager": (2, 2, 2)},
    )
    measured.add_line(line)
    measured.add_line(msgspec.structs.replace(line, ms=3.0, ratios={"whole": (4, 4, 4), "eager": (5, 5, 5)}))
    (merged,) = measured.lines
    assert merged.ms == 1.0
    assert merged.ratios == {"eager": (2, 2, 2), "whole": (4, 4, 4)}


def test_rows_of_decode_have_blocks_of_their_own():
    compiled, _ = compiled_for(tiny_shape(), "BF16", (4,))
    with opened(compiled, 8, driver=FakeDriver(), view=host_view) as runtime:
        rows = decode_rows(runtime, Cell("tiny", 4, 20))
    assert len(set(rows.block_tables[:, :2].reshape(-1).tolist())) == 8
    assert rows.positions.tolist() == [20] * 4
    assert not rows.needs_logits.any()
