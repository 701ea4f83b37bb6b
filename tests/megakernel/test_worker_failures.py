"""Worker threads that wait in vain, stall or die end a step with an error; sanitizers find nothing."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from megakernel.artifact import pack_weights
from megakernel.build import FLAGS, INCLUDE_FOLDER, BuildError, find_compiler
from megakernel.codegen_cpu import Generated, generate
from megakernel.program import Program, Wait
from megakernel.runtime import Runtime
from megakernel.step import StepError
from tests.megakernel.native_steps import BLOCK, Group, rows_of
from tests.megakernel.programs import Recipe, build_program
from tests.megakernel.test_runtime import QUICK, programs_for, stored_weights
from tests.tiny_model import tiny_weights

ROW = rows_of(Group(tokens=[1], parents=[-1], context=0, table=[0]))
WAITED = re.compile(
    r"worker (\d+), instruction (\d+): counter (\d+) has (\d+) of (\d+) arrivals after 0\.2 s"
)
STALL_S = 1.0
"""Of a worker, where the others wait 0.2 s."""

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def weights():
    return tiny_weights(1, "qwen3")


@pytest.fixture(scope="module")
def program(weights) -> Program:
    return build_program(weights.shape, Recipe(workers=3, stats_span=64))


def with_statement(generated: Generated, worker: int, instruction: int, statement: str) -> Generated:
    """The source with a statement where a worker starts an instruction."""
    before, name, body = generated.source.partition(f"bool rows1_worker{worker}(")
    start = f"  w.start({instruction});"
    assert name
    assert start in body
    source = f"#include <unistd.h>\n{before}{name}{body.replace(start, f'{start} {statement}', 1)}"
    return msgspec.structs.replace(generated, source=source)


@pytest.fixture
def sabotaged(weights, program, tmp_path, monkeypatch) -> Callable[[int, int, str], Runtime]:
    """Opens a runtime of three workers, one of which does what it should not."""

    def open_it(worker: int, instruction: int, statement: str) -> Runtime:
        monkeypatch.setattr(
            "megakernel.compiled.generate",
            lambda *given: with_statement(generate(*given), worker, instruction, statement),
        )
        return Runtime.of(
            [program], weights, 2, BLOCK, library_folder=tmp_path, extra_flags=QUICK, wait_limit_s=0.2
        )

    return open_it


def signalled_late(program: Program, worker: int, instruction: int) -> set[int]:
    """Counters that a worker's stop at an instruction leaves short."""
    return {i.signal for i in program.workers[worker][instruction:] if i.signal >= 0}


@pytest.mark.parametrize(
    "statement", [f"usleep({int(STALL_S * 1e6)});", "pthread_exit(nullptr);"], ids=["stalls", "dies"]
)
@pytest.mark.parametrize("worker", [1, 2])
def test_a_worker_that_stops_is_an_error_that_says_who_waits_for_what(
    sabotaged, program, worker: int, statement: str
):
    at = len(program.workers[worker]) // 2
    with sabotaged(worker, at, statement) as runtime:
        with pytest.raises(StepError) as raised:
            runtime.run(ROW)
        found = WAITED.match(str(raised.value))
        assert found, raised.value
        waiter, instruction, counter, arrived, wanted = map(int, found.groups())
        assert waiter != worker
        assert Wait(counter, wanted) in program.workers[waiter][instruction].waits
        assert arrived < wanted
        # Another waiter may have given up first, for want of what the first one would have done.
        stopped = {worker: at} | {waiter: instruction}
        assert counter in set().union(*(signalled_late(program, *place) for place in stopped.items()))
        with pytest.raises(StepError) as again:
            runtime.run(ROW)
        assert str(again.value) == str(raised.value)


def test_a_worker_that_stalls_at_its_last_instruction_is_named(sabotaged, program):
    """Nobody waits for a counter then: the host waits for the worker itself."""
    worker = 1
    last = len(program.workers[worker]) - 1
    assert program.workers[worker][last].signal < 0 or not any(
        wait.counter == program.workers[worker][last].signal
        for sequence in program.workers
        for instruction in sequence
        for wait in instruction.waits
    )
    with sabotaged(worker, last, f"usleep({int(STALL_S * 1e6)});") as runtime:
        with pytest.raises(
            StepError, match=rf"worker 1 has not finished the step: it is at instruction {last} after 0\.4 s"
        ):
            runtime.run(ROW)


@pytest.fixture(scope="module")
def library_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("libraries")


def test_a_stalled_worker_is_an_error_that_says_who_waits_for_what(weights, library_folder):
    program = programs_for(weights.shape, buckets=(1,))[0]
    first, *others = program.workers[1]
    stalled = msgspec.structs.replace(first, waits=(Wait(program.num_counters - 1, 1_000),))
    program = msgspec.structs.replace(program, workers=(program.workers[0], (stalled, *others)))
    rows = rows_of(Group(tokens=[1], parents=[-1], context=0, table=[0]))
    with Runtime.of(
        [program], weights, 2, BLOCK, library_folder=library_folder, extra_flags=QUICK, wait_limit_s=0.2
    ) as native:
        with pytest.raises(
            StepError, match=r"worker \d, instruction \d+: counter \d+ has \d+ of \d+ arrivals"
        ):
            native.run(rows)
        with pytest.raises(StepError, match="arrivals after"):
            native.run(rows)


def run_under(sanitizer: str, storage: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`native/run_steps.cpp` over two workers of a tiny model, instrumented."""
    stored = stored_weights(folder, "qwen2", storage)
    generated = generate(programs_for(stored.shape, buckets=(1, 8)), stored.formats)
    packed = np.empty(generated.layout.num_bytes, dtype=np.uint8)
    pack_weights(generated.layout, stored, packed)
    packed.tofile(folder / "weights")
    (folder / "generated.cpp").write_text(generated.source)
    driver = Path(__file__).parent / "native" / "run_steps.cpp"
    usual = [flag for flag in FLAGS if flag not in ("-O3", "-shared")]
    command = [find_compiler().path, *usual, "-O1", "-g", "-march=native", f"-fsanitize={sanitizer}", *flags]
    command += ["-fno-sanitize-recover=all", f"-I{INCLUDE_FOLDER}", f'-DGENERATED="{folder}/generated.cpp"']
    subprocess.run([*command, str(driver), "-o", str(folder / "driver")], check=True, timeout=280)
    # Thread sanitizer cannot live with a fully randomized address space.
    steady = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*steady, str(folder / "driver"), str(folder / "weights")],
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("storage", ["F32", "Q4_1"])
def test_generated_code_is_clean_under_sanitizers(tmp_path, sanitizer, storage):
    done = run_under(sanitizer, storage, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_the_thread_sanitizer_sees_a_race_where_there_is_one(tmp_path):
    """KV written to the slots that steps read and write: what no caller may do."""
    done = run_under("thread", "F32", tmp_path, "-DHANDED_OVER_BLOCK=3")
    assert done.returncode != 0
    assert "data race" in done.stderr
