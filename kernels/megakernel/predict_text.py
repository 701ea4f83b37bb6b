"""A prediction as text for a person."""

from collections.abc import Iterable

from megakernel.predict import BatchSchedule, Prediction, ScheduleFigures
from megakernel.report import kib, less, table


def shown(prediction: Prediction) -> str:
    context = prediction.schedule_context
    sections = [
        f"Predicted decode steps of {prediction.model} on {prediction.machine}\n{_step_table(prediction)}",
        f"Schedules at {context} tokens of context, and listed with the fewest K-tiles that fit; "
        f"peak is what a worker holds at once, of {kib(prediction.scratch_bytes)}\n"
        f"{_schedule_table(prediction)}",
        "Planned output tiles with K whole and as planned; two stages of weights, input and output\n"
        f"{_tile_table(prediction)}",
        "\n".join(prediction.assumptions),
    ]
    return "\n\n".join(sections) + "\n"


def _step_table(prediction: Prediction) -> str:
    return table(
        ("batch", "context", "predicted ms", "bound ms", "ratio", "bubbles", "weights MB", "KV MB"),
        [
            (
                str(step.batch),
                str(step.context_tokens),
                f"{step.predicted_ms:.3f}",
                f"{step.bound_ms:.3f}",
                f"{step.ratio:.2f}",
                _percent(step.bubble_share),
                f"{step.weight_bytes / 1e6:.1f}",
                f"{step.kv_bytes / 1e6:.1f}",
            )
            for step in prediction.steps
        ],
    )


def _schedule_table(prediction: Prediction) -> str:
    header = ("batch", "schedule", "K-tiles", "stages", "peak", "bubbles", "predicted ms")
    rows = []
    for schedule in prediction.schedules:
        rows.append((str(schedule.batch), planned_by(schedule), *_cells(schedule.planned)))
        rows.append((str(schedule.batch), "fewest K-tiles", *_cells(schedule.least_split)))
    return table(header, rows)


def planned_by(schedule: BatchSchedule) -> str:
    if schedule.num_searched is None:
        return "list-scheduled"
    return f"searched, {schedule.num_searched} plans"


def _cells(figures: ScheduleFigures) -> tuple[str, ...]:
    return (
        _range(figures.k_tiles.values()),
        _range(figures.stages.values()),
        kib(figures.peak_bytes),
        _percent(figures.bubble_share),
        f"{figures.predicted_ms:.3f}",
    )


def _tile_table(prediction: Prediction) -> str:
    header = ("batch", "K whole", "stages that fit", "as planned", "stages that fit", "less")
    return table(header, [_tile_row(schedule) for schedule in prediction.schedules])


def _tile_row(schedule: BatchSchedule) -> tuple[str, ...]:
    tiles = schedule.tiles
    return (
        str(schedule.batch),
        kib(tiles.whole_bytes),
        str(tiles.whole_stages),
        kib(tiles.split_bytes),
        str(tiles.split_stages),
        less(tiles.whole_bytes, tiles.split_bytes),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _range(values: Iterable[int]) -> str:
    numbers = sorted(set(values))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
