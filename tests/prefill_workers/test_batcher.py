import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ids import HandoffId, RequestId
from prefill_workers.batcher import PrefillQueue, QueueFullError
from prefill_workers.engine import PrefillJob


def job(num_tokens: int = 1) -> PrefillJob:
    return PrefillJob(request_id=RequestId("r"), token_ids=(1,) * num_tokens, first_token=0, tenant="")


def drained(queue: PrefillQueue) -> list[str]:
    order = []
    while (head := queue.head()) is not None:
        order.append(head.handoff_id)
        queue.remove(head.handoff_id)
    return order


def test_earliest_deadline_first_then_age_and_no_deadline_last() -> None:
    queue = PrefillQueue(10)
    deadlines = {"never": None, "late": 300, "soon": 100, "soon too": 100, "never too": None}
    for name, deadline in deadlines.items():
        queue.offer(HandoffId(name), job(), deadline)
    assert drained(queue) == ["soon", "soon too", "late", "never", "never too"]


def test_a_full_queue_refuses_and_a_removed_job_makes_room() -> None:
    queue = PrefillQueue(2)
    queue.offer(HandoffId("a"), job(), None)
    queue.offer(HandoffId("b"), job(), None)
    with pytest.raises(QueueFullError, match="2 prompts"):
        queue.offer(HandoffId("c"), job(), 1)
    assert queue.remove(HandoffId("a"))
    assert not queue.remove(HandoffId("a"))
    queue.offer(HandoffId("c"), job(), None)
    assert HandoffId("c") in queue
    assert HandoffId("a") not in queue


def test_tokens_are_counted() -> None:
    queue = PrefillQueue(5)
    queue.offer(HandoffId("a"), job(3), None)
    queue.offer(HandoffId("b"), job(4), None)
    assert (len(queue), queue.num_tokens) == (2, 7)
    queue.remove(HandoffId("a"))
    assert (len(queue), queue.num_tokens) == (1, 4)


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**62)), max_size=20), st.data())
def test_any_cancels_leave_the_rest_in_order(deadlines: list[int | None], data: st.DataObject) -> None:
    queue = PrefillQueue(20)
    for i, deadline in enumerate(deadlines):
        queue.offer(HandoffId(str(i)), job(), deadline)
    gone = data.draw(st.sets(st.integers(0, max(0, len(deadlines) - 1))))
    for i in gone:
        queue.remove(HandoffId(str(i)))
    left = [i for i in range(len(deadlines)) if i not in gone]
    ordered = sorted(left, key=lambda i: (deadlines[i] is None, deadlines[i] or 0, i))
    assert drained(queue) == [str(i) for i in ordered]
