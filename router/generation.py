"""A checked request as one stream of its sequences' events, measured on the way."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence

import msgspec

from cluster.ids import RequestId
from cluster.messages import Usage
from cluster.metrics import RouterMetrics
from cluster.timeline import Stage, Timeline
from router.admission import Ask, InflightLimit, choice_seed
from router.dispatch import Dispatcher
from router.mailbox import Mailbox
from router.placing import Placer
from router.sequence import SequenceAsk, SequenceEnded, SequenceEvent, TextEmitted

EventBatches = AsyncGenerator[list[SequenceEvent], None]


class Generation:
    """Turns asks into events: all sequences of a request at once, bounded over all requests."""

    def __init__(
        self, placer: Placer, dispatcher: Dispatcher, inflight: InflightLimit, metrics: RouterMetrics
    ) -> None:
        self._placer = placer
        self._dispatcher = dispatcher
        self._inflight = inflight
        self._metrics = metrics

    async def run(self, request_id: RequestId, ask: Ask, timeline: Timeline) -> EventBatches:
        """Batches of events; each choice's SequenceEnded is its last. Raises RequestError.

        Close it (`contextlib.aclosing`) to cancel what is still running.
        """
        with self._inflight.admit(ask.num_sequences):
            sequences = await self._sequences(request_id, ask)
            if len(sequences) == 1:
                batches = self._dispatcher.run(sequences[0], timeline)
            else:
                batches = merged(
                    [
                        self._dispatcher.run(sequence, timeline if sequence.choice == 0 else Timeline())
                        for sequence in sequences
                    ]
                )
            meter = _Meter(self._metrics, timeline, ask.num_sequences)
            async with contextlib.aclosing(batches):
                async for batch in batches:
                    meter.count(batch)
                    yield batch

    async def _sequences(self, request_id: RequestId, ask: Ask) -> list[SequenceAsk]:
        sequences: list[SequenceAsk] = []
        for prompt, max_tokens in zip(ask.prompts, ask.max_tokens, strict=True):
            facts = await self._placer.look_up(prompt, ask.tenant, ask.session_id)
            for choice in range(ask.num_choices):
                sampling = msgspec.structs.replace(
                    ask.sampling, max_tokens=max_tokens, seed=choice_seed(ask.sampling.seed, choice)
                )
                sequences.append(
                    SequenceAsk(
                        request_id=request_id,
                        choice=len(sequences),
                        prompt_token_ids=prompt,
                        facts=facts,
                        sampling=sampling,
                        tenant=ask.tenant,
                        session_id=ask.session_id,
                        deadline_unix_ns=ask.deadline_unix_ns,
                        prefill_hop=ask.prefill_hop,
                        targeting=ask.targeting,
                        campaign=ask.campaign,
                        speculate=ask.speculate,
                        phrases=ask.phrases,
                    )
                )
        return sequences


async def merged(sources: Sequence[EventBatches]) -> EventBatches:
    """Batches of all sources as they come. The first error of any ends all; closing it closes all."""
    mailbox: Mailbox[list[SequenceEvent] | Exception | None] = Mailbox()

    async def pump(source: EventBatches) -> None:
        try:
            async with contextlib.aclosing(source):
                async for batch in source:
                    mailbox.put(batch)
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            mailbox.put(error)
        else:
            mailbox.put(None)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    num_open = len(tasks)
    try:
        while num_open:
            events: list[SequenceEvent] = []
            for item in await mailbox.take():
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    events += item
            if events:
                yield events
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def total_usage(ended: Sequence[SequenceEnded], num_choices: int) -> Usage:
    """Of a whole request: each prompt counted once, however many choices it has."""
    first_choices = [end for end in ended if end.choice % num_choices == 0]
    return Usage(
        prompt_tokens=sum(end.usage.prompt_tokens for end in first_choices),
        completion_tokens=sum(end.usage.completion_tokens for end in ended),
        cached_tokens=sum(end.usage.cached_tokens for end in first_choices),
    )


class _Meter:
    """One request's share of the latency and token metrics."""

    def __init__(self, metrics: RouterMetrics, timeline: Timeline, num_sequences: int) -> None:
        now_ns = time.time_ns()
        received_ns = timeline.stamps_ns.get(Stage.RECEIVED.value, now_ns)
        self._metrics = metrics
        self._started_s = time.perf_counter() - (now_ns - received_ns) / 1e9
        self._num_left = num_sequences
        self._last_token_s: dict[int, float] = {}

    def count(self, batch: Sequence[SequenceEvent]) -> None:
        now_s = time.perf_counter()
        for event in batch:
            if isinstance(event, TextEmitted):
                last_s = self._last_token_s.get(event.choice)
                if last_s is not None:
                    self._metrics.itl.observe(now_s - last_s)
                else:
                    self._metrics.ttft.observe(now_s - self._started_s)
                self._last_token_s[event.choice] = now_s
            else:
                self._count_end(event, now_s)

    def _count_end(self, ended: SequenceEnded, now_s: float) -> None:
        self._metrics.prompt_tokens.inc(ended.usage.prompt_tokens)
        self._metrics.cached_tokens.inc(ended.usage.cached_tokens)
        self._metrics.generation_tokens.inc(ended.usage.completion_tokens)
        self._num_left -= 1
        if self._num_left == 0:
            self._metrics.e2e.observe(now_s - self._started_s)
