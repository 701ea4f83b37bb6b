"""`Prefill.Run` and its failures."""

import grpc
import grpc.aio

from cluster.messages import PrefillRequest, PrefillResult, WorkerAddress
from cluster.wire.conversions import prefill_request_to_proto, prefill_result_from_proto
from cluster.wire.headrace_pb2_grpc import PrefillStub
from router.channels import Channels


class PrefillFailedError(Exception):
    """The prefill worker did not hand over. Handled by the attempt, which tries elsewhere."""


class PrefillClient:
    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def run(self, worker: WorkerAddress, request: PrefillRequest, timeout_s: float) -> PrefillResult:
        """Returns when the target has acknowledged; cancelling the task cancels prefill and hand-off.

        Raises PrefillFailedError, whatever the status: for the router all mean "not from there".
        """
        stub = PrefillStub(self._channels.get(worker.grpc_address))
        try:
            result = await stub.Run(prefill_request_to_proto(request), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise PrefillFailedError(f"{worker.worker_id}: {error.code().name}: {error.details()}") from None
        except grpc.aio.UsageError as error:  # its channel was closed: the worker left the directory
            raise PrefillFailedError(f"{worker.worker_id}: {error}") from None
        return prefill_result_from_proto(result)
