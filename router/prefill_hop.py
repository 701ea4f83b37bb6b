"""The prefill hop of one attempt: run it when KV is reserved, elsewhere when it fails, or not at all."""

import asyncio
import logging
from collections.abc import Callable

from cluster.ids import HandoffId, RequestId, WorkerId, new_handoff_id
from cluster.messages import HandoffFailed, PrefillRequest, PrefillResult, Record, Reserved, WorkerAddress
from cluster.metrics import RouterMetrics
from router.admission import remaining_s
from router.decode_connection import DecodeConnection
from router.decode_pool import Directory
from router.placing import Placed
from router.prefill_client import PrefillClient, PrefillFailedError
from router.retry import MAX_PREFILL_TRIES, another_prefill_worker
from router.sequence import SequenceAsk

DEADLINE_MARGIN_S = 1.0
"""At its deadline the attempt ends the hop; the call's own timeout must not look like a failure before."""

_log = logging.getLogger(__name__)


class PrefillEnded(Record, frozen=True, kw_only=True):
    """How a `Prefill.Run` call ended: with a result, or a message."""

    handoff_id: HandoffId
    result: PrefillResult | None = None
    message: str = ""


class PrefillHop:
    """Lives as long as its attempt; `cancel` it in the end. Events come in through the `on_` methods."""

    def __init__(
        self,
        ask: SequenceAsk,
        request_id: RequestId,
        placed: Placed,
        connection: DecodeConnection,
        client: PrefillClient,
        directory: Directory,
        metrics: RouterMetrics,
        notify: Callable[[PrefillEnded], None],
    ) -> None:
        """`notify` is told of every call's end, on the event loop; it should lead to `on_prefill_ended`."""
        self._ask = ask
        self._request_id = request_id
        self._placed = placed
        self._layout_fingerprint = placed.decode.layout_fingerprint
        self._connection = connection
        self._client = client
        self._directory = directory
        self._metrics = metrics
        self._notify = notify
        self._worker = placed.placement.prefill
        self.handoff_id = new_handoff_id() if self._worker else None
        """The hand-off that the decode worker waits for; None: it computes the prompt itself."""
        self.first_token = 0
        """Prompt tokens [0, first_token) were cached at the decode worker."""
        self.cached_tokens = 0
        """Those the prefill worker had cached, of the whole prompt."""
        self._tried: list[WorkerId] = []
        self._task: asyncio.Task[None] | None = None

    def on_reserved(self, event: Reserved) -> None:
        if event.handoff_id != self.handoff_id or self._task is not None:
            return
        self.first_token = event.first_token
        if event.first_token >= self._num_tokens:
            self.handoff_id = None  # all of it is cached there: the decode worker goes on by itself
        elif not self._placed.is_hop_worthwhile(event.first_token):
            self._run_locally()  # the worker holds more than the index knew
        else:
            self._start()

    def on_handoff_failed(self, event: HandoffFailed) -> None:
        if event.handoff_id == self.handoff_id:
            self._failed("handoff", event.message)

    def on_prefill_ended(self, event: PrefillEnded) -> None:
        if event.handoff_id != self.handoff_id:
            return  # both ends may report the same failure
        if event.result is None:
            self._failed("prefill", event.message)
        else:
            self.cached_tokens = event.result.cached_tokens

    def cancel(self) -> None:
        """Cancels the call, and with it computing and sending. Safe to repeat."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    @property
    def _num_tokens(self) -> int:
        """The prompt without its last token, which is the decode worker's first row."""
        return len(self._ask.prompt_token_ids) - 1

    def _failed(self, what: str, message: str) -> None:
        """Once more from another prefill worker; else the decode worker computes the prompt itself."""
        _log.info("%s: %s failed: %s", self._request_id, what, message)
        self._metrics.retries.labels(what).inc()
        self.cancel()
        self._worker = self._next_worker()
        if self._worker is None:
            self._run_locally()
            return
        # Prefill starts when the reservation waits for the new hand-off, which another Reserved says.
        self.handoff_id = new_handoff_id()
        self._connection.retry_handoff(self._request_id, self.handoff_id)

    def _run_locally(self) -> None:
        self.handoff_id = None
        self._connection.prefill_locally(self._request_id)

    def _next_worker(self) -> WorkerAddress | None:
        if len(self._tried) >= MAX_PREFILL_TRIES:
            return None
        record = another_prefill_worker(
            self._directory.snapshot("prefill"),
            layout_fingerprint=self._layout_fingerprint,
            num_tokens=self._num_tokens,
            tried=self._tried,
        )
        return record.address if record else None

    def _start(self) -> None:
        assert self._worker is not None
        assert self.handoff_id is not None
        self._tried.append(self._worker.worker_id)
        request = PrefillRequest(
            request_id=self._request_id,
            handoff_id=self.handoff_id,
            prompt_token_ids=self._ask.prompt_token_ids[: self._num_tokens],
            first_token=self.first_token,
            target=self._connection.address,
            layout_fingerprint=self._layout_fingerprint,
            tenant=self._ask.tenant,
            deadline_unix_ns=self._ask.deadline_unix_ns,
        )
        self._task = asyncio.create_task(self._run(self._worker, request))

    async def _run(self, worker: WorkerAddress, request: PrefillRequest) -> None:
        try:
            timeout_s = max(0.0, remaining_s(self._ask.deadline_unix_ns)) + DEADLINE_MARGIN_S
            result = await self._client.run(worker, request, timeout_s)
        except PrefillFailedError as error:
            self._notify(PrefillEnded(handoff_id=request.handoff_id, message=str(error)))
        except asyncio.CancelledError:
            if self._task is not asyncio.current_task():
                raise  # by `cancel`
            # The channel was closed under the call: gRPC says that by cancelling.
            self._notify(PrefillEnded(handoff_id=request.handoff_id, message=f"{worker.worker_id} is gone"))
        else:
            self._notify(PrefillEnded(handoff_id=request.handoff_id, result=result))
