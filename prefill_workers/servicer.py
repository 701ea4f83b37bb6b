"""`Prefill` and `WorkerAdmin` by gRPC: one `Run` is one job, from request to acknowledged hand-off."""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict

import grpc

from cluster.ids import HandoffId, RequestId
from cluster.kv_layout import KvLayout
from cluster.messages import HandoffCancelState, PrefillRequest, PrefillResult, Record
from cluster.metrics import PrefillMetrics, exposition
from cluster.timeline import Stage, Timeline
from cluster.transfer import HANDOFF_CODE_KEY, HandoffError, HandoffHeader, HandoffReceipt, KvTransport
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from cluster.wire.conversions import prefill_request_from_proto, prefill_result_to_proto
from prefill_workers.batcher import QueueFullError
from prefill_workers.engine import PrefillJob
from prefill_workers.engine_loop import EngineLoop, EngineStoppedError, JobFailedError, Ticket
from prefill_workers.kv_export import ExportError, KvExport
from prefill_workers.validation import PrefillLimits, PrefillRefusedError, check_request

MAX_FINISHED_REMEMBERED = 4096

RunContext = grpc.aio.ServicerContext[pb.PrefillRequest, pb.PrefillResult]
CancelContext = grpc.aio.ServicerContext[pb.CancelHandoffRequest, pb.CancelHandoffResponse]
MetricsContext = grpc.aio.ServicerContext[pb.MetricsRequest, pb.MetricsResponse]

JOB_ERRORS = (JobFailedError, ExportError)

logger = logging.getLogger(__name__)


class Answer(Record, frozen=True, kw_only=True):
    status: grpc.StatusCode
    outcome: str
    """The metric's label; of a failed hand-off, its code."""


def answer_of(error: Exception) -> Answer:
    """What the caller of `Run` gets for it."""
    match error:
        case HandoffError():
            return Answer(status=grpc.StatusCode.ABORTED, outcome=error.code)
        case PrefillRefusedError():
            return Answer(status=error.status, outcome=error.status.name.lower())
        case QueueFullError():
            return Answer(status=grpc.StatusCode.RESOURCE_EXHAUSTED, outcome="queue_full")
        case EngineStoppedError():
            return Answer(status=grpc.StatusCode.UNAVAILABLE, outcome="engine_stopped")
        case _:
            return Answer(status=grpc.StatusCode.INTERNAL, outcome="engine_failed")


class _Run:
    """One `Run` in progress: what `Cancel` needs of it, and the metrics."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self.is_acknowledged = False
        """The hand-off is over, however its `Run` ends: a router that has its tokens already leaves."""
        self._limit = asyncio.timeout(None)

    def until(self, deadline_unix_ns: int | None) -> asyncio.Timeout:
        seconds = None if deadline_unix_ns is None else (deadline_unix_ns - time.time_ns()) / 1e9
        self._limit = asyncio.timeout(seconds)
        return self._limit

    def cancel(self) -> None:
        self.is_cancelled = True
        with contextlib.suppress(RuntimeError):  # it ended in this very turn of the loop
            self._limit.reschedule(asyncio.get_running_loop().time())

    def refusal(self) -> PrefillRefusedError:
        """Why the limit expired."""
        if self.is_cancelled:
            return PrefillRefusedError(grpc.StatusCode.CANCELLED, "cancelled by Prefill.Cancel")
        return PrefillRefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_unix_ns has passed")


class PrefillServicer(pb_grpc.PrefillServicer):
    """Jobs in, hand-offs out. A job's blocks are held until its hand-off ended, however it ended."""

    def __init__(
        self,
        loop: EngineLoop,
        layout: KvLayout,
        limits: PrefillLimits,
        transport: KvTransport,
        chunk_bytes: int,
        metrics: PrefillMetrics,
    ) -> None:
        self._loop = loop
        self._layout = layout
        self._limits = limits
        self._transport = transport
        self._chunk_bytes = chunk_bytes
        self._metrics = metrics
        self._runs: dict[HandoffId, _Run] = {}
        self._all_ended = asyncio.Event()
        self._is_stopping = False
        self._finished: OrderedDict[HandoffId, None] = OrderedDict()

    async def Run(self, message: pb.PrefillRequest, context: RunContext) -> pb.PrefillResult:  # noqa: N802
        run = _Run()
        try:
            result = await self._run(prefill_request_from_proto(message), run)
        except (HandoffError, PrefillRefusedError, QueueFullError, EngineStoppedError, *JOB_ERRORS) as error:
            logger.info("prefill of %s: %s", message.request_id, error)
            answer = answer_of(error)
            self._count_failure(run, answer.outcome)
            trailing = ((HANDOFF_CODE_KEY, answer.outcome),) if isinstance(error, HandoffError) else ()
            await context.abort(answer.status, str(error), trailing)
        except asyncio.CancelledError:
            self._count_failure(run, "client_gone")
            raise
        return prefill_result_to_proto(result)

    def _count_failure(self, run: _Run, outcome: str) -> None:
        if not run.is_acknowledged:
            self._metrics.handoffs.labels(outcome=outcome).inc()

    def _count_acknowledged(self, run: _Run, receipt: HandoffReceipt) -> None:
        run.is_acknowledged = True
        self._metrics.handoffs.labels(outcome="acknowledged").inc()
        self._metrics.handoff_bytes.labels(transport=receipt.transport).inc(receipt.bytes_sent)

    async def Cancel(  # noqa: N802
        self, message: pb.CancelHandoffRequest, _context: CancelContext
    ) -> pb.CancelHandoffResponse:
        return pb.CancelHandoffResponse(state=self._cancel(HandoffId(message.handoff_id)).value)

    def _cancel(self, handoff_id: HandoffId) -> HandoffCancelState:
        run = self._runs.get(handoff_id)
        if run is None or run.is_acknowledged:
            is_complete = run is not None or handoff_id in self._finished
            return HandoffCancelState.ALREADY_COMPLETE if is_complete else HandoffCancelState.NOT_FOUND
        was_queued = self._loop.is_queued(handoff_id)
        run.cancel()
        if was_queued:
            return HandoffCancelState.CANCELLED_BEFORE_ADVERTISE
        if not self._loop.is_healthy():
            return HandoffCancelState.BACKEND_UNHEALTHY
        return HandoffCancelState.CANCEL_REQUESTED_IN_FLIGHT

    async def stop(self, timeout_s: float) -> None:
        """Refuse new jobs; returns when all running ones ended, or after `timeout_s`."""
        self._is_stopping = True
        self._note_end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_ended.wait()

    def _note_end(self) -> None:
        if self._is_stopping and not self._runs:
            self._all_ended.set()

    async def _run(self, request: PrefillRequest, run: _Run) -> PrefillResult:
        if self._is_stopping:
            raise EngineStoppedError("the prefill worker is stopping")
        check_request(request, self._limits, time.time_ns())
        handoff_id = request.handoff_id
        if handoff_id in self._runs:
            raise PrefillRefusedError(
                grpc.StatusCode.ALREADY_EXISTS, f"handoff_id {handoff_id} is being computed already"
            )
        ticket = self._ticket(request)
        self._runs[handoff_id] = run
        try:
            async with run.until(request.deadline_unix_ns):
                result = await self._compute_and_send(request, ticket, run)
        except TimeoutError:
            raise run.refusal() from None
        finally:
            self._loop.withdraw(handoff_id)
            del self._runs[handoff_id]
            self._note_end()
        self._remember(handoff_id)
        return result

    async def _compute_and_send(self, request: PrefillRequest, ticket: Ticket, run: _Run) -> PrefillResult:
        timeline = Timeline()
        self._loop.submit(ticket, request.deadline_unix_ns)
        await asyncio.wrap_future(ticket.admitted)
        timeline.stamp(Stage.PREFILL_STARTED)
        computed = asyncio.ensure_future(self._computed(ticket, timeline))
        try:
            header = _header_of(request, ticket.export.total_bytes)
            receipt = await self._transport.send(request.target, header, ticket.export.chunks())
            self._count_acknowledged(run, receipt)
            cached_tokens = await _cached_tokens(computed)
        finally:
            computed.cancel()
            await asyncio.gather(computed, return_exceptions=True)
        return PrefillResult(
            cached_tokens=cached_tokens,
            bytes_sent=receipt.bytes_sent,
            bytes_sent_before_forward_end=ticket.export.bytes_sent_before_forward_end,
            transport=receipt.transport,
            stamps_ns=timeline.stamps_ns,
        )

    async def _computed(self, ticket: Ticket, timeline: Timeline) -> int:
        done = await asyncio.wrap_future(ticket.computed)
        timeline.stamp(Stage.PREFILL_FINISHED)
        return done.cached_tokens

    def _ticket(self, request: PrefillRequest) -> Ticket:
        # A request's retry may overlap its first try here, so the engine knows jobs by hand-off.
        job = PrefillJob(
            request_id=RequestId(f"{request.request_id}/{request.handoff_id}"),
            token_ids=request.prompt_token_ids,
            first_token=request.first_token,
            tenant=request.tenant,
        )
        export = KvExport(self._layout, request.first_token, len(request.prompt_token_ids), self._chunk_bytes)
        return Ticket(request.handoff_id, job, export)

    def _remember(self, handoff_id: HandoffId) -> None:
        self._finished[handoff_id] = None
        while len(self._finished) > MAX_FINISHED_REMEMBERED:
            self._finished.popitem(last=False)


class AdminServicer(pb_grpc.WorkerAdminServicer):
    def __init__(
        self, loop: EngineLoop, limits: PrefillLimits, total_staging_bytes: int, metrics: PrefillMetrics
    ) -> None:
        self._loop = loop
        self._metrics = metrics
        metrics.kv_total_tokens.set(limits.total_kv_tokens)
        metrics.staging_total_bytes.set(total_staging_bytes)
        self._total_kv_tokens = limits.total_kv_tokens

    async def Metrics(  # noqa: N802
        self, _message: pb.MetricsRequest, _context: MetricsContext
    ) -> pb.MetricsResponse:
        load = self._loop.load()
        self._metrics.waiting.set(load.queued_requests)
        self._metrics.running.set(load.running_requests)
        self._metrics.kv_used_tokens.set(self._total_kv_tokens - load.free_kv_tokens)
        self._metrics.held.set(load.held.num_jobs)
        self._metrics.staging_used_bytes.set(load.held.staging_bytes)
        return pb.MetricsResponse(text=exposition(self._metrics.registry))


async def _cached_tokens(computed: asyncio.Future[int]) -> int:
    """What an acknowledged job found cached. Its last layer is out, so its step is about to return; a step
    that fails this late cost nothing but this figure."""
    try:
        return await computed
    except (JobFailedError, EngineStoppedError):
        return 0


def _header_of(request: PrefillRequest, total_bytes: int) -> HandoffHeader:
    return HandoffHeader(
        handoff_id=request.handoff_id,
        epoch=request.target.epoch,
        layout_fingerprint=request.layout_fingerprint,
        first_token=request.first_token,
        num_tokens=len(request.prompt_token_ids) - request.first_token,
        total_bytes=total_bytes,
    )
