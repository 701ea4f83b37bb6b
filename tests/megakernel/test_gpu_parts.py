"""The hardware run without a GPU: machines, memory, resuming, and its parts over emulated kernels."""

import argparse
import functools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from benchmarks import gpu_builds, gpu_decode
from benchmarks.gpu_builds import BuildMissingError, Builds, built, load, save
from benchmarks.gpu_decode import Cell, GpuDecode, Line, decode_rows, step_bytes, table
from benchmarks.gpu_machine import pick_machine
from benchmarks.gpu_memory import fill_weights, host_view, opened
from benchmarks.gpu_models import BuiltModel, GpuModel
from benchmarks.gpu_peers import Peer, PeerWeights
from megakernel.cuda_build import CudaBuild
from megakernel.cuda_device import DeviceFacts
from megakernel.machine import MachineError, load_machine
from tests.hardware import independence, soak
from tests.hardware.__main__ import PARTS, in_process, part_named
from tests.hardware.dequantize import tensors
from tests.hardware.part import PartResult, Setting
from tests.hardware.results import Results, parts_to_run, read_results, write_results
from tests.megakernel.fake_cuda import FakeDriver, emulated
from tests.megakernel.test_gpu_reference import FAMILIES, FORMATS, compiled_for, needs_compiler

ROOT = Path(__file__).resolve().parents[2]


def facts(name="NVIDIA H100 80GB HBM3", sms=132, architecture="sm_90", shared_bytes=232_448) -> DeviceFacts:
    return DeviceFacts(
        name=name, architecture=architecture, num_sms=sms, shared_bytes=shared_bytes, memory_bytes=80 << 30
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (facts(), "h100"),
        (facts("NVIDIA H200"), "h100"),
        (facts("NVIDIA L20", 92, "sm_89", 101_376), "l20"),
        (facts("NVIDIA L4", 58, "sm_89", 101_376), "l4"),
        (facts("NVIDIA GeForce RTX 4090", 128, "sm_89", 101_376), "rtx4090"),
    ],
)
def test_a_gpu_has_its_description(found, expected):
    assert pick_machine(found).name == expected


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (facts("NVIDIA A100-SXM4-80GB", 108, "sm_80"), "no description is packaged of NVIDIA A100"),
        (facts("NVIDIA H100 PCIe", 114), "it has 114 SMs, h100 132.*--machine FILE.json"),
        (facts("NVIDIA L40", 142, "sm_89"), "no description"),
        (facts(shared_bytes=101_376), "its blocks have 101376 bytes of shared memory, there 232448"),
        (facts("NVIDIA L4", 58, "sm_90"), "it is sm_90, l4 sm_89"),
    ],
)
def test_other_gpus_are_refused_with_what_to_do(found, message):
    with pytest.raises(MachineError, match=message):
        pick_machine(found)


def test_a_description_may_be_given(tmp_path):
    machine = msgspec.structs.replace(load_machine("h100"), name="pcie", num_workers=114)
    path = tmp_path / "pcie.json"
    path.write_bytes(msgspec.json.encode(machine))
    assert pick_machine(facts("NVIDIA H100 PCIe", 114), str(path)).name == "pcie"


@pytest.mark.parametrize("format", FORMATS)
def test_random_weights_are_about_as_large_as_trained_ones(format):
    shape = FAMILIES["qwen3"]().shape
    compiled, _ = compiled_for(shape, format, (1,))
    packed = torch.zeros((2, compiled.layout.num_bytes), dtype=torch.uint8)
    for memory in packed:
        fill_weights(memory, compiled, seed=5)
    assert torch.equal(*packed)
    weights = tensors(packed[0], compiled.layout, shape)
    for name in ("embed", "layers.0.down", "layers.1.gate"):
        values = weights[name]
        spread = values.shape[1] ** -0.5
        assert 0.8 * spread < values.std() < 1.3 * spread
        assert abs(values.mean()) < 0.1 * spread
    assert 0.9 < weights["final_norm"].mean() < 1.1


MACHINE = {"gpu": "one", "sms": 2}


def test_a_run_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "results.json"
    results = read_results(path, MACHINE)
    assert parts_to_run(PARTS, [], results) == list(PARTS)
    results = results.with_part("correctness", PartResult(figures={"logits": 0.5}, seconds=2.0))
    results = results.with_part("soak", PartResult(problems=("it hung",)))
    write_results(path, results)
    again = read_results(path, MACHINE)
    assert again == results
    assert again.figures == {"correctness.logits": 0.5}
    assert parts_to_run(PARTS, [], again) == ["independence", "soak", "decode", "hang"]
    assert parts_to_run(PARTS, ["decode", "correctness"], again) == ["correctness", "decode"]


def test_another_machines_results_do_not_count(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, Results(machine=MACHINE).with_part("soak", PartResult()))
    assert read_results(path, {"gpu": "another"}).parts == {}


def test_files_and_parts_that_are_none_are_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match="holds no results"):
        read_results(path, MACHINE)
    with pytest.raises(ValueError, match="no part is called sock; there are correctness"):
        parts_to_run(PARTS, ["sock"], Results())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("is_quick", [True, False])
def test_what_parts_want_compiled_has_names_of_its_own(part, is_quick):
    models = part_named(part).models(is_quick=is_quick, search_s=0.0)
    assert models
    assert len({model.name for model in models}) == len(set(models))


def test_what_cannot_be_compiled_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_builds, "find_nvcc", lambda: None)
    model = GpuModel(shape_name="no-such-model", format="Q4_0", bucket=1)
    with Builds([model, model], load_machine("h100"), tmp_path) as builds:
        assert builds.models == (model,)
        with pytest.raises(BuildMissingError, match=r"(?s)does not compile: .*KeyError") as error:
            built(tmp_path, model, time.monotonic() + 60)
    assert error.value.is_final


def test_a_build_that_does_not_come_is_not_waited_for(tmp_path):
    model = GpuModel(shape_name="qwen3-1.7b", format="Q4_0", bucket=1)
    with pytest.raises(BuildMissingError, match="_Q4_0_rows1 was not compiled in time") as error:
        built(tmp_path, model, time.monotonic())
    assert not error.value.is_final


def test_what_was_compiled_comes_back_whole():
    compiled, _ = compiled_for(FAMILIES["qwen2"]().shape, "Q8_0", (1, 4))
    build = CudaBuild(architecture="sm_90", nvcc="13", flags=(), kernels=(), spills=(), warnings=())
    found = load(save(BuiltModel(compiled=compiled, build=build, resource_problem="spills")))
    for name in type(compiled).__struct_fields__:
        assert getattr(found.compiled, name) == getattr(compiled, name)
    assert found.build == build
    assert found.resource_problem == "spills"


def run_alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "tests.hardware", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("part", ["correctness", "independence", "soak"])
def test_a_part_that_checked_nothing_has_not_passed(part, tmp_path):
    done = run_alone("--run-part", part, "--deadline", "0", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = msgspec.json.decode((tmp_path / f"{part}.result.json").read_bytes(), type=PartResult)
    assert not result.has_passed


def chosen_in(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(folder=folder, search=0.0, quick=False)


def test_a_part_whose_process_fails_has_not_passed(tmp_path):
    result = in_process("no_such_part", time.monotonic() + 60, chosen_in(tmp_path))
    assert result.problems == ("its process ended with status 1",)


def test_what_a_part_found_before_it_was_stopped_is_kept(tmp_path, monkeypatch):
    found = PartResult(figures={"ms": 2.0}, problems=("one is off",))

    def stopped(command, **named):
        Setting(folder=tmp_path, deadline_s=0.0, result_path=tmp_path / "soak.result.json").keep(found)
        raise subprocess.TimeoutExpired(command, 1.0)

    monkeypatch.setattr(subprocess, "run", stopped)
    result = in_process("soak", time.monotonic(), chosen_in(tmp_path))
    assert result.figures == found.figures
    assert result.problems == ("one is off", "it did not end in time")


def test_without_a_gpu_it_says_what_is_missing(tmp_path):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    done = run_alone("--results", str(tmp_path / "results.json"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


# Parts over emulated kernels.


def tiny_shape():
    return msgspec.structs.replace(FAMILIES["qwen3"]().shape, max_context_tokens=1024)


@functools.cache
def tiny_models(*buckets: int):
    """By bucket, a compiled model and a device that runs it."""
    from megakernel.emulation import build_emulation

    found = []
    for bucket in buckets:
        compiled, source = compiled_for(tiny_shape(), "Q8_0", (bucket,))
        found.append((compiled, build_emulation(source)))
    return found


def drivers_of(models) -> list[FakeDriver]:
    return [FakeDriver(emulated(emulation)) for _, emulation in models]


@needs_compiler
def test_rows_are_independent_over_emulated_kernels(monkeypatch):
    monkeypatch.setattr(independence, "CONTEXTS", (40, 1, 17, 2))
    models = tiny_models(8, 1)
    compiled = [each for each, _ in models]
    found = independence.check_format(compiled, drivers=drivers_of(models), view=host_view)
    assert found.problems == []
    # Of the bucket of 8: the other order, a chain and 4 rows alone, the chain row by row; of 1: two orders of
    # 4, 4 alone, the chain.
    assert found.num_compared == (8 + 4 + 4 + 4) + (4 + 4 + 4 + 4)


@needs_compiler
def test_rows_that_depend_on_others_are_found(monkeypatch):
    monkeypatch.setattr(independence, "CONTEXTS", (40, 1, 17, 2))
    seeds = iter((1, 2))
    monkeypatch.setattr(
        independence, "opened", lambda *args, **named: opened(*args, seed=next(seeds), **named)
    )
    models = tiny_models(8, 1)
    found = independence.check_format(
        [each for each, _ in models], drivers=drivers_of(models), view=host_view
    )
    assert found.problems[0].startswith("sequence 1 with 0 others in bucket 1: ")


def test_companies_fill_the_bucket_and_leave_nobody_out():
    groups = independence.sequences_of(16, 100, independence.Pool(400))
    assert sum(len(group.tokens) for group in groups) == 16
    for bucket in (1, 2, 4, 8, 16):
        found = list(independence.companies(groups, bucket))
        sizes = [sum(len(groups[number].tokens) for number in company) for company in found]
        assert max(sizes) <= bucket
        fitting = {number for number, group in enumerate(groups) if len(group.tokens) <= bucket}
        assert {number for company in found for number in company} == fitting
    assert len(next(iter(independence.companies(groups, 16)))) == len(groups)


@needs_compiler
def test_two_passes_of_a_soak_agree(monkeypatch):
    monkeypatch.setattr(soak, "FIRST_CONTEXTS", (1, 5, 15, 30))
    monkeypatch.setattr(soak, "REPEATED_EVERY", 2)
    models = tiny_models(8, 1)
    passes = []
    with opened(models[0][0], 12, driver=drivers_of(models)[0], view=host_view) as runtime:
        for _ in range(2):
            soak.fill_kv(soak.kv_pool(runtime, host_view))
            passes.append(soak.generate(runtime, 3))
    assert len(passes[0].tokens) == 3
    assert len(passes[0].logits) == 2
    assert soak.compared(*passes) == []
    passes[1].tokens[1] = [0, 0, 0, 0]
    assert soak.compared(*passes) == ["from step 1 on, the second pass went another way"]


def test_bytes_of_a_step_are_weights_and_kv():
    compiled, _ = compiled_for(tiny_shape(), "BF16", (1,))
    shape = compiled.shape
    kv_bytes = 2 * 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers
    assert step_bytes(compiled, Cell(3, 9)) == compiled.layout.num_bytes + 3 * 10 * kv_bytes


def small_peers(kind="eager", batch=2, context=5):
    return Peer(kind, PeerWeights(tiny_shape(), "cpu"), batch, context)


def test_a_peer_is_the_model_that_it_is_said_to_be():
    """Beside the float64 reference, over the same weights and KV."""
    from benchmarks.gpu_steps import Pool, chain, groups_of, key_slots, num_blocks_of, rows_of, slot_of
    from tests.hardware.reference import reference_step

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
    monkeypatch.setattr(gpu_decode, "SHAPES", {gpu_decode.SHAPE_NAME: tiny_shape()})
    monkeypatch.setattr(gpu_decode, "PeerWeights", lambda shape, **named: PeerWeights(shape, "cpu", **named))
    monkeypatch.setattr(gpu_decode, "measured_bandwidth", lambda: {"copy_gb_s": 90.0, "read_gb_s": 100.0})
    monkeypatch.setattr(gpu_decode, "replays", lambda peer: lambda steps: [2.0 + next(clock) * 1e-6] * steps)
    monkeypatch.setattr(
        gpu_decode,
        "opened",
        lambda compiled, blocks: opened(compiled, blocks, driver=FakeDriver(), view=host_view),
    )
    monkeypatch.setattr(gpu_decode, "BATCHES_QUICK", (1, 2))
    monkeypatch.setattr(gpu_decode, "CONTEXTS_QUICK", (20,))
    monkeypatch.setattr(gpu_decode, "PEERS_QUICK", ("eager",))

    def compiled(model):
        if model.format == "BF16" and model.bucket == 2:
            raise BuildMissingError("no BF16 in twos", is_final=True)
        return compiled_for(tiny_shape(), model.format, (model.bucket,))[0]

    def made(seconds=100.0):
        return GpuDecode(compiled, time.monotonic() + seconds, is_quick=True, search_s=0.0)

    return made


def test_decode_measures_ours_and_peers_in_turn(decode):
    measured = decode()
    measured.run()
    assert measured.left_out == ["qwen3-1.7b_BF16_rows2: no BF16 in twos"]
    assert [(line.cell.batch, line.format) for line in measured.lines] == [
        (1, "Q4_0"),
        (1, "BF16"),
        (2, "Q4_0"),
    ]
    figures = measured.figures
    assert figures["ours_Q4_0_ms_batch1_ctx20"] == 1.0
    assert math.isclose(figures["eager_over_ours_Q4_0_batch2_ctx20"], 2.0, rel_tol=1e-3)
    assert figures["read_gb_s"] == 100.0
    shown = table(measured.lines).splitlines()
    assert len(shown) == 4
    assert "x eager" in shown[0]


def test_decode_ends_with_its_time(decode):
    measured = decode(seconds=0.0)
    measured.run()
    assert measured.lines == []
    assert measured.left_out == ["batch 1: no time left", "batch 2: no time left"]


def test_peers_that_may_take_too_long_to_compile_are_left_out(decode):
    measured = decode(seconds=20.0)
    assert measured.peer("compiled", Cell(1, 20)) is None
    assert measured.left_out == ["batch1_ctx20, compiled: compiling it may take 30 s"]
    assert measured.peer("eager", Cell(1, 20)) is not None


def test_a_cell_that_is_measured_again_adds_peers(decode):
    measured = decode()
    line = Line(
        cell=Cell(1, 20),
        format="Q4_0",
        ms=1.0,
        spread_ms=(1.0, 1.0),
        bound_ms=0.5,
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
        rows = decode_rows(runtime, Cell(4, 20))
    assert len(set(rows.block_tables[:, :2].reshape(-1).tolist())) == 8
    assert rows.positions.tolist() == [20] * 4
    assert not rows.needs_logits.any()
