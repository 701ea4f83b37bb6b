"""What the demo shows, in colours or plain: headings, items with bars, text as it streams, a summary."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape

from headrace.catalogue_client import Upload
from headrace.chat import Reply
from headrace.progress_bar import StatusBar

BAR_CELLS = 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_INDENT = " " * 8
_MAX_WIDTH = 100


class FoundItem(msgspec.Struct, frozen=True):
    text: str
    logprob: float


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A question's answer and how it was found."""

    brief: str
    items: tuple[FoundItem, ...]
    decoding: str
    steps: int
    rows: int
    ms: float
    """In the router, from the request to the answer."""


class Written(msgspec.Struct, frozen=True):
    product: str
    reply: Reply


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    upload: Upload
    found: tuple[Found, ...]
    written: tuple[Written, ...]

    def lines(self) -> list[tuple[str, str]]:
        """Rows of the summary: a name and its figures."""
        rows = [("catalogue", f"{self.upload.items:,} items in {_seconds(self.upload):.1f} s")]
        if self.found:
            ms = [one.ms for one in self.found]
            ways = [one.decoding for one in self.found]
            counts = ", ".join(f"{ways.count(way)} {way}" for way in dict.fromkeys(ways))
            rows.append(
                ("targeting", f"p50 {statistics.median(ms):.1f} ms, slowest {max(ms):.1f} ms; {counts}")
            )
        replies = [one.reply for one in self.written]
        duration_s = sum(reply.duration_s for reply in replies)
        if duration_s > 0:
            num_tokens = sum(reply.completion_tokens for reply in replies)
            ttft_ms = 1e3 * statistics.median(reply.ttft_s for reply in replies)
            rate = num_tokens / duration_s
            rows.append(
                ("creatives", f"{num_tokens} tokens, {rate:.1f} tokens/s; first token p50 {ttft_ms:.0f} ms")
            )
        accepted = sum(reply.accepted_tokens for reply in replies)
        if drafted := accepted + sum(reply.rejected_tokens for reply in replies):
            rows.append(("drafts", f"{accepted} of {drafted} drafted tokens accepted"))
        return rows


def bar(share: float, *, plain: bool) -> str:
    """Of BAR_CELLS characters; `share` is 0 to 1, and what is not 0 shows."""
    if plain:
        return ("#" * math.ceil(share * BAR_CELLS)).ljust(BAR_CELLS)
    eighths = math.ceil(share * BAR_CELLS * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(BAR_CELLS)


class WordWrap:
    """Streamed text in lines of at most `width` cells (None: one line), but for longer words.

    `push` and `flush` return what can be printed so far; any white space parts words.
    """

    def __init__(self, width: int | None) -> None:
        self._width = width
        self._column = 0
        self._word = ""

    def push(self, text: str) -> str:
        pieces: list[str] = []
        for char in text:
            if char.isspace():
                pieces.append(self.flush())
            else:
                self._word += char
        return "".join(pieces)

    def flush(self) -> str:
        word, self._word = self._word, ""
        if not word:
            return ""
        cells = cell_len(word)
        if self._column and (self._width is None or self._column + 1 + cells <= self._width):
            self._column += 1 + cells
            return f" {word}"
        before = f"\n{_INDENT}" if self._column else _INDENT
        self._column = cells
        return before + word


class Screen:
    """Plain: no colours, nothing that moves, bars in ASCII. So too where standard output is no terminal."""

    def __init__(self, *, plain: bool) -> None:
        self.console = Console(
            highlight=False,
            color_system=None if plain else "auto",
            force_terminal=False if plain else None,
        )
        can_draw = self.console.encoding.lower().startswith("utf")
        self._plain = plain or not self.console.is_terminal or not can_draw

    def starting(self) -> None:
        self._print("No cluster is up; starting one, which takes a minute.")

    def stopping(self) -> None:
        self._print("\nStopping the cluster.")

    def begin(self, model: str, http_url: str) -> None:
        self._print(f"[bold]Headrace demo[/]: {escape(model)} at {escape(http_url)}")

    @contextmanager
    def uploading(self, num_items: int) -> Iterator[Callable[[str, float | None], None]]:
        """Gives what shows how far it is."""
        self._heading(f"1  A catalogue of {num_items:,} items: brand x product x modifiers")
        with StatusBar(self.console, "making items") as status:
            yield status.show

    def uploaded(self, upload: Upload) -> None:
        self._print(
            f"   [green]{upload.items:,}[/] items, [green]{upload.nodes:,}[/] nodes of its trie, "
            f"[green]{upload.bytes / 1e6:.1f}[/] MB, [green]{_seconds(upload):.1f}[/] s"
        )

    def begin_questions(self, num_items: int, num_all: int) -> None:
        self._heading(
            f"2  Targeting: the {num_items} items of {num_all:,} that are likeliest after a context"
        )

    def question(self, number: int, count: int, brief: str) -> None:
        self._print(f"\n[bold]{number:2d}/{count}[/]  {escape(brief)}")

    def found(self, found: Found) -> None:
        """Bars: an item's probability as a share of the best one's."""
        best = max((item.logprob for item in found.items), default=0.0)
        for item in found.items:
            drawn = bar(math.exp(item.logprob - best), plain=self._plain)
            self._print(f"{_INDENT}[cyan]{drawn}[/] {item.logprob:7.2f}  {escape(item.text)}")
        if not found.items:
            self._print(f"{_INDENT}no items")
        how = f"{found.decoding}, {found.steps} steps, {found.rows} rows, {found.ms:.1f} ms"
        self._print(f"{_INDENT}[dim]{escape(how)}[/]")

    def begin_creatives(self, max_tokens: int) -> None:
        self._heading(f"3  Creatives for the best items: greedy, at most {max_tokens} tokens")

    def creative(self, number: int, count: int, product: str) -> None:
        self._print(f"\n[bold]{number:2d}/{count}[/]  {escape(product)}")

    @contextmanager
    def streaming(self) -> Iterator[Callable[[str], None]]:
        """Gives what prints a piece of the text."""
        width = None if self._plain else min(self.console.width, _MAX_WIDTH) - len(_INDENT) - 1
        wrap = WordWrap(width)
        style = None if self._plain else "italic"

        def show(text: str) -> None:
            if ready := wrap.push(text):
                self.console.out(ready, end="", style=style)

        try:
            yield show
        finally:
            self.console.out(wrap.flush(), style=style)

    def written(self, written: Written) -> None:
        reply = written.reply
        rate = f", {1e3 / reply.tokens_per_s:.1f} ms a token" if reply.tokens_per_s else ""
        drafted = reply.accepted_tokens + reply.rejected_tokens
        drafts = f", {reply.accepted_tokens} of {drafted} drafted accepted" if drafted else ""
        self._print(
            f"{_INDENT}[dim]{reply.completion_tokens} tokens{rate}, "
            f"first after {reply.ttft_s * 1e3:.1f} ms{drafts}[/]"
        )

    def summary(self, totals: Totals) -> None:
        self._heading("4  Summary")
        for name, figures in totals.lines():
            self._print(f"   [bold]{name:11s}[/] {figures}")

    def next_steps(self, commands: Sequence[str]) -> None:
        self._print("\n[bold]Try next[/]")
        for command in commands:
            self._print(f"   {escape(command)}")

    def note(self, message: str) -> None:
        self._print(f"[yellow]note:[/] {escape(message)}")

    def _heading(self, text: str) -> None:
        self._print(f"\n[bold green]{text}[/]")

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)


def _seconds(upload: Upload) -> float:
    return sum(upload.timings_ms.values()) / 1e3
