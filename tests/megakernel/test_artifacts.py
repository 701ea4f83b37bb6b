"""Artifacts on disk: built, found, moved, damaged, built twice at once, and run."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from megakernel.artifact_build import NotAnArtifactError, build_artifact, write_artifact
from megakernel.artifact_cache import KEPT, ArtifactCache
from megakernel.artifact_folder import Wanted, open_artifact
from megakernel.build import BuildError, find_compiler
from megakernel.compiled import compile_here
from megakernel.cpu_identity import cpu_of, this_cpu
from megakernel.folder_lock import hold, locked
from megakernel.machine import Machine
from megakernel.manifest import (
    LIBRARY,
    MANIFEST,
    PROGRAMS,
    SOURCE,
    STEP_TABLE,
    WEIGHTS,
    ArtifactDamagedError,
    ArtifactError,
    ArtifactMismatchError,
    UnsupportedModelError,
)
from megakernel.recipe import Recipe, compile_programs
from megakernel.runtime import Runtime
from megakernel.schedule_error import Hazard, ScheduleError
from tests.megakernel.native_steps import Group, chain, rows_of
from tests.tiny_model import tiny_weights

WANTED = Wanted(fingerprint="tiny", kv_format="float16", num_workers=2)
TWO_CORES = Machine(
    name="two cores",
    kind="cpu",
    num_workers=2,
    scratch_bytes=1 << 20,
    page_bytes=4096,
    bandwidth_gb_s=20.0,
    worker_bandwidth_gb_s=12.0,
    load_latency_us=0.2,
    sync_us=0.5,
    macs_per_us={"F32": 10_000.0, "F16": 10_000.0},
    instruction_us=0.1,
)

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


def recipe(**changes) -> Recipe:
    weights = tiny_weights(1)
    facts = {
        "model": "tiny",
        "fingerprint": "tiny",
        "shape": weights.shape,
        "formats": weights.formats,
        "machine": TWO_CORES,
        "kv_format": "float16",
        "buckets": (1, 8),
        "extra_flags": ("-O1",),
    }
    return Recipe(**(facts | changes))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_artifact(tmp_path_factory.mktemp("artifacts") / "tiny", recipe(), tiny_weights(1))


@pytest.fixture
def copied(built, tmp_path):
    """As shipped to another machine."""
    return shutil.copytree(built.folder, tmp_path / "elsewhere" / "tiny")


def logits_of(compiled) -> np.ndarray:
    rows = rows_of(Group(tokens=[3, 1, 4, 1, 5], parents=chain(5), context=0, table=[1]))
    with Runtime(compiled, 4, 16) as runtime:
        return runtime.run(rows)


def test_it_holds_what_its_manifest_says(built):
    names = {path.name for path in built.folder.iterdir()} - {MANIFEST}
    assert names == set(built.manifest.files)
    assert {PROGRAMS, LIBRARY, SOURCE, WEIGHTS, STEP_TABLE, "report.txt"} <= names
    built.verify()
    built.check_for(WANTED)
    assert built.manifest.buckets == (1, 8)
    assert "two cores" in (built.folder / "report.txt").read_text()


def test_the_step_table_has_every_bucket_and_context(built):
    table = built.step_table()
    assert {step.rows for step in table.steps} == {1, 8}
    assert table.contexts == (64, 511)
    assert all(min(step.measured_ms, step.predicted_ms, step.bound_ms) > 0 for step in table.steps)


def test_moved_it_gives_the_bits_of_one_compiled_on_the_spot(copied, tmp_path):
    programs = compile_programs(recipe(), recipe().plan())
    there = compile_here(programs, tiny_weights(1), library_folder=tmp_path, extra_flags=("-O1",))
    assert np.array_equal(logits_of(open_artifact(copied).load()), logits_of(there))


def changed(path: Path, at: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.unlink()  # the old file may be a library that this process has loaded
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [PROGRAMS, LIBRARY, WEIGHTS, SOURCE, STEP_TABLE])
def test_a_flipped_bit_a_cut_end_and_a_missing_file_are_named(copied, name):
    original = (copied / name).read_bytes()
    changed(copied / name)
    with pytest.raises(ArtifactDamagedError, match=f"{name} is damaged: its checksum"):
        open_artifact(copied).verify()
    (copied / name).write_bytes(original[:-1])
    with pytest.raises(ArtifactDamagedError, match=rf"{name} has {len(original) - 1} bytes, not"):
        open_artifact(copied).verify()
    (copied / name).unlink()
    with pytest.raises(ArtifactDamagedError, match=f"{name}: No such file"):
        open_artifact(copied).verify()


def test_nothing_damaged_is_run(copied):
    changed(copied / WEIGHTS)
    with pytest.raises(ArtifactDamagedError, match=f"{WEIGHTS} is damaged"):
        Runtime(open_artifact(copied).load(), 4, 16)
    for name in (LIBRARY, PROGRAMS):
        changed(copied / name)
        with pytest.raises(ArtifactDamagedError, match=f"{name} is damaged"):
            open_artifact(copied).load()


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_changed_manifest_is_refused(copied):
    edit_manifest(copied, num_workers=4)
    with pytest.raises(ArtifactDamagedError, match="has been changed"):
        open_artifact(copied)
    (copied / MANIFEST).write_bytes(b"{")
    with pytest.raises(ArtifactDamagedError, match="is damaged"):
        open_artifact(copied)


@pytest.mark.parametrize(("version", "age"), [(2, "newer"), (0, "older")])
def test_another_versions_format_is_refused_whatever_else_it_holds(copied, version, age):
    (copied / MANIFEST).write_text(json.dumps({"format": version, "unknown": True}))
    with pytest.raises(ArtifactMismatchError, match=f"format {version}, {age} than 1"):
        open_artifact(copied)


def test_no_folder_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactDamagedError, match="is no artifact"):
        open_artifact(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"fingerprint": "other"},
            "the fingerprint tiny, the model to serve has other",
        ),
        ({"kv_format": "float32"}, "keeps KV as float16, wanted is float32: set `model.kv_dtype` to float16"),
        ({"num_workers": 3}, "is for 2 threads, wanted are 3: set `num_threads` to 2"),
    ],
)
def test_what_it_is_not_for_is_named(built, change, expected):
    with pytest.raises(ArtifactMismatchError, match=expected):
        built.check_for(msgspec.structs.replace(WANTED, **change))
    built.check_for(Wanted(fingerprint="tiny", kv_format=None, num_workers=None))


def test_another_cpu_is_refused(built):
    here = this_cpu()
    less = msgspec.structs.replace(here, instruction_sets=here.instruction_sets[1:])
    with pytest.raises(ArtifactMismatchError, match=f"{here.instruction_sets[0]}, which this CPU lacks"):
        built.check_for(WANTED, less)
    with pytest.raises(ArtifactMismatchError, match="this machine is aarch64"):
        built.check_for(WANTED, msgspec.structs.replace(here, architecture="aarch64"))
    with pytest.raises(ArtifactMismatchError, match="this one is `Another`"):
        built.check_for(WANTED, msgspec.structs.replace(here, model="Another"))


def test_a_cpus_identity_ignores_what_its_system_adds():
    text = "processor: 0\nmodel name: Some CPU\nflags: fpu avx2 fma {}\n\nprocessor: 1\nflags: none\n"
    first, second = (cpu_of("x86_64", text.format(extra)) for extra in ("", "ibrs_enhanced"))
    assert first == second
    assert first.instruction_sets == ("avx2", "fma")


def test_a_program_that_is_not_proved_gets_no_library(tmp_path):
    program = compile_programs(recipe(buckets=(1,)), recipe().plan())[0]
    unordered = tuple(
        tuple(msgspec.structs.replace(instruction, waits=()) for instruction in worker)
        for worker in program.workers
    )
    racy = msgspec.structs.replace(program, workers=unordered)
    with pytest.raises(ScheduleError) as refusal:
        write_artifact(tmp_path, recipe(buckets=(1,)), tiny_weights(1), (racy,), recipe().plan(), False)
    assert refusal.value.hazard is Hazard.RAW
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_kernels_is_named(tmp_path):
    odd = tiny_weights(1, head_dim=8)
    with pytest.raises(UnsupportedModelError, match="tiny: "):
        build_artifact(tmp_path / "odd", recipe(shape=odd.shape, formats=odd.formats), odd)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_nothing(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(what, fraction):
        if what == "compiling":
            raise StoppedError

    with pytest.raises(StoppedError):
        build_artifact(tmp_path / "tiny", recipe(), tiny_weights(1), progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_up_to_the_end(tmp_path):
    said: list[float] = []
    small = recipe(buckets=(1,))
    build_artifact(tmp_path / "tiny", small, tiny_weights(1), progress=lambda what, at: said.append(at))
    assert said == sorted(said)
    assert 0 <= said[0] < said[-1] <= 1


def test_other_files_are_not_written_over(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(NotAnArtifactError, match="holds other files"):
        build_artifact(tmp_path, recipe(), tiny_weights(1))
    assert (tmp_path / "mine").read_text() == "precious"


def test_the_cache_builds_once_and_again_what_is_damaged(tmp_path):
    cache = ArtifactCache(tmp_path)
    small = recipe(buckets=(1,))
    first = cache.find_or_build(small, tiny_weights(1))
    assert first.was_built
    assert not cache.find_or_build(small, tiny_weights(1)).was_built
    changed(first.artifact.folder / WEIGHTS)
    assert cache.find(small) is None
    again = cache.find_or_build(small, tiny_weights(1))
    assert again.was_built
    assert again.artifact.folder == first.artifact.folder
    again.artifact.verify()
    assert [path.name for path in tmp_path.iterdir()] == [again.artifact.folder.name]


def test_a_searched_one_is_taken_first(tmp_path):
    cache = ArtifactCache(tmp_path)
    small = recipe(buckets=(1,))
    searched = cache.find_or_build(small, tiny_weights(1), plan=small.plan()).artifact
    assert searched.manifest.is_searched
    found = cache.find_or_build(small, tiny_weights(1))
    assert (found.was_built, found.artifact.folder) == (False, searched.folder)


def test_without_a_compiler_what_serves_is_found(tmp_path):
    cache = ArtifactCache(tmp_path)
    made = cache.find_or_build(recipe(buckets=(1,)), tiny_weights(1)).artifact
    assert cache.find_any(WANTED).folder == made.folder
    assert cache.find_any(msgspec.structs.replace(WANTED, num_workers=3)) is None
    changed(made.folder / LIBRARY)
    assert cache.find_any(WANTED) is None


def test_old_ones_go_but_not_those_in_use(built, tmp_path):
    cache = ArtifactCache(tmp_path)
    for age in range(KEPT + 2):
        folder = shutil.copytree(built.folder, tmp_path / f"tiny-{age}")
        stamp = 1_000_000 - age

        os.utime(folder / MANIFEST, (stamp, stamp))
    with hold(tmp_path / f"tiny-{KEPT + 1}" / MANIFEST):
        cache.find_or_build(recipe(buckets=(1,)), tiny_weights(1))
    left = {path.name for path in tmp_path.iterdir()}
    assert {f"tiny-{age}" for age in range(KEPT - 1)} | {f"tiny-{KEPT + 1}"} < left
    assert len(left) == KEPT + 1


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "other"},
        {"kv_format": "float32"},
        {"buckets": (1, 2)},
        {"machine": msgspec.structs.replace(TWO_CORES, num_workers=1)},
        {"formats": {"embed": "Q8_0"}},
        {"extra_flags": ()},
    ],
)
def test_whatever_goes_in_is_in_the_key(change):
    assert recipe(**change).key(is_searched=False) != recipe().key(is_searched=False)
    assert recipe().key(is_searched=True) != recipe().key(is_searched=False)
    assert recipe().key(is_searched=False) == recipe().key(is_searched=False)


def _build_in_process(folder: str, queue) -> None:
    found = ArtifactCache(Path(folder)).find_or_build(recipe(buckets=(1,)), tiny_weights(1))
    found.artifact.verify()
    queue.put((found.was_built, str(found.artifact.folder)))


def test_two_processes_at_once_build_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_build_in_process, args=(str(tmp_path), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(30)
    assert sorted(was_built for was_built, _ in answers) == [False, True]
    assert len({folder for _, folder in answers}) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_waiting_for_another_builder_can_be_given_up(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(what, fraction):
        assert "waiting" in what
        raise StoppedError

    with locked(tmp_path / "tiny"):
        with pytest.raises(StoppedError):
            build_artifact(tmp_path / "tiny", recipe(), tiny_weights(1), progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_errors_are_of_one_family():
    assert issubclass(ArtifactDamagedError, ArtifactError)
    assert issubclass(ArtifactMismatchError, ArtifactError)
