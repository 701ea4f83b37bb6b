"""One sequence on one decode worker: command, reservation, prefill hop, tokens."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from enum import Enum

from cluster.ids import RequestId, WorkerId
from cluster.messages import (
    DecodeEvent,
    FailureCode,
    FinishReason,
    GenerateRequest,
    HandoffFailed,
    Reserved,
    SequenceFailed,
    SequenceFinished,
    TargetingResult,
    TokensEmitted,
    Usage,
)
from cluster.metrics import RouterMetrics
from cluster.timeline import Stage, Timeline
from router.admission import remaining_s
from router.decode_connection import DecodeConnection
from router.decode_pool import Directory
from router.mailbox import Mailbox
from router.placing import Placed
from router.prefill_client import PrefillClient
from router.prefill_hop import PrefillEnded, PrefillHop
from router.sequence import Progress, SequenceAsk, SequenceEnded, SequenceEvent, TextEmitted

DEADLINE_GRACE_S = 0.010
"""The worker ends a sequence at its deadline itself, with all it knows; only then do we."""

_log = logging.getLogger(__name__)


class AttemptFailedError(Exception):
    """The decode worker will not finish this sequence. Handled by the dispatcher."""

    def __init__(self, failure: SequenceFailed) -> None:
        super().__init__(failure.message)
        self.failure = failure


class _Alarm(Enum):
    DEADLINE = "deadline"


_Event = DecodeEvent | PrefillEnded | _Alarm


class Attempt:
    """Use once: iterate `batches` to its end, or close it to cancel everything downstream."""

    def __init__(
        self,
        ask: SequenceAsk,
        placed: Placed,
        progress: Progress,
        timeline: Timeline,
        connection: DecodeConnection,
        prefill: PrefillClient,
        directory: Directory,
        metrics: RouterMetrics,
    ) -> None:
        self._ask = ask
        self._placement = placed.placement
        self._progress = progress
        self._timeline = timeline
        self._connection = connection
        self._directory = directory
        # Another id for each attempt: a worker may still be letting go of the one before.
        suffix = f"-{progress.num_placements}" if progress.num_placements > 1 else ""
        self._request_id = RequestId(f"{ask.request_id}-{ask.choice}{suffix}")
        self._mailbox: Mailbox[_Event] = Mailbox()
        self._hop = PrefillHop(
            ask, self._request_id, placed, connection, prefill, directory, metrics, self._mailbox.put
        )
        self._is_ended_by_worker = False
        self._counted: tuple[WorkerId, int] | None = None

    async def batches(self) -> AsyncGenerator[list[SequenceEvent], None]:
        """What arrived at each wake-up, SequenceEnded last. Raises AttemptFailedError."""
        alarm = asyncio.get_running_loop().call_later(
            max(0.0, remaining_s(self._ask.deadline_unix_ns)) + DEADLINE_GRACE_S,
            self._mailbox.put,
            _Alarm.DEADLINE,
        )
        self._connection.open(self._generate_request(), self._mailbox.put)
        self._timeline.stamp(Stage.DISPATCHED)
        self._count_load()
        try:
            is_ended = False
            while not is_ended:
                batch, failure = self._digest(await self._mailbox.take())
                if batch:
                    is_ended = isinstance(batch[-1], SequenceEnded)
                    yield batch
                if failure is not None:
                    raise AttemptFailedError(failure)
        finally:
            alarm.cancel()
            self._hop.cancel()
            self._uncount_load()
            self._connection.close(self._request_id, is_ended=self._is_ended_by_worker)

    def _generate_request(self) -> GenerateRequest:
        ask = self._ask
        return GenerateRequest(
            request_id=self._request_id,
            prompt_token_ids=ask.prompt_token_ids,
            sampling=ask.sampling,
            tenant=ask.tenant,
            session_id=ask.session_id,
            deadline_unix_ns=ask.deadline_unix_ns,
            handoff_id=self._hop.handoff_id,
            emitted_token_ids=tuple(self._progress.emitted_token_ids),
            targeting=ask.targeting,
            campaign=ask.campaign,
            speculate=ask.speculate,
            phrases=ask.phrases,
        )

    def _digest(self, events: list[_Event]) -> tuple[list[SequenceEvent], SequenceFailed | None]:
        """What the client gets of these events, up to the sequence's end or to a failure."""
        batch: list[SequenceEvent] = []
        for event in events:
            match event:
                case TokensEmitted():
                    if self._ask.targeting is not None:
                        return batch, self._broke("sent text where items were asked for")
                    if event.first_index != len(self._progress.emitted_token_ids):
                        return batch, self._out_of_order(event)
                    batch.append(self._emitted(event))
                case SequenceFinished():
                    self._is_ended_by_worker = True
                    if event.reason is FinishReason.CANCELLED:
                        return batch, self._failure(FailureCode.UNAVAILABLE, "cancelled the request")
                    if self._lacks_items(event):
                        return batch, self._broke("ended a targeting request without its items")
                    self._timeline.merge(event.stamps_ns)
                    usage = event.usage
                    batch.append(
                        self._ended(
                            event.reason,
                            event.text,
                            usage.cached_tokens,
                            usage.completion_tokens,
                            event.targeting,
                        )
                    )
                    break
                case Reserved():
                    self._hop.on_reserved(event)
                case HandoffFailed():
                    self._hop.on_handoff_failed(event)
                case PrefillEnded():
                    self._hop.on_prefill_ended(event)
                    if event.result is not None:
                        self._timeline.merge(event.result.stamps_ns)
                case SequenceFailed():
                    self._is_ended_by_worker = True
                    return batch, event
                case _Alarm.DEADLINE:
                    # The worker has not said so in time: what there is, is the answer.
                    batch.append(self._ended(FinishReason.DEADLINE, "", self._hop.first_token, 0))
                    break
        return batch, None

    def _emitted(self, event: TokensEmitted) -> TextEmitted:
        if self._counted is not None:
            self._timeline.stamp(Stage.FIRST_TOKEN_RELAYED)
            self._uncount_load()
        self._progress.emitted_token_ids.extend([token.token_id for token in event.tokens])
        return TextEmitted(self._ask.choice, event.first_index, event.tokens, event.text)

    def _out_of_order(self, event: TokensEmitted) -> SequenceFailed:
        """No gap and no duplicate ever reaches the client."""
        due = len(self._progress.emitted_token_ids)
        return self._broke(f"sent token {event.first_index} where {due} was due")

    def _lacks_items(self, event: SequenceFinished) -> bool:
        is_due = self._ask.targeting is not None and event.reason is not FinishReason.DEADLINE
        return is_due and event.targeting is None

    def _broke(self, what: str) -> SequenceFailed:
        """The worker does not keep to the contract: another may."""
        failure = self._failure(FailureCode.INTERNAL, what)
        _log.error(failure.message)
        return failure

    def _failure(self, code: FailureCode, what: str) -> SequenceFailed:
        message = f"{self._connection.address.worker_id} {what}"
        return SequenceFailed(request_id=self._request_id, code=code, message=message, is_retryable=True)

    def _ended(
        self,
        reason: FinishReason,
        text: str,
        cached: int,
        completion: int,
        targeting: TargetingResult | None = None,
    ) -> SequenceEnded:
        self._timeline.stamp(Stage.FINISHED)
        num_prompt = len(self._ask.prompt_token_ids)
        usage = Usage(
            prompt_tokens=num_prompt,
            completion_tokens=max(completion, len(self._progress.emitted_token_ids)),
            cached_tokens=min(num_prompt, max(cached, self._hop.cached_tokens)),
        )
        return SequenceEnded(
            choice=self._ask.choice,
            reason=reason,
            text=text,
            usage=usage,
            placement=self._placement,
            targeting=targeting,
        )

    def _count_load(self) -> None:
        """Tell placement of work sent, before the worker's next status does: until its first token."""
        placement = self._placement
        worker_id = (placement.prefill or placement.decode).worker_id
        self._counted = (worker_id, placement.computed_tokens)
        self._directory.local_adjust(worker_id, placement.computed_tokens)

    def _uncount_load(self) -> None:
        counted, self._counted = self._counted, None
        if counted is not None:
            worker_id, num_tokens = counted
            self._directory.local_adjust(worker_id, -num_tokens)
