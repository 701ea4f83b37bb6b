"""`headrace catalogue put|list|delete` and `headrace target`."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from headrace.terminal import EXIT_USAGE, err, fail, out

SHOWN_FAULTS = 20
_CONDITION = re.compile(r"(?P<name>[^=<>]+?)\s*(?P<op>>=|<=|=)\s*(?P<value>.*)", re.DOTALL)

UrlOption = Annotated[str | None, typer.Option("--url", help="Another cluster's HTTP address.")]

catalogue_app = typer.Typer(
    help="The sets of items that targeting chooses from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _url(url: str | None) -> str:
    from headrace.cli import running_cluster

    return url or running_cluster().http_url


@catalogue_app.command("put")
def put(
    file: Annotated[Path, typer.Argument(help="JSON lines or CSV.", exists=True, dir_okay=False)],
    name: Annotated[str | None, typer.Option(help="Default: taken from the file's.")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave wrong lines out instead of refusing all.")] = False,
    url: UrlOption = None,
) -> None:
    """Upload FILE and compile it; requests see the new version once it is whole."""
    from headrace.catalogue_client import CatalogueClient, CatalogueError
    from headrace.progress_bar import StatusBar

    target = _url(url)
    try:
        with CatalogueClient(target) as client, StatusBar(err, "sending") as bar:
            done = client.put(file, name or _name_of(file), skip_bad=skip_bad, on_progress=bar.show)
    except CatalogueError as error:
        _print_faults(error.faults, error.num_faults)
        fail(str(error))
    except OSError as error:
        fail(f"cannot read {file}: {error.strerror}", EXIT_USAGE)
    _print_faults([(fault["line"], fault["message"]) for fault in done.faults], done.num_faults)
    total_s = sum(done.timings_ms.values()) / 1e3
    left_out = f", {done.num_faults} lines left out" if done.num_faults else ""
    out.print(
        f"{escape(done.name)} version {done.version}: {done.items:,} items{left_out}, {done.nodes:,} nodes, "
        f"{done.bytes / 1e6:.1f} MB, {total_s:.1f} s"
    )


@catalogue_app.command("list")
def list_all(url: UrlOption = None) -> None:
    """Show the catalogues there are."""
    from headrace.catalogue_client import CatalogueClient, CatalogueError

    try:
        with CatalogueClient(_url(url)) as client:
            found = client.list()
    except CatalogueError as error:
        fail(str(error))
    if not found:
        out.print("no catalogues; `headrace catalogue put FILE` uploads one")
        return
    table = Table("name", "version", "items", "nodes", "MB", "attributes", "state", box=None)
    for one in found:
        table.add_row(
            escape(str(one["name"])),
            str(one["version"] or "-"),
            f"{one['items']:,}",
            f"{one['nodes']:,}",
            f"{one['bytes'] / 1e6:.1f}",
            escape(", ".join(one["attributes"])),
            str(one["state"]),
        )
    out.print(table)


@catalogue_app.command("delete")
def delete(name: Annotated[str, typer.Argument()], url: UrlOption = None) -> None:
    """Remove a catalogue, all its versions."""
    from headrace.catalogue_client import CatalogueClient, CatalogueError

    try:
        with CatalogueClient(_url(url)) as client:
            client.delete(name)
    except CatalogueError as error:
        fail(str(error))
    out.print(f"deleted {escape(name)}")


def target(
    context: Annotated[str | None, typer.Argument(help="The text; none: standard input.")] = None,
    catalogue: Annotated[str, typer.Option(help="The catalogue's name.")] = "",
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Items wanted.")] = 20,
    beams: Annotated[int | None, typer.Option(min=1, help="Default: the greater of k and 20.")] = None,
    scoring: Annotated[str | None, typer.Option(help="vocabulary (the default) or catalogue.")] = None,
    where: Annotated[
        list[str] | None, typer.Option("--filter", help="attribute=value, attribute>=5, attribute<=9.")
    ] = None,
    deadline_ms: Annotated[int | None, typer.Option(min=1)] = None,
    url: UrlOption = None,
    model: Annotated[str | None, typer.Option("--model", help="Its model's name, with --url.")] = None,
    session: Annotated[str | None, typer.Option(help="Session id.")] = None,
) -> None:
    """Show the items of a catalogue that are likeliest after CONTEXT."""
    from headrace.catalogue_client import CatalogueClient, CatalogueError
    from headrace.cli import running_cluster

    if not catalogue:
        fail("--catalogue is needed; `headrace catalogue list` shows those there are", EXIT_USAGE)
    if url is None:
        state = running_cluster()
        url, model = state.http_url, model or state.model
    elif model is None:
        fail("--url needs --model", EXIT_USAGE)
    if context is None:
        context = sys.stdin.read().strip()
    if not context:
        fail("the context is empty", EXIT_USAGE)
    optional = {
        "beams": beams,
        "scoring": scoring,
        "deadline_ms": deadline_ms,
        "filter": _filter(where or []),
    }
    body: dict[str, Any] = {"model": model, "catalogue": catalogue, "context": context, "k": k}
    body |= {name: value for name, value in optional.items() if value}
    try:
        with CatalogueClient(url) as client:
            _print_items(client.target(body, session))
    except CatalogueError as error:
        fail(str(error))


def _name_of(file: Path) -> str:
    """The file's own, of the characters that a catalogue's name may have."""
    return re.sub(r"[^a-z0-9._-]", "-", file.stem.lower()).lstrip("._-")[:64] or "catalogue"


def _filter(conditions: list[str]) -> dict[str, Any]:
    """Several of one attribute: any of the values, or both ends of a range."""
    wanted: dict[str, Any] = {}
    for text in conditions:
        match = _CONDITION.fullmatch(text)
        if match is None:
            fail(
                f"--filter {text!r}: write attribute=value, attribute>=number or attribute<=number",
                EXIT_USAGE,
            )
        name, value = match["name"].strip(), match["value"].strip()
        if match["op"] == "=":
            wanted.setdefault(name, [])
            if not isinstance(wanted[name], list):
                fail(f"--filter {text!r}: {name} has a range already", EXIT_USAGE)
            wanted[name].append(value)
            continue
        try:
            bound = float(value)
        except ValueError:
            fail(f"--filter {text!r}: {value!r} is not a number", EXIT_USAGE)
        wanted.setdefault(name, {})
        if not isinstance(wanted[name], dict):
            fail(f"--filter {text!r}: {name} has a value already", EXIT_USAGE)
        wanted[name]["min" if match["op"] == ">=" else "max"] = bound
    return wanted


def _print_items(answer: dict[str, Any]) -> None:
    table = Table("#", "id", "text", "logprob", "bid", box=None)
    for item in answer["items"]:
        bid = "" if item["bid"] is None else f"{item['bid']:g}"
        table.add_row(
            str(item["rank"]), escape(item["id"]), escape(item["text"]), f"{item['logprob']:.3f}", bid
        )
    out.print(table)
    if warning := answer.get("warning"):
        err.print(f"[yellow]note:[/] {escape(warning)}")
    version = answer["catalogue"]["version"]
    out.print(
        f"version {version}, {answer['decoding']}, {answer['steps']} steps, {answer['rows']} rows, "
        f"{answer['timings_ms'].get('total', 0.0):.1f} ms, {answer['finish_reason']}"
    )


def _print_faults(faults: "list[tuple[int, str]] | tuple[tuple[int, str], ...]", num_faults: int) -> None:
    for line, message in faults[:SHOWN_FAULTS]:
        err.print(f"  line {line}: {escape(message)}", soft_wrap=True)
    if num_faults > SHOWN_FAULTS:
        err.print(f"  and {num_faults - min(SHOWN_FAULTS, len(faults))} more")
