"""How many rows drafts get: those with which the whole batch is expected to emit the most tokens a
millisecond, by the step table."""

import heapq
from collections.abc import Sequence as SequenceOf

from cluster.placement.predict import StepTable, step_ms
from decode_workers.draft_tree import DraftTree
from decode_workers.drafting.growth import TreeGrowth

UNMEASURED = StepTable(rows=(1, 64), ms=(1.0, 5.0))
"""Where no step has been measured: a row costs a sixteenth of a step."""
TREE_MS, NODE_MS = 0.05, 0.008
"""What the host does for a step with drafts, and for a row of one: no step table has it in it."""
LEAST_GAIN = 1.02
"""Over a step without drafts: what is won by less is lost as often as not."""


class StepCosts:
    """Milliseconds of a step by the draft rows beside its others."""

    def __init__(self, table: StepTable | None) -> None:
        self._table = table or UNMEASURED
        self._by_rows: dict[int, list[float]] = {}

    def beside(self, num_rows: int, most_drafted: int) -> SequenceOf[float]:
        """[0 ... most_drafted at least] draft rows beside `num_rows`; never falling."""
        costs = self._by_rows.setdefault(num_rows, [step_ms(self._table, num_rows)])
        for drafted in range(len(costs), most_drafted + 1):
            costs.append(step_ms(self._table, num_rows + drafted) + TREE_MS + NODE_MS * drafted)
        return costs

    def bends(self, num_rows: int, most_drafted: int) -> list[int]:
        """Draft rows at which the costs' slope changes, and the most: a line is above all if it is here."""
        counts = [rows - num_rows for rows in self._table.rows]
        return [count for count in counts if 0 < count < most_drafted] + [most_drafted]


def spend(
    growths: SequenceOf[TreeGrowth], num_tokens: int, num_rows: int, max_drafted: int, costs: StepCosts
) -> list[DraftTree]:
    """A tree of each growth, of `max_drafted` nodes in all at most.

    The step emits `num_tokens` and has `num_rows` rows without them. Nodes are taken over all sequences in
    the order of their estimates, so the expected tokens of any number of rows are the most that these can
    bring, and of the numbers the one with the best rate is looked for.
    """
    ms = costs.beside(num_rows, max_drafted)
    bends = costs.bends(num_rows, max_drafted)
    order = [(-growth.best, at) for at, growth in enumerate(growths) if growth.best > 0]
    heapq.heapify(order)
    owners: list[int] = []
    tokens = float(num_tokens)
    best_rate, best_count = LEAST_GAIN * tokens / ms[0], 0
    while order and len(owners) < max_drafted:
        estimate, at = -order[0][0], order[0][1]
        if not _can_pay(tokens, estimate, len(owners), best_rate, ms, bends):
            break
        growths[at].take()
        owners.append(at)
        if growths[at].best > 0:
            heapq.heapreplace(order, (-growths[at].best, at))
        else:
            heapq.heappop(order)
        tokens += estimate
        if tokens > best_rate * ms[len(owners)]:
            best_rate, best_count = tokens / ms[len(owners)], len(owners)
    kept = owners[:best_count]
    return [growth.tree(kept.count(at)) for at, growth in enumerate(growths)]


def _can_pay(
    tokens: float,
    estimate: float,
    num_drafted: int,
    best_rate: float,
    ms: SequenceOf[float],
    bends: SequenceOf[int],
) -> bool:
    """Whether some more rows could beat the best rate if each were as good as the next one."""
    if tokens + estimate > best_rate * ms[num_drafted + 1]:
        return True
    return any(
        tokens + (count - num_drafted) * estimate > best_rate * ms[count]
        for count in bends
        if count > num_drafted
    )
