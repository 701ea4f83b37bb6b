import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.block_hash import chain_salt
from cluster.ids import RequestId
from cluster.messages import SamplingParams
from decode_workers.completion import Completion
from decode_workers.draft_tree import NO_DRAFT, DraftTree
from decode_workers.kv_pool import Reservation
from decode_workers.rows import assemble
from decode_workers.scheduler import (
    PATIENCE_NS,
    STEPS_BESIDE_HANDOFFS,
    AdmissionQueue,
    RowGrant,
    Waiting,
    plan_run,
    plan_step,
)
from decode_workers.sequence import Sequence
from decode_workers.step_batch import NO_PARENT, StepBatch
from decode_workers.timers import Timers
from megakernel.head import MAX_TOP_K
from megakernel.multi_step import MAX_STOP_TOKENS
from tests.decode_workers.support import TOKENIZER, drawn, greedy, request_of


def sequence_of(
    arrival: int,
    num_tokens: int = 1,
    committed: int = 0,
    sampling: SamplingParams | None = None,
    **changes: object,
) -> Sequence:
    request = request_of(f"r{arrival}", range(num_tokens), sampling or greedy(50), **changes)
    completion = Completion(TOKENIZER, request.sampling, (), 50)
    sequence = Sequence(request, completion, chain_salt("x", ""), num_tokens + 49, arrival)
    sequence.committed = committed
    sequence.reservation = Reservation(
        table_index=arrival, block_ids=(), cached_tokens=0, capacity_tokens=num_tokens + 10
    )
    return sequence


pendings = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=10)


@given(pendings, st.integers(1, 12), st.booleans())
def test_every_plan_is_within_bounds_and_wastes_nothing(
    pending: list[tuple[int, int]], max_rows: int, can_draft: bool
) -> None:
    running = [sequence_of(i, num_tokens) for i, (num_tokens, _) in enumerate(pending)]
    for sequence, (_, last_grant) in zip(running, pending, strict=True):
        sequence.last_grant = last_grant
    grants = plan_step(running, max_rows, can_draft=can_draft)
    forced = sum(grant.num_forced for grant in grants)
    assert len(grants) == min(len(running), max_rows)
    assert forced <= max_rows
    assert forced == min(max_rows, sum(s.num_pending for s in running)) or len(running) > max_rows
    for grant in grants:
        assert 1 <= grant.num_forced <= grant.sequence.num_pending
        assert grant.max_draft_nodes <= min(10, max_rows - forced)
        assert grant.max_draft_nodes == 0 or (can_draft and grant.is_sampled)


def test_decoding_sequences_get_their_row_before_a_chain_takes_the_rest() -> None:
    chain, decoding = sequence_of(1, 100), sequence_of(2, 5, committed=4)
    grants = plan_step([chain, decoding], 8, can_draft=False)
    assert [(grant.num_forced, grant.is_sampled) for grant in grants] == [(7, False), (1, True)]


def test_more_sequences_than_rows_take_turns() -> None:
    running = [sequence_of(i) for i in range(5)]
    served: list[int] = []
    for _ in range(10):
        for grant in plan_step(running, 2, can_draft=False):
            grant.sequence.last_grant = len(served) + 1
            served.append(grant.sequence.arrival)
    assert served == [0, 1, 2, 3, 4] * 4


NOW_NS = 5_000_000_000
MS = 1_000_000


def left(num_left: int, **changes: object) -> Sequence:
    """A sequence that has one pending token and so many still to emit."""
    sequence = sequence_of(num_left, 4, committed=3, **changes)
    sequence.completion.num_tokens = 50 - num_left
    return sequence


@pytest.mark.parametrize(
    ("running", "waiting", "limits", "expected"),
    [
        ([left(20)], {}, {}, 8),
        ([left(20), left(30)], {}, {}, 8),
        ([left(20)], {}, {"most_steps": 1}, 1),
        ([], {}, {}, 1),
        # As long as somebody has tokens to come, but not longer; to the first end where one waits for it.
        ([left(3), left(5)], {}, {}, 5),
        ([left(3), left(5)], {"num_queued": 1}, {}, 3),
        ([left(1), left(1)], {}, {}, 1),
        # Who wants to join.
        ([left(20)], {"num_calls": 1}, {}, 1),
        ([left(20)], {"num_awaiting": 1}, {}, STEPS_BESIDE_HANDOFFS),
        ([left(1)], {"num_awaiting": 1}, {}, 1),
        ([left(20)], {"num_queued": 9, "num_awaiting": 2}, {}, STEPS_BESIDE_HANDOFFS),
        # What only the host can do.
        ([left(20), left(20, sampling=drawn())], {}, {}, 1),
        ([left(20, sampling=greedy(num_logprobs=0))], {}, {}, 8),
        ([left(20, sampling=greedy(num_logprobs=1))], {}, {}, 1),
        ([left(20, sampling=greedy(num_logprobs=MAX_TOP_K + 1))], {}, {}, 1),
        ([left(20, sampling=greedy(stop=("x",)))], {}, {}, 8),
        ([left(20, sampling=greedy(stop_token_ids=tuple(range(MAX_STOP_TOKENS))))], {}, {}, 8),
        ([left(20, sampling=greedy(stop_token_ids=tuple(range(MAX_STOP_TOKENS + 1))))], {}, {}, 1),
        ([left(20), sequence_of(1, 5, committed=3)], {}, {}, 1),
        # A row each, in every step.
        ([left(20)] * 4, {}, {"max_rows": 4}, 8),
        ([left(20)] * 5, {}, {"max_rows": 4}, 1),
        # Deadlines, with steps of 2 ms.
        ([left(20, deadline_unix_ns=NOW_NS + 100 * MS)], {}, {}, 8),
        ([left(20, deadline_unix_ns=NOW_NS + 7 * MS), left(20)], {}, {}, 3),
        ([left(20, deadline_unix_ns=NOW_NS + 6 * MS)], {}, {}, 3),
        ([left(20, deadline_unix_ns=NOW_NS + 1 * MS)], {}, {}, 1),
        ([left(20, deadline_unix_ns=NOW_NS - 9 * MS)], {}, {}, 1),
        ([left(20, deadline_unix_ns=NOW_NS + 6 * MS)], {}, {"step_ms": 0.0}, 8),
    ],
)
def test_how_many_steps_run_without_the_host(
    running: list[Sequence], waiting: dict[str, int], limits: dict[str, float], expected: int
) -> None:
    nobody = {"num_calls": 0, "num_queued": 0, "num_awaiting": 0}
    usual = {"most_steps": 8, "max_rows": 64, "step_ms": 2.0}
    assert plan_run(running, Waiting(**nobody | waiting), **usual | limits, now_ns=NOW_NS) == expected  # type: ignore[arg-type]


def test_rows_of_a_chain_with_a_tree_beside_a_plain_one() -> None:

    plain, chain = sequence_of(0, 6, committed=5), sequence_of(1, 4, committed=1)
    tree = DraftTree(token_ids=(50, 51, 52), parents=(NO_PARENT, 0, NO_PARENT))
    tables = np.array([[7, 8, -1], [3, 4, 5]], dtype=np.int32)
    rows = assemble(
        [
            RowGrant(sequence=plain, num_forced=1, max_draft_nodes=0),
            RowGrant(sequence=chain, num_forced=3, max_draft_nodes=3),
        ],
        [DraftTree(), tree],
        tables,
        block_size_tokens=4,
    )
    batch = rows.batch
    assert batch.token_ids.tolist() == [5, 1, 2, 3, 50, 51, 52]
    assert batch.positions.tolist() == [5, 1, 2, 3, 4, 5, 4]
    assert batch.slots.tolist() == [8 * 4 + 1, 3 * 4 + 1, 3 * 4 + 2, 3 * 4 + 3, 4 * 4, 4 * 4 + 1, 4 * 4 + 2]
    assert batch.parents.tolist() == [-1, -1, 1, 2, 3, 4, 3]
    assert batch.sequence_starts.tolist() == [0, 1, 7]
    assert batch.context_lengths.tolist() == [5, 1]
    assert batch.block_tables.tolist() == [[7, 8], [3, 4]]
    assert batch.needs_logits.tolist() == [False] * 7
    assert batch.needs_best is not None
    assert batch.needs_best.tolist() == [True, False, False, True, True, True, True]
    assert rows.answer_starts == [0, 1]


def test_an_unfinished_chain_needs_no_logits() -> None:

    grants = [
        RowGrant(sequence=sequence_of(0, 9), num_forced=4, max_draft_nodes=0),
        RowGrant(sequence=sequence_of(1, 1), num_forced=1, max_draft_nodes=0),
    ]
    rows = assemble(grants, [DraftTree(), DraftTree()], np.zeros((2, 3), dtype=np.int32), 4)
    assert rows.batch.needs_best is not None
    assert rows.batch.needs_best.tolist() == [False] * 4 + [True]
    assert rows.answer_starts == [0, 0]


def test_each_sequence_asks_the_head_for_what_it_reads() -> None:
    samplings = [drawn(), greedy(), greedy(num_logprobs=0), drawn(num_logprobs=3), greedy(num_logprobs=7)]
    samplings.append(greedy(num_logprobs=MAX_TOP_K + 1))
    grants = [
        RowGrant(sequence=sequence_of(i, 3, committed=2, sampling=it), num_forced=1, max_draft_nodes=0)
        for i, it in enumerate(samplings)
    ]
    rows = assemble(grants, [NO_DRAFT] * 6, np.zeros((6, 3), dtype=np.int32), 4)
    batch = rows.batch
    assert batch.needs_best is not None
    assert batch.needs_logits.tolist() == [True, False, False, True, False, True]
    assert batch.needs_best.tolist() == [False, True, True, False, True, False]
    assert rows.answer_starts == [0, 0, 1, 1, 2, 2]
    assert (batch.top_k, batch.needs_log_sums) == (7, True)
    drawn_alone = assemble(grants[:1], [NO_DRAFT], np.zeros((6, 3), dtype=np.int32), 4).batch
    assert (drawn_alone.needs_best, drawn_alone.top_k, drawn_alone.needs_log_sums) == (None, 0, False)


def test_single_tokens_make_the_same_batch_as_trees_without_nodes() -> None:
    sequences = [sequence_of(i, 4 + i, committed=3 + i) for i in range(3)]
    grants = [RowGrant(sequence=it, num_forced=1, max_draft_nodes=0) for it in sequences]
    tables = np.arange(9, dtype=np.int32).reshape(3, 3)
    single = assemble(grants, [NO_DRAFT] * 3, tables, 4).batch
    as_trees = assemble(grants, [DraftTree()] * 3, tables, 4).batch
    for name in StepBatch.__struct_fields__:
        one, other = getattr(single, name), getattr(as_trees, name)
        assert np.array_equal(one, other), name
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None), name


def test_the_queue_is_earliest_deadline_first_and_patient() -> None:
    queue, now = AdmissionQueue(), 1_000
    waiting = [
        sequence_of(1),
        sequence_of(2),
        sequence_of(3, deadline_unix_ns=now + 5),
        sequence_of(4, deadline_unix_ns=now + PATIENCE_NS + 1),
    ]
    for sequence in waiting:
        queue.push(sequence, now)
    queue.remove(waiting[0])
    order = []
    while (first := queue.first()) is not None:
        order.append(first.request.request_id)
        queue.remove(first)
    assert order == [RequestId("r3"), RequestId("r2"), RequestId("r4")]


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 50))), max_size=300))
def test_timers_tell_each_key_once_at_its_last_time(actions: list[tuple[int, int | None]]) -> None:
    timers: Timers[int] = Timers()
    expected: dict[int, int] = {}
    for key, at_ns in actions:
        if at_ns is None:
            timers.cancel(key)
            expected.pop(key, None)
        else:
            timers.set(key, at_ns)
            expected[key] = at_ns
    assert timers.next_ns() == min(expected.values(), default=None)
    told: dict[int, int] = {}
    for now in range(51):
        for key in timers.pop_due(now):
            assert key not in told
            told[key] = now
    assert told == expected
    assert timers.next_ns() is None
