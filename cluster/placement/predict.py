"""What a step, a chain of rows and a hand-off are predicted to cost: pure arithmetic over step tables.

Every prediction is monotone (more rows, longer queue, more bytes: never cheaper), down to the last
floating-point bit, so that a longer cached prefix can never make a worker look worse.
"""

import bisect
from functools import lru_cache

import msgspec

from cluster.messages import StepCost, WorkerStatus

MAX_TABLE_ENTRIES = 256
MAX_STEP_MS = 1e6


class StepTable(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds a step by rows in it: rows strictly increasing, milliseconds never decreasing."""

    rows: tuple[int, ...]
    ms: tuple[float, ...]

    @property
    def max_rows(self) -> int:
        return self.rows[-1]


@lru_cache(maxsize=4096)
def step_table(costs: tuple[StepCost, ...]) -> StepTable | None:
    """A published table made usable, or None where it says nothing.

    Entries come from another process: those that are not positive rows with milliseconds in
    [0, MAX_STEP_MS] are dropped, and a bucket measured cheaper than a smaller one is read as noise.
    """
    by_rows: dict[int, float] = {}
    for cost in costs[:MAX_TABLE_ENTRIES]:
        if cost.rows > 0 and 0 <= cost.ms <= MAX_STEP_MS:
            by_rows[cost.rows] = max(cost.ms, by_rows.get(cost.rows, 0.0))
    if not by_rows:
        return None
    rows = tuple(sorted(by_rows))
    slowest = 0.0
    ms: list[float] = []
    for count in rows:
        slowest = max(slowest, by_rows[count])
        ms.append(slowest)
    return StepTable(rows=rows, ms=tuple(ms))


def step_ms(table: StepTable, rows: int) -> float:
    """One step of `rows` rows: linear between measured counts, flat below the first and above the last.

    More rows than `table.max_rows` do not fit one step: `chain_ms` is the cost of those.
    """
    above = bisect.bisect_left(table.rows, rows)
    if above == 0:
        return table.ms[0]
    if above == len(table.rows):
        return table.ms[-1]
    below = above - 1
    share = (rows - table.rows[below]) / (table.rows[above] - table.rows[below])
    between = table.ms[below] + (table.ms[above] - table.ms[below]) * share
    return min(between, table.ms[above])


def chain_ms(table: StepTable, rows: int, running: int = 0) -> float:
    """`rows` rows run as full steps and a rest, while each of `running` sequences takes a row of every step.

    At least one row a step is ours, however many sequences run. No rows cost nothing.
    """
    if rows <= 0:
        return 0.0
    ours = max(1, table.max_rows - running)
    full_steps, rest = divmod(rows, ours)
    full_step_ms = table.ms[-1]
    if full_step_ms == 0:
        return 0.0
    rest_ms = step_ms(table, running + rest) if rest else 0.0
    # One multiplication by a share in [0, 1], so that k full steps and a rest never round above k + 1.
    return full_step_ms * (full_steps + rest_ms / full_step_ms)


class PlacementCosts(msgspec.Struct, frozen=True, kw_only=True):
    """What placement must know beside step tables."""

    kv_bytes_per_token: int
    """Of one token over all layers (`KvLayout.bytes_per_token`)."""
    link_bytes_per_s: float = 1.25e9
    """Between hosts; the default is 10 Gbit/s."""
    shared_memory_bytes_per_s: float = 4e9
    """Between workers of one host."""
    handoff_overhead_ms: float = 1.5
    """Of a hop whatever its size: opening it, the last chunk's checksum, the acknowledgement."""

    def __post_init__(self) -> None:
        if self.kv_bytes_per_token < 1:
            raise ValueError(f"kv_bytes_per_token is {self.kv_bytes_per_token}, must be at least 1")
        if self.link_bytes_per_s <= 0 or self.shared_memory_bytes_per_s <= 0:
            raise ValueError("link_bytes_per_s and shared_memory_bytes_per_s must be above 0")
        if self.handoff_overhead_ms < 0:
            raise ValueError(f"handoff_overhead_ms is {self.handoff_overhead_ms}, must be at least 0")


def transfer_ms(costs: PlacementCosts, num_tokens: int, *, is_same_host: bool) -> float:
    """Moving the KV of `num_tokens` tokens, without the hand-off's fixed overhead."""
    bytes_per_s = costs.shared_memory_bytes_per_s if is_same_host else costs.link_bytes_per_s
    return max(0, num_tokens) * costs.kv_bytes_per_token / bytes_per_s * 1_000


def local_ttft_ms(table: StepTable, status: WorkerStatus, *, uncached_tokens: int, kv_wait: float) -> float:
    """First token when the decode worker runs the uncached suffix itself, behind what it has queued."""
    chain = chain_ms(table, max(0, status.queued_tokens) + uncached_tokens, busy_rows(status))
    return kv_wait + chain


def hop_ttft_ms(table: StepTable, status: WorkerStatus, *, arrival_ms: float, kv_wait: float) -> float:
    """First token when KV arrives `arrival_ms` from now: the decode worker's queue drains meanwhile."""
    running = busy_rows(status)
    queue = kv_wait + chain_ms(table, status.queued_tokens, running)
    return max(queue, arrival_ms) + step_ms(table, min(running + 1, table.max_rows))


def kv_wait_ms(table: StepTable, status: WorkerStatus, *, needed_tokens: int) -> float:
    """Until enough KV is free, read as: what the running sequences still write, they soon give back."""
    deficit = max(0, needed_tokens - status.free_kv_tokens)
    running = max(1, status.running_requests)
    return deficit / running * step_ms(table, min(running, table.max_rows))


def busy_rows(status: WorkerStatus) -> int:
    """Rows of each coming step that sequences ahead of us take."""
    return max(0, status.running_requests) + max(0, status.queued_requests)
