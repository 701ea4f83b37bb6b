"""`headrace trace`: one decode step, instruction by instruction, as a trace, a picture and a table."""

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from headrace.terminal import err, fail, out

if TYPE_CHECKING:
    from headrace.trace_step import Traced
    from megakernel.timeline import Timeline

_NUM_BUBBLES = 5


def trace(
    model: Annotated[
        str | None, typer.Option("--model", help="Packaged model, .gguf file or Hugging Face folder.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the step, a sequence each.")] = 1,
    context: Annotated[int, typer.Option(min=0, help="Committed tokens of each sequence.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed; the median one is shown.")] = 32,
    folder: Annotated[
        Path, typer.Option("--out", help="Where trace.json and timeline.svg go.", metavar="FOLDER")
    ] = Path("trace"),
    is_opened: Annotated[bool, typer.Option("--open", help="Open the picture in a browser.")] = False,
) -> None:
    """Run decode steps on this CPU and show where the median one's time goes: a trace, a picture, a table."""
    # Here, as they take a second: the other commands do without.
    from headrace.trace_step import TraceError, opened, trace_steps
    from megakernel.build import BuildError
    from megakernel.chrome_trace import chrome_trace
    from megakernel.model.load import PACKAGED_MODEL
    from megakernel.step import StepError
    from megakernel.timeline_svg import timeline_svg

    model = model or PACKAGED_MODEL
    try:
        with err.status("compiling the model for this machine; the first time takes a minute") as status:

            def show(what: str, _done: float) -> None:
                status.update(f"preparing the model: {what}")

            with opened(model, rows, context, show) as ready:
                status.update(f"running {steps} steps")
                traced = trace_steps(ready, rows, context, steps)
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{model}, {rows} row{'s' if rows > 1 else ''} after {context} tokens"
        (folder / "trace.json").write_bytes(chrome_trace(traced.timeline, title))
        picture = folder / "timeline.svg"
        picture.write_text(timeline_svg(traced.timeline, title), encoding="utf-8")
    except (TraceError, BuildError, StepError, ValueError, OSError) as error:
        fail(str(error))
    _show(traced)
    out.print(f"\n{picture}: the picture, for any browser", soft_wrap=True)
    out.print(f"{folder / 'trace.json'}: open https://ui.perfetto.dev and drop it there", soft_wrap=True)
    if is_opened:
        webbrowser.open(picture.absolute().as_uri())


def _show(traced: "Traced") -> None:
    from megakernel.bubbles import bubble_totals, bubbles, shown_totals

    timeline = traced.timeline
    out.print(
        f"median of {len(traced.step_us)} steps: {timeline.makespan_us:.0f} us "
        f"({min(traced.step_us):.0f} to {max(traced.step_us):.0f}), {len(timeline.lanes)} workers\n"
    )
    out.print(_table(timeline))
    total = sum(bubble.us for bubble in bubbles(timeline))
    share = 100 * total / timeline.total_us
    out.print(f"\nbubbles: {total:.0f} us of worker time, {share:.1f}% of the step")
    for group in bubble_totals(timeline)[:_NUM_BUBBLES]:
        out.print(f"  {shown_totals(group, timeline)}", soft_wrap=True)


def _table(timeline: "Timeline") -> Table:
    """Times are of all workers together; bandwidth is of one worker at it, and of the whole step."""
    from megakernel.timeline import role_totals

    table = Table(box=None, pad_edge=False)
    table.add_column("role")
    for name in ("tiles", "us", "share", "waiting us", "MB", "GB/s a worker"):
        table.add_column(name, justify="right")
    roles = role_totals(timeline)
    for role in roles:
        table.add_row(
            role.role,
            str(role.num_instructions),
            f"{role.busy_us:.0f}",
            f"{100 * role.busy_us / timeline.total_us:.1f}%",
            f"{role.waiting_us:.0f}",
            f"{role.num_bytes / 1e6:.1f}",
            f"{role.worker_gb_s:.1f}",
        )
    busy = sum(role.busy_us for role in roles)
    num_bytes = sum(role.num_bytes for role in roles)
    table.add_row(
        "all",
        str(sum(role.num_instructions for role in roles)),
        f"{busy:.0f}",
        f"{100 * busy / timeline.total_us:.1f}%",
        f"{sum(role.waiting_us for role in roles):.0f}",
        f"{num_bytes / 1e6:.1f}",
        f"{num_bytes / timeline.makespan_us / 1e3:.1f} in all",
        style="bold",
    )
    return table
