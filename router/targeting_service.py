"""`headrace.v1.Targeting`: the same requests, checks and answers as over HTTP, by gRPC."""

import logging
import math
from typing import Any

import grpc.aio

from cluster.ids import RequestId, new_request_id
from cluster.metrics import RouterMetrics
from cluster.timeline import Stage, Timeline
from cluster.wire import headrace_pb2 as pb
from cluster.wire.conversions import usage_to_proto
from cluster.wire.errors import WireError
from cluster.wire.headrace_pb2_grpc import TargetingServicer
from cluster.wire.targeting_conversions import conditions_from_proto, targeting_result_to_proto
from router.admission import Limits, check_model
from router.catalogue_names import CatalogueName
from router.errors import RequestError, internal, invalid
from router.grpc_calls import abort, chat_messages, metadata_of, session_metadata
from router.http import caller_of
from router.openai_api import Body, DeadlineMs
from router.request_body import BodyDecoder
from router.targeting import Selection, Targeting, TargetingFields
from router.targeting_api import Beams, Diversity, K, Scoring

ROUTE = "grpc_targeting"
OPTIONAL_NUMBERS = ("k", "beams", "diversity", "deadline_ms")

_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[pb.TargetingRequest, pb.TargetingResponse]


class _Fields(Body, frozen=True, kw_only=True):
    """The fields of TargetingRequest that HTTP has too, under the same ranges."""

    catalogue: CatalogueName
    k: K | None = None
    beams: Beams | None = None
    scoring: Scoring | None = None
    diversity: Diversity | None = None
    deadline_ms: DeadlineMs | None = None


_fields = BodyDecoder(_Fields)


def fields_of(request: pb.TargetingRequest) -> TargetingFields:
    """Raises RequestError."""
    given: dict[str, Any] = {
        name: getattr(request, name) for name in OPTIONAL_NUMBERS if request.HasField(name)
    }
    if not math.isfinite(request.diversity):
        raise invalid("diversity", "`diversity` must be a finite number", code="invalid_value")
    fields = _fields.convert({**given, "catalogue": request.catalogue, "scoring": request.scoring or None})
    try:
        where = conditions_from_proto(request.filter)
    except WireError as error:
        raise invalid("filter", f"`filter`: {error}", code="invalid_value") from None
    kind = request.WhichOneof("input")
    if kind == "context" and not request.context:
        raise invalid("context", "`context` must not be empty", code="empty")
    return TargetingFields(
        catalogue=fields.catalogue,
        context=request.context if kind == "context" else None,
        messages=tuple(chat_messages(request.chat)) if kind == "chat" else None,
        k=fields.k,
        beams=fields.beams,
        scoring=fields.scoring,
        where=where,
        diversity=fields.diversity,
        seed=request.seed if request.HasField("seed") else None,
        deadline_ms=fields.deadline_ms,
    )


class TargetingService(TargetingServicer):
    def __init__(self, targeting: Targeting, limits: Limits, metrics: RouterMetrics) -> None:
        self._targeting = targeting
        self._limits = limits
        self._metrics = metrics

    async def Select(  # noqa: N802 - the name in the proto file
        self, request: pb.TargetingRequest, context: Context
    ) -> pb.TargetingResponse:
        timeline = Timeline()
        timeline.stamp(Stage.RECEIVED)
        request_id = new_request_id()
        outcome = "cancelled"
        try:
            response = await self._select(request, request_id, metadata_of(context), timeline)
            outcome = response.finish_reason
        except RequestError as error:
            outcome = "rejected" if error.status < 500 else "failed"
            await abort(context, error)
            raise
        except Exception:
            outcome = "failed"
            _log.exception("%s failed", request_id)
            await abort(context, internal())
            raise
        finally:
            self._metrics.requests.labels(ROUTE, outcome).inc()
        return response

    async def _select(
        self,
        request: pb.TargetingRequest,
        request_id: RequestId,
        metadata: dict[str, str],
        timeline: Timeline,
    ) -> pb.TargetingResponse:
        check_model(request.model, self._limits)
        caller = caller_of({**metadata, **session_metadata(request.session_id)})
        fields = fields_of(request)
        timeline.stamp(Stage.VALIDATED)
        received_ns = timeline.stamps_ns[Stage.RECEIVED]
        catalogue, ask = await self._targeting.ask(fields, caller, received_ns)
        timeline.stamp(Stage.TOKENIZED)
        return _response(request_id, await self._targeting.select(request_id, catalogue, ask, timeline))


def _response(request_id: RequestId, selection: Selection) -> pb.TargetingResponse:
    ref = selection.catalogue.ref
    return pb.TargetingResponse(
        request_id=request_id,
        catalogue=ref.name,
        catalogue_version=ref.version,
        finish_reason="deadline" if selection.is_cut_off else "stop",
        result=targeting_result_to_proto(selection.result),
        usage=usage_to_proto(selection.ended.usage),
        warning=selection.warning or "",
    )
