"""A spinner with words, and a bar where it is known how much is done."""

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text


class _BarWhereKnown(ProgressColumn):
    def __init__(self) -> None:
        super().__init__()
        self._bar = BarColumn(bar_width=30)

    def render(self, task: Task) -> RenderableType:
        return Text() if task.total is None else self._bar.render(task)


class _ShareWhereKnown(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text() if task.total is None else Text(f"{task.percentage:3.0f}%")


class StatusBar:
    """Shown while it is entered; nothing stays of it. Silent where the console is no terminal."""

    def __init__(self, console: Console, words: str) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), _BarWhereKnown(), _ShareWhereKnown())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(words, total=None)

    def show(self, words: str, fraction: float | None = None) -> None:
        """`fraction` None: no bar."""
        total = None if fraction is None else 1.0
        self._progress.update(self._task, description=words, completed=fraction or 0.0)
        self._progress.tasks[0].total = total

    def __enter__(self) -> "StatusBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
