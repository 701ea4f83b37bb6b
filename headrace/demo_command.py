"""`headrace demo`: on the cluster that is up, or on one of its own."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.options import ConfigOption, configuration
from headrace.run_folder import RunFolder, RunFolderError, default_run_folder
from headrace.terminal import EXIT_USAGE, err, fail

if TYPE_CHECKING:
    from headrace.demo_screen import Screen

MAX_ITEMS = 5_000_000
_CONTEXT = "Last bought: a tent. The item that fits best:"


def demo(
    items: Annotated[int, typer.Option(min=10, max=MAX_ITEMS, help="Of the catalogue.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Other items, other questions.")] = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the catalogue there, and a cluster that was started for it.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="No colours, nothing that moves.")] = False,
    url: Annotated[str | None, typer.Option("--url", help="Another cluster's HTTP address.")] = None,
    config: ConfigOption = None,
) -> None:
    """Upload a catalogue, choose items from it, write creatives. Starts a cluster where none is up."""
    from headrace.catalogue_client import CatalogueError
    from headrace.chat import ChatError
    from headrace.demo import DemoError, DemoOptions, run
    from headrace.demo_screen import Screen

    screen = Screen(plain=plain)
    try:
        with _cluster(url, config, screen, keep=keep) as (http_url, is_own):
            options = DemoOptions(http_url=http_url, num_items=items, seed=seed, keep=keep)
            model, name = run(options, screen)
        screen.next_steps(next_steps(http_url, model, kept=name if keep else None, is_own=is_own))
    except (DemoError, CatalogueError, ChatError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        err.print("\nstopped")
        raise typer.Exit(130) from None


def next_steps(http_url: str, model: str, *, kept: str | None, is_own: bool) -> list[str]:
    """Commands that work after the demo as it ended."""
    catalogue = kept or "ads"
    steps = []
    if kept is None:
        if is_own:  # its cluster is gone, and had ports of its own
            steps.append("headrace up --detach")
            http_url = "http://127.0.0.1:8000"
        steps.append('headrace catalogue put ads.jsonl    # lines of {"text": ...}')
    body = json.dumps({"model": model, "catalogue": catalogue, "context": _CONTEXT, "k": 5})
    steps.append(f"headrace target --catalogue {catalogue} -k 5 {shlex.quote(_CONTEXT)}")
    steps.append(f"curl {http_url}/v1/targeting -H 'content-type: application/json' -d {shlex.quote(body)}")
    if kept is not None:
        steps.append(f"headrace catalogue delete {kept}")
    if kept is not None and is_own:
        steps.append("headrace down")
    return [*steps, "docs/targeting.md: filters, deadlines, what a score is"]


@contextmanager
def _cluster(
    url: str | None, config: Path | None, screen: "Screen", *, keep: bool
) -> Iterator[tuple[str, bool]]:
    """Its address, and whether it was started here; such a one ends with the block, but for `keep`."""
    from headrace.cli import running_cluster

    folder = RunFolder(default_run_folder())
    if url is None and not folder.is_locked():
        with _own_cluster(folder, config, screen, keep=keep) as http_url:
            yield http_url, True
        return
    if config is not None:
        fail("--config is for a cluster that the demo starts; here it uses one that is up", EXIT_USAGE)
    yield url or running_cluster().http_url, False


@contextmanager
def _own_cluster(folder: RunFolder, config: Path | None, screen: "Screen", *, keep: bool) -> Iterator[str]:
    """On any free ports where nobody will look for it afterwards."""
    from headrace.launcher import StartFailedError, spawn
    from headrace.ports import PortTakenError
    from headrace.up import end, follow_shown, terminate_as_interrupt

    is_brief = config is None and not keep
    ports = {("router", "http_port"): 0, ("router", "grpc_port"): 0} if is_brief else {}
    wanted = configuration(config, ports)
    terminate_as_interrupt()
    process = None
    is_kept = False
    try:
        screen.starting()
        process = spawn(folder, wanted, is_attached=not keep)
        yield follow_shown(process, folder, screen.console).http_url
        is_kept = keep
    except (RunFolderError, PortTakenError) as error:
        fail(str(error), EXIT_USAGE)
    except StartFailedError as error:
        fail(f"{error}\n`headrace doctor` checks this machine", error.exit_code)
    finally:
        if process is not None and not is_kept:
            screen.stopping()
            end(folder, process)
