"""`python -m router.catalogue_process`: compiles one upload into the store, and says how far it is.

A CompileJob comes as the first line of standard input; the messages go to standard output. When its input
ends, so does the compilation: whoever wanted it is gone.
"""

import errno
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from cluster.catalogue.compile import CompileTarget
from cluster.catalogue.faults import Fault, UploadError
from cluster.catalogue.store import CatalogueStore, ConflictError, PutResult
from cluster.text import Tokenizer
from router.compile_messages import (
    Busy,
    Compiled,
    CompileJob,
    CompileMessage,
    LineFault,
    NoSpace,
    Progressed,
    Refused,
)

NICENESS = 10
"""Requests' tokens go first where they share this machine's cores."""
CHUNK_BYTES = 1024 * 1024
MESSAGE_EVERY_S = 0.1
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

Say = Callable[[CompileMessage], None]


class _UnwantedError(Exception):
    """Whoever wanted the compilation is gone."""


class Reporter:
    """Passes progress on now and then, and knows how long each phase took."""

    def __init__(self, say: Say, max_items: int, is_unwanted: threading.Event) -> None:
        self._say = say
        self._max_items = max_items
        self._is_unwanted = is_unwanted
        self._phase = ""
        self._phase_began_s = self._said_s = time.perf_counter()
        self.phase_ms: dict[str, float] = {}

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        if self._is_unwanted.is_set():
            raise _UnwantedError
        if phase == "read" and done > self._max_items:
            raise UploadError(f"more than {self._max_items} items; split the catalogue")
        now_s = time.perf_counter()
        if phase != self._phase:
            self._end_phase(now_s)
            self._phase = phase
        elif now_s - self._said_s < MESSAGE_EVERY_S:
            return
        self._said_s = now_s
        self._say(Progressed(phase=phase, done=done, total=total))

    def end(self) -> None:
        self._end_phase(time.perf_counter())

    def _end_phase(self, now_s: float) -> None:
        """A phase lasts until the next one's first report."""
        if self._phase:
            spent_ms = (now_s - self._phase_began_s) * 1e3
            self.phase_ms[self._phase] = round(self.phase_ms.get(self._phase, 0.0) + spent_ms, 3)
            self._phase_began_s = now_s


def compile_job(job: CompileJob, say: Say, is_unwanted: threading.Event) -> CompileMessage:
    """The last word. Raises _UnwantedError."""
    reporter = Reporter(say, job.max_items, is_unwanted)
    target = CompileTarget(
        tokenizer=Tokenizer(job.tokenizer_json.encode()), end_token=job.end_token, fingerprint=job.fingerprint
    )
    upload = Path(job.upload)
    try:
        result = CatalogueStore(Path(job.folder)).put(
            job.name,
            _chunks(upload),
            upload_format=job.upload_format,
            target=target,
            tenant=job.tenant,
            skip_bad=job.skip_bad,
            progress=reporter,
        )
    except UploadError as error:
        return Refused(message=str(error), num_faults=error.num_faults, faults=_line_faults(error.faults))
    except ConflictError:
        return Busy()
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        return NoSpace(message=f"no space is left in the router's catalogue folder: {error.strerror}")
    reporter.end()
    return _compiled(result, reporter.phase_ms)


def _compiled(result: PutResult, phase_ms: dict[str, float]) -> Compiled:
    info = result.info
    return Compiled(
        version=info.ref.version,
        num_items=info.num_items,
        num_path_tokens=info.num_path_tokens,
        num_nodes=info.num_nodes,
        num_bytes=info.ref.num_bytes,
        num_faults=info.num_left_out,
        faults=_line_faults(result.faults),
        phase_ms=phase_ms,
    )


def _line_faults(faults: tuple[Fault, ...]) -> tuple[LineFault, ...]:
    return tuple(LineFault(line=fault.line, message=fault.message) for fault in faults)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def main() -> int:
    os.nice(NICENESS)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=CompileJob)
    is_unwanted = threading.Event()

    def watch() -> None:
        sys.stdin.buffer.read()
        is_unwanted.set()

    threading.Thread(target=watch, daemon=True).start()

    def say(message: CompileMessage) -> None:
        try:
            sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            is_unwanted.set()

    try:
        say(compile_job(job, say, is_unwanted))
    except _UnwantedError:
        return 1
    except Exception:  # noqa: BLE001 - whatever it was: told in the router's log, which has our standard error
        traceback.print_exc()
        return 2
    return 0


if __name__ == "__main__":
    # Not an orderly end: the thread that reads the input holds its lock, on which that would wait.
    os._exit(main())
