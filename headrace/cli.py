"""The `headrace` command: up, down, status, chat, demo, catalogue, target, compile, doctor, trace."""

import sys
from enum import StrEnum
from typing import Annotated

import typer
from rich.markup import escape

from headrace import __version__
from headrace.catalogue_command import catalogue_app, target
from headrace.compile_command import compile_model
from headrace.demo_command import demo
from headrace.options import (
    ConfigOption,
    GrpcPortOption,
    HttpPortOption,
    ModelOption,
    RedisOption,
    configuration,
)
from headrace.run_folder import ClusterState, RunFolder, default_run_folder
from headrace.terminal import EXIT_USAGE, PHASES, err, fail, out
from headrace.trace_command import trace

app = typer.Typer(
    help="Serves small LLMs inside a real-time ad auction's deadline, on a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(trace)
app.command()(target)
app.command()(demo)
app.add_typer(catalogue_app, name="catalogue")


class Executor(StrEnum):
    AUTO = "auto"
    MEGAKERNEL = "megakernel"
    MEGAKERNEL_CUDA = "megakernel-cuda"
    TORCH = "torch"
    NOOP = "noop"


def _folder() -> RunFolder:
    return RunFolder(default_run_folder())


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when ready; stays up.")] = False,
    config: ConfigOption = None,
    model: ModelOption = None,
    http_port: HttpPortOption = None,
    grpc_port: GrpcPortOption = None,
    redis_url: RedisOption = None,
    prefill_replicas: Annotated[int | None, typer.Option(help="0: decode workers prefill too.")] = None,
    decode_replicas: Annotated[int | None, typer.Option()] = None,
    executor: Annotated[Executor | None, typer.Option(help="What runs decode steps.")] = None,
) -> None:
    """Start a cluster on this machine: Redis, Ray, router, prefill and decode workers."""
    from headrace.up import start

    wanted = configuration(
        config,
        {
            ("model", "source"): model,
            ("router", "http_port"): http_port,
            ("router", "grpc_port"): grpc_port,
            ("placement", "redis_url"): redis_url,
            ("prefill", "num_replicas"): prefill_replicas,
            ("decode", "num_replicas"): decode_replicas,
            ("decode", "executor"): executor.value if executor else None,
        },
    )
    folder = _folder()
    if folder.is_locked():
        _already_running(folder, http_port, grpc_port)
        return
    start(folder, wanted, detach=detach)


def _already_running(folder: RunFolder, http_port: int | None, grpc_port: int | None) -> None:
    """Says so, and fails unless the running one is ready and answers where it was asked to."""
    from headrace.probe import is_ready

    state = folder.state()
    if state is None or state.phase != "ready" or not is_ready(state.http_url):
        fail(
            f"a cluster in {folder.path} is {'starting' if state is None else PHASES[state.phase]}, "
            "not answering; `headrace down` ends it"
        )
    if http_port not in (None, 0, state.http_port) or grpc_port not in (None, 0, state.grpc_port):
        fail(
            f"a cluster is up already, at {state.http_url} and gRPC {state.grpc_address}; `headrace down` "
            "ends it, or set HEADRACE_HOME to another folder for a second one",
            EXIT_USAGE,
        )
    out.print(f"already up: {state.model} at {state.http_url} (gRPC {state.grpc_address})")


@app.command()
def down() -> None:
    """End the cluster, and clear away what a killed one left."""
    from headrace.launcher import StartFailedError, stop

    folder = _folder()
    try:
        with err.status("stopping"):
            had_any = stop(folder)
    except StartFailedError as error:
        fail(str(error))
    out.print("stopped" if had_any else "nothing is up")


def running_cluster() -> ClusterState:
    """Ends the command where none is ready."""
    folder = _folder()
    state = folder.state() if folder.is_locked() else None
    if state is None:
        fail("no cluster is up; `headrace up` starts one")
    if state.phase != "ready":
        fail(f"the cluster is not ready yet: {PHASES[state.phase]}")
    return state


@app.command()
def status() -> None:
    """Show the cluster and its workers. Exits with 1 where it is not ready."""
    from cluster.placement.store import PlacementUnavailableError
    from headrace.live import Look, rates, uptime, workers_of, workers_table
    from headrace.probe import NotServingError, fetch_metrics, is_ready

    state = running_cluster()
    out.print(f"[bold]{state.model}[/] at {state.http_url} (gRPC {state.grpc_address}), up {uptime(state)}")
    try:
        out.print(workers_table(workers_of(state)))
    except PlacementUnavailableError as error:
        err.print(f"Redis does not answer ({error}); the router places by load alone")
    try:
        out.print(rates(None, Look(0.0, fetch_metrics(state.http_url))).load())
    except NotServingError as error:
        fail(str(error))
    if not is_ready(state.http_url):
        fail(f"{state.http_url}/ready is not 200: no decode worker can serve")
    out.print("[green]ready[/]")


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="One question; none: a conversation.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Another cluster's HTTP address.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Its model's name, with --url.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.7,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    session: Annotated[str | None, typer.Option(help="Session id; default: a new one.")] = None,
) -> None:
    """Talk to the model: a conversation, or one answer to MESSAGE or to standard input."""
    from headrace.chat import ChatError, ChatOptions, Conversation, new_session_id
    from headrace.chat_terminal import ask, converse

    if url is None:
        state = running_cluster()
        url, model = state.http_url, model or state.model
    elif model is None:
        fail("--url needs --model", EXIT_USAGE)
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
    if message == "":
        fail("the message is empty", EXIT_USAGE)
    options = ChatOptions(
        http_url=url,
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        system=system,
        session_id=session or new_session_id(),
    )
    conversation = Conversation(options)
    try:
        if message is None:
            converse(conversation, options)
        else:
            ask(conversation, message)
    except ChatError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        conversation.close()


app.command("compile")(compile_model)


@app.command()
def doctor(
    config: ConfigOption = None,
    model: ModelOption = None,
    http_port: HttpPortOption = None,
    grpc_port: GrpcPortOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Check this machine; each failed check names its fix. Exits with 1 where `up` would fail."""
    from headrace.doctor import run_checks

    wanted = configuration(
        config,
        {
            ("model", "source"): model,
            ("router", "http_port"): http_port,
            ("router", "grpc_port"): grpc_port,
            ("placement", "redis_url"): redis_url,
        },
    )
    marks = {"ok": "[green]ok[/]     ", "note": "[yellow]note[/]   ", "problem": "[bold red]problem[/]"}
    problems = 0
    for check in run_checks(wanted, _folder()):
        problems += check.verdict == "problem"
        out.print(f"{marks[check.verdict]}  {check.what:12s}  {escape(check.found)}", soft_wrap=True)
        if check.fix:
            out.print(f"{'':23s}-> {escape(check.fix)}", soft_wrap=True)
    if problems:
        fail(f"{problems} of the above would keep `headrace up` from working")


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


def main() -> None:
    app(prog_name="headrace")
