import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import StepCost, WorkerStatus
from cluster.placement.predict import (
    PlacementCosts,
    StepTable,
    chain_ms,
    hop_ttft_ms,
    kv_wait_ms,
    local_ttft_ms,
    step_ms,
    step_table,
    transfer_ms,
)

TABLE = StepTable(rows=(1, 4, 8), ms=(2.0, 2.0, 4.0))


def published(*entries: tuple[int, float]) -> tuple[StepCost, ...]:
    return tuple(StepCost(rows=rows, ms=ms) for rows, ms in entries)


# Subnormal numbers are no measurements, and do not scale exactly.
MILLISECONDS = st.floats(0, 1e4, allow_subnormal=False)


@st.composite
def tables(draw: st.DrawFn) -> StepTable:
    entries = draw(st.dictionaries(st.integers(1, 512), MILLISECONDS, min_size=1, max_size=8))
    table = step_table(published(*entries.items()))
    assert table is not None
    return table


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ((), None),
        (((1, 2.0), (4, 3.0)), StepTable(rows=(1, 4), ms=(2.0, 3.0))),
        (((4, 3.0), (1, 2.0)), StepTable(rows=(1, 4), ms=(2.0, 3.0))),
        # A larger bucket measured cheaper: noise.
        (((1, 2.4), (2, 2.3), (4, 2.2), (8, 3.2)), StepTable(rows=(1, 2, 4, 8), ms=(2.4, 2.4, 2.4, 3.2))),
        (((1, 2.0), (1, 3.0)), StepTable(rows=(1,), ms=(3.0,))),
        # What no measurement can be.
        (((0, 1.0), (-4, 1.0), (2, -1.0), (3, math.nan), (4, math.inf), (5, 1e300)), None),
        (((2, math.nan), (8, 1.0)), StepTable(rows=(8,), ms=(1.0,))),
    ],
)
def test_step_table(entries: tuple[tuple[int, float], ...], expected: StepTable | None) -> None:
    assert step_table(published(*entries)) == expected


def test_only_so_many_entries_of_a_table_are_read() -> None:
    table = step_table(published(*((rows, 1.0) for rows in range(1, 10_000))))
    assert table is not None
    assert table.max_rows == 256


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 2.0), (1, 2.0), (3, 2.0), (4, 2.0), (6, 3.0), (8, 4.0), (100, 4.0), (-3, 2.0)]
)
def test_step_ms(rows: int, expected: float) -> None:
    assert step_ms(TABLE, rows) == expected


@pytest.mark.parametrize(
    ("rows", "running", "expected"),
    [
        (0, 0, 0.0),
        (-5, 0, 0.0),
        (1, 0, 2.0),
        (8, 0, 4.0),
        (9, 0, 6.0),
        (16, 0, 8.0),
        (20, 0, 10.0),
        # Four running sequences leave four rows of a step, and are part of each step's cost.
        (4, 4, 4.0),
        (6, 4, 4.0 + 3.0),
        # More sequences than rows: one row a step is still ours.
        (3, 100, 12.0),
    ],
)
def test_chain_ms(rows: int, running: int, expected: float) -> None:
    assert chain_ms(TABLE, rows, running) == pytest.approx(expected)


def test_a_table_of_nothing_costs_nothing() -> None:
    assert chain_ms(StepTable(rows=(1, 8), ms=(0.0, 0.0)), 1000) == 0.0


@given(table=tables(), rows=st.integers(0, 5000), running=st.integers(0, 600))
def test_one_more_row_or_sequence_is_never_cheaper(table: StepTable, rows: int, running: int) -> None:
    assert step_ms(table, rows) <= step_ms(table, rows + 1)
    assert chain_ms(table, rows, running) <= chain_ms(table, rows + 1, running)


@given(table=tables(), rows=st.integers(0, 5000), running=st.integers(0, 600))
def test_doubled_costs_double_a_prediction_exactly(table: StepTable, rows: int, running: int) -> None:
    doubled = StepTable(rows=table.rows, ms=tuple(2 * ms for ms in table.ms))
    assert chain_ms(doubled, rows, running) == 2 * chain_ms(table, rows, running)


def test_local_ttft_is_the_queue_and_the_suffix_as_one_chain() -> None:
    status = WorkerStatus(queued_tokens=10, free_kv_tokens=100)
    assert local_ttft_ms(TABLE, status, uncached_tokens=6, kv_wait=0.0) == pytest.approx(8.0)
    assert local_ttft_ms(TABLE, status, uncached_tokens=6, kv_wait=1.5) == pytest.approx(9.5)


def test_hop_ttft_waits_for_the_later_of_queue_and_arrival_then_runs_one_row() -> None:
    status = WorkerStatus(queued_tokens=16, running_requests=0)
    assert hop_ttft_ms(TABLE, status, arrival_ms=1.0, kv_wait=0.0) == pytest.approx(8.0 + 2.0)
    assert hop_ttft_ms(TABLE, status, arrival_ms=30.0, kv_wait=0.0) == pytest.approx(30.0 + 2.0)
    busy = WorkerStatus(running_requests=5, queued_requests=2)
    assert hop_ttft_ms(TABLE, busy, arrival_ms=30.0, kv_wait=0.0) == pytest.approx(30.0 + 4.0)


@pytest.mark.parametrize(
    ("needed", "free", "running", "expected"),
    [(10, 10, 0, 0.0), (10, 100, 3, 0.0), (18, 10, 0, 16.0), (18, 10, 4, 4.0), (18, 10, 400, 0.08)],
)
def test_kv_wait_ms(needed: int, free: int, running: int, expected: float) -> None:
    status = WorkerStatus(free_kv_tokens=free, running_requests=running)
    assert kv_wait_ms(TABLE, status, needed_tokens=needed) == pytest.approx(expected)


def test_negative_queues_from_a_broken_worker_are_read_as_none() -> None:
    status = WorkerStatus(queued_tokens=-1000, queued_requests=-5, running_requests=-5)
    assert local_ttft_ms(TABLE, status, uncached_tokens=8, kv_wait=0.0) == pytest.approx(4.0)


def test_transfer_ms() -> None:
    costs = PlacementCosts(kv_bytes_per_token=1000, link_bytes_per_s=1e6, shared_memory_bytes_per_s=1e7)
    assert transfer_ms(costs, 5, is_same_host=False) == pytest.approx(5.0)
    assert transfer_ms(costs, 5, is_same_host=True) == pytest.approx(0.5)
    assert transfer_ms(costs, -5, is_same_host=True) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_bytes_per_token": 0},
        {"kv_bytes_per_token": 1, "link_bytes_per_s": 0.0},
        {"kv_bytes_per_token": 1, "shared_memory_bytes_per_s": -1.0},
        {"kv_bytes_per_token": 1, "handoff_overhead_ms": -1.0},
    ],
)
def test_costs_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be (at least|above)"):
        PlacementCosts(**wrong)
