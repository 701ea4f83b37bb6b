"""The hardware run without a GPU: machines, memory, resuming, and its parts over emulated kernels."""

import argparse
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch

from benchmarks import gpu_builds
from benchmarks.gpu_builds import BuildMissingError, Builds, built, load, save
from benchmarks.gpu_memory import fill_weights, host_view, opened
from benchmarks.gpu_models import BuiltModel, GpuModel
from megakernel.cuda_build import CudaBuild
from megakernel.cuda_device import DeviceFacts
from megakernel.gpu_machine import pick_machine
from megakernel.machine import MachineError, load_machine
from tests.hardware import independence, multi_step, soak
from tests.hardware.__main__ import PARTS, in_process, part_named
from tests.hardware.dequantize import tensors
from tests.hardware.part import PartResult, Setting
from tests.hardware.results import Results, parts_to_run, read_results, write_results
from tests.megakernel.compilers import needs_compiler
from tests.megakernel.fake_cuda import FakeDriver, emulated
from tests.megakernel.test_gpu_reference import FAMILIES, FORMATS, compiled_for

ROOT = Path(__file__).resolve().parents[2]


def facts(name="NVIDIA H100 80GB HBM3", sms=132, architecture="sm_90", shared_bytes=232_448) -> DeviceFacts:
    return DeviceFacts(
        name=name, architecture=architecture, num_sms=sms, shared_bytes=shared_bytes, memory_bytes=80 << 30
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (facts(), "h100"),
        (facts("NVIDIA H200"), "h200"),
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
    assert parts_to_run(PARTS, [], again) == [name for name in PARTS if name != "correctness"]
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
    with pytest.raises(ValueError, match="no part is called sock; there are toys"):
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


@pytest.mark.parametrize("part", ["toys", "correctness", "independence", "soak"])
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


@needs_compiler
def test_steps_in_one_launch_are_checked_over_emulated_kernels(monkeypatch):
    monkeypatch.setattr(multi_step, "ROUNDS", 2)
    monkeypatch.setattr(multi_step, "CONTEXTS", (17, 1, 40, 2))
    ((compiled, emulation),) = tiny_models(8)
    driver = FakeDriver(emulated(emulation))
    with opened(compiled, multi_step.num_blocks(6), driver=driver, view=host_view) as runtime:
        problems, figures = multi_step.check(runtime, 6, host_view)
    assert problems == []
    assert set(figures) == {
        f"{name}_{figure}"
        for name in ("rows4", "rows1", "drafted")
        for figure in (
            *("host_ms_a_step", "launch_ms_a_step", "host_ms_a_token", "launch_ms_a_token"),
            "host_over_launch",
        )
    }


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
