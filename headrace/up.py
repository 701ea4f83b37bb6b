"""`headrace up`, once its options are known: start, show how it goes, and watch or leave."""

import contextlib
import json
import shlex
import signal
import subprocess
import time
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from cluster.config import HeadraceConfig
from headrace.launcher import StartFailedError, follow, spawn, stop
from headrace.live import Look, rates
from headrace.ports import PortTakenError
from headrace.probe import NotServingError, fetch_metrics
from headrace.progress_bar import StatusBar
from headrace.run_folder import ClusterState, Phase, RunFolder, RunFolderError
from headrace.terminal import EXIT_USAGE, PHASES, err, fail, out

_LOOK_INTERVAL_S = 2.0


def start(folder: RunFolder, config: HeadraceConfig, *, detach: bool) -> None:
    """Returns when the cluster is ready (detached), or when it has ended, by Ctrl-C, SIGTERM or itself."""
    terminate_as_interrupt()
    started_s = time.monotonic()
    process: subprocess.Popen[bytes] | None = None
    try:
        process = spawn(folder, config, is_attached=not detach)
        state = follow_shown(process, folder)
        _announce(state, time.monotonic() - started_s)
        if detach:
            return
        _watch(process, state)
        if exit_code := process.wait():
            log = folder.log_tail()
            end(folder, process)
            fail(f"the cluster has ended; its log ends with\n{log}", exit_code)
        out.print("stopped")
    except (RunFolderError, PortTakenError) as error:
        fail(str(error), EXIT_USAGE)
    except StartFailedError as error:
        end(folder, process)
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        with err.status("stopping"):
            end(folder, process)
        out.print("stopped")


def terminate_as_interrupt() -> None:
    """SIGTERM and SIGHUP raise KeyboardInterrupt from here on."""

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        del signum, frame
        raise KeyboardInterrupt

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)


def end(folder: RunFolder, process: "subprocess.Popen[bytes] | None") -> None:
    """In order, by a supervisor that is still there; nothing may interrupt it."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if process is not None:
        with contextlib.suppress(OSError):
            process.terminate()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
    try:
        stop(folder)
    except StartFailedError as error:
        err.print(escape(str(error)))
    if process is not None:
        process.wait()


def follow_shown(
    process: "subprocess.Popen[bytes]", folder: RunFolder, console: Console = err
) -> ClusterState:
    """With a spinner, and a bar while the model is compiled; where nobody watches, a line a phase.

    Raises StartFailedError.
    """
    shown: Phase | None = None
    with StatusBar(console, "starting") as bar:

        def show(state: ClusterState) -> None:
            nonlocal shown
            words = PHASES[state.phase]
            if state.progress is not None:
                bar.show(f"{words} ({state.progress.what})", state.progress.fraction)
            else:
                bar.show(words)
            if state.phase != shown and not console.is_terminal and state.phase != "ready":
                console.print(words)
            shown = state.phase

        return follow(process, folder, show)


def _announce(state: ClusterState, seconds: float) -> None:
    body = json.dumps({"model": state.model, "messages": [{"role": "user", "content": "Hello"}]})
    parts = ", ".join(f"{phase} {taken:.1f}" for phase, taken in state.phase_seconds.items())
    out.print(f"[bold green]ready[/] in {seconds:.1f} s ({parts}): {escape(state.model)}")
    out.print(f"  {state.execution}")
    if state.note:
        out.print(f"  [yellow]note:[/] {escape(state.note)}", soft_wrap=True)
    out.print(f"  HTTP  {state.http_url}/v1    gRPC  {state.grpc_address}")
    out.print(
        f"  curl {state.http_url}/v1/chat/completions -H 'content-type: application/json' -d "
        f"{escape(shlex.quote(body))}",
        soft_wrap=True,
    )
    out.print("  headrace chat")


def _watch(process: "subprocess.Popen[bytes]", state: ClusterState) -> None:
    """Until the supervisor ends: a line of figures, kept current where somebody watches."""
    if not out.is_terminal:
        process.wait()
        return
    previous: Look | None = None
    with out.status("ready") as line:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_INTERVAL_S)
                return
            try:
                look = Look(time.monotonic(), fetch_metrics(state.http_url))
            except NotServingError as error:
                line.update(f"[red]not answering[/]: {escape(str(error))}")
            else:
                line.update(f"ready · {rates(previous, look).line()} · Ctrl-C stops")
                previous = look
