"""What all commands share: where they print, how they fail, the words for the phases."""

from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from headrace.run_folder import Phase

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

EXIT_USAGE = 2
PHASES: dict[Phase, str] = {
    "redis": "starting Redis",
    "ray": "starting Ray",
    "compile": "opening the model, compiling it for this CPU",
    "deploy": "starting the workers, loading the model",
    "answer": "waiting for the first token",
    "ready": "ready",
    "stopping": "stopping",
}


def fail(message: str, code: int = 1) -> NoReturn:
    """One clear line, no traceback."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)
