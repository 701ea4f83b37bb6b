"""Compiles many models beside one another, in processes of their own; whoever runs them waits for a file.

A build leaves `NAME.pickle` in the folder, or `NAME.error` that says what was wrong. Cubins are cached as
always (`megakernel.cuda_build`), so that a second run only plans again.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.gpu_models import BuiltModel, GpuModel, compile_model
from megakernel.cuda_build import find_nvcc
from megakernel.machine import Machine
from megakernel.pipeline import decode_program, encode_program
from megakernel.user_cache import write_atomically

_POLL_S = 0.1
_GIB_A_BUILD = 3.0
"""What nvcc takes."""


class BuildMissingError(RuntimeError):
    """A model that did not compile, or not in time; the message says which."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        """`is_final`: it will not compile the next time either."""
        super().__init__(message)
        self.is_final = is_final


class Builds:
    """Close it, or use it in a `with` statement: builds that still run are ended then."""

    def __init__(self, models: Sequence[GpuModel], machine: Machine, folder: Path) -> None:
        """In the order given. Raises ToolMissingError where there is no nvcc."""
        find_nvcc()
        self.models = tuple(dict.fromkeys(models))
        folder.mkdir(parents=True, exist_ok=True)
        for model in self.models:
            for path in (_pickle(folder, model), _error(folder, model)):
                path.unlink(missing_ok=True)
        workers = max(1, min(len(self.models), _cores(), int(_memory_gib() / _GIB_A_BUILD)))
        # Fresh processes: a fork of one that has opened a GPU cannot.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context)
        self._futures: list[Future[float]] = [
            self._pool.submit(_build, model, machine, folder) for model in self.models
        ]
        for model, future in zip(self.models, self._futures, strict=True):
            future.add_done_callback(partial(_note_crash, _error(folder, model)))

    def wait(self) -> None:
        """For all, shown in their order. Errors are in their files."""
        for model, future in zip(self.models, self._futures, strict=True):
            said = f"{future.result():.0f} s" if future.exception() is None else str(future.exception())
            print(f"  {model.name}: {said}", flush=True)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if all(future.done() for future in self._futures):
            return
        for process in multiprocessing.active_children():
            # As Ctrl-C does: the compiler that it waits for is then ended with it.
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)

    def __enter__(self) -> "Builds":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def built(folder: Path, model: GpuModel, deadline_s: float) -> BuiltModel:
    """Waits for it, as `await_build` does. Raises BuildMissingError."""
    await_build(folder, model, deadline_s)
    return load(_pickle(folder, model).read_bytes())


def save(found: BuiltModel) -> bytes:
    """Programs as msgpack: they are many small records, which pickle takes seconds for."""
    programs = [encode_program(program) for program in found.compiled.programs]
    bare = msgspec.structs.replace(found.compiled, programs=())
    return pickle.dumps((programs, msgspec.structs.replace(found, compiled=bare)))


def load(saved: bytes) -> BuiltModel:
    programs, found = pickle.loads(saved)
    decoded = tuple(decode_program(program) for program in programs)
    compiled = msgspec.structs.replace(found.compiled, programs=decoded)
    return msgspec.structs.replace(found, compiled=compiled)


def await_build(folder: Path, model: GpuModel, deadline_s: float) -> None:
    """Until `time.monotonic()` is past the deadline. Raises BuildMissingError."""
    while True:
        if _pickle(folder, model).exists():
            return
        if (path := _error(folder, model)).exists():
            said = path.read_text(encoding="utf-8")
            raise BuildMissingError(f"{model.name} does not compile: {said}", is_final=True)
        if time.monotonic() > deadline_s:
            raise BuildMissingError(f"{model.name} was not compiled in time", is_final=False)
        time.sleep(_POLL_S)


def _build(model: GpuModel, machine: Machine, folder: Path) -> float:
    """Seconds that it took."""
    started_s = time.perf_counter()
    try:
        found = compile_model(model, machine)
    except Exception:
        write_atomically(_error(folder, model), traceback.format_exc().encode())
    else:
        write_atomically(_pickle(folder, model), save(found))
    return time.perf_counter() - started_s


def _note_crash(path: Path, future: Future[float]) -> None:
    """Of a process that ended on its way; one that is cancelled leaves nothing."""
    if not future.cancelled() and (error := future.exception()) is not None:
        write_atomically(path, f"{type(error).__name__}: {error}".encode())


def _pickle(folder: Path, model: GpuModel) -> Path:
    return folder / f"{model.name}.pickle"


def _error(folder: Path, model: GpuModel) -> Path:
    return folder / f"{model.name}.error"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
