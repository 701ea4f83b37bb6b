"""Runs a compilation in a process of its own: its memory goes with it, and requests' tokens do not wait."""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable

import msgspec

from router.compile_messages import CompileJob, CompileMessage, Progressed

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
STOP_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)
_decoder: msgspec.json.Decoder[CompileMessage] = msgspec.json.Decoder(CompileMessage)


class CompileCrashError(RuntimeError):
    """The process ended without an answer. A defect of ours, or it was killed."""


async def compile_in_process(job: CompileJob, on_progress: Callable[[Progressed], None]) -> CompileMessage:
    """The process's last word. Cancelled, the process is ended first. Raises CompileCrashError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "router.catalogue_process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=MAX_MESSAGE_BYTES,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(part or "." for part in sys.path)},
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):  # it has ended: its status says so
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            await process.stdin.drain()
        async for line in process.stdout:
            message = _decoder.decode(line)
            if not isinstance(message, Progressed):
                return message
            on_progress(message)
        status = await process.wait()
        raise CompileCrashError(f"the process that compiled {job.name!r} ended with status {status}")
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """It ends by itself once its input does; who does not, is killed."""
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
            return
    _log.warning("the compiling process %d does not end; killing it", process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
