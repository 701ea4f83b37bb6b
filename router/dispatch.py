"""One sequence from placement to its end, over as many workers as it takes.

A decode worker that dies is replaced by another, which is handed the tokens the client already has as
a forced chain: the same seed at the same positions goes on with the same tokens.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from cluster.ids import WorkerId
from cluster.messages import FinishReason, SequenceFailed, Usage
from cluster.metrics import RouterMetrics
from cluster.placement.choose import NoWorkerError
from cluster.timeline import Stage, Timeline
from router.admission import remaining_s
from router.attempt import Attempt, AttemptFailedError
from router.decode_pool import DecodePool, Directory
from router.placing import Placed, Placer, no_worker
from router.prefill_client import PrefillClient
from router.retry import as_request_error, refuses_for_good, should_place_again
from router.sequence import Progress, SequenceAsk, SequenceEnded, SequenceEvent

REPLACE_POLL_S = 0.02


class Dispatcher:
    def __init__(
        self,
        placer: Placer,
        pool: DecodePool,
        prefill: PrefillClient,
        directory: Directory,
        metrics: RouterMetrics,
        recovery_timeout_s: float,
    ) -> None:
        """`recovery_timeout_s`: how long a sequence that lost its worker waits for one to go on with."""
        self._recovery_timeout_s = recovery_timeout_s
        self._placer = placer
        self._pool = pool
        self._prefill = prefill
        self._directory = directory
        self._metrics = metrics

    async def run(self, ask: SequenceAsk, timeline: Timeline) -> AsyncGenerator[list[SequenceEvent], None]:
        """Everything that arrived at each wake-up; SequenceEnded is the last event. Raises RequestError.

        Closing the iterator cancels the sequence everywhere.
        """
        progress = Progress()
        refused: set[WorkerId] = set()
        placed = self._place_first(ask)
        timeline.stamp(Stage.PLACED)
        while True:
            progress.num_placements += 1
            try:
                async with contextlib.aclosing(self._attempt(ask, placed, progress, timeline)) as batches:
                    async for batch in batches:
                        if isinstance(batch[-1], SequenceEnded):
                            self._placer.remember_session(ask, placed, progress.emitted_token_ids)
                        yield batch
            except AttemptFailedError as error:
                failure = error.failure
            else:
                return
            if refuses_for_good(failure):
                refused.add(placed.placement.decode.worker_id)
            placed_again = await self._place_again(ask, placed, progress, refused, failure)
            if placed_again is None:
                yield [_cut_off(ask, placed, progress)]
                return
            placed = placed_again

    def _attempt(
        self, ask: SequenceAsk, placed: Placed, progress: Progress, timeline: Timeline
    ) -> AsyncGenerator[list[SequenceEvent], None]:
        connection = self._pool.connection(placed.placement.decode)
        return Attempt(
            ask, placed, progress, timeline, connection, self._prefill, self._directory, self._metrics
        ).batches()

    def _place_first(self, ask: SequenceAsk) -> Placed:
        try:
            return self._placer.place(ask, frozenset())
        except NoWorkerError as error:
            raise no_worker(error, self._pool.refusals()) from None

    async def _place_again(
        self,
        ask: SequenceAsk,
        failed: Placed,
        progress: Progress,
        refused: set[WorkerId],
        failure: SequenceFailed,
    ) -> Placed | None:
        """Another worker; without one, wait for the one that failed, unless it refused, or its successor.

        None: the deadline passed first. Raises RequestError where nothing is left to wait for.
        """
        if remaining_s(ask.deadline_unix_ns) <= 0:
            return None
        if not should_place_again(failure, progress.num_placements, remaining_s(ask.deadline_unix_ns)):
            raise as_request_error(failure)
        self._metrics.retries.labels("decode").inc()
        lost = failed.placement.decode.worker_id
        give_up_at_s = time.monotonic() + self._recovery_timeout_s
        excluded = frozenset(refused | {lost})
        while True:
            try:
                return self._placer.place(ask, excluded)
            except NoWorkerError:
                if remaining_s(ask.deadline_unix_ns) <= 0:
                    return None
                if lost in refused or time.monotonic() > give_up_at_s:
                    raise as_request_error(failure) from None
            await asyncio.sleep(REPLACE_POLL_S)
            excluded = frozenset(refused)


def _cut_off(ask: SequenceAsk, placed: Placed, progress: Progress) -> SequenceEnded:
    """The deadline passed while the sequence had no worker: what the client has, is the answer."""
    usage = Usage(
        prompt_tokens=len(ask.prompt_token_ids),
        completion_tokens=len(progress.emitted_token_ids),
        cached_tokens=0,
    )
    return SequenceEnded(
        choice=ask.choice, reason=FinishReason.DEADLINE, text="", usage=usage, placement=placed.placement
    )
