"""Records to protobuf and back. Nothing is decided here; absent optionals stay None.

Protobuf arrives from outside: a value that no record can hold (an unknown enum string) raises
WireError, which the servicer answers with INVALID_ARGUMENT.
"""

from collections.abc import Sequence

from cluster.ids import Epoch, HandoffId, RequestId, SessionId, WorkerId
from cluster.messages import (
    DecodeEvent,
    EmittedToken,
    FailureCode,
    FinishReason,
    GenerateRequest,
    HandoffFailed,
    PrefillRequest,
    PrefillResult,
    Reserved,
    SamplingParams,
    SequenceFailed,
    SequenceFinished,
    TokenLogprob,
    TokensEmitted,
    Usage,
    WorkerAddress,
)
from cluster.wire import headrace_pb2 as pb
from cluster.wire.errors import WireError as WireError
from cluster.wire.targeting_conversions import (
    catalogue_ref_from_proto,
    catalogue_ref_to_proto,
    targeting_params_from_proto,
    targeting_params_to_proto,
    targeting_result_from_proto,
    targeting_result_to_proto,
)


def sampling_to_proto(params: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        max_tokens=params.max_tokens,
        seed=params.seed,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        num_logprobs=params.num_logprobs,
    )


def sampling_from_proto(message: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        seed=message.seed,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
    )


def address_to_proto(address: WorkerAddress) -> pb.WorkerAddress:
    return pb.WorkerAddress(
        worker_id=address.worker_id,
        epoch=address.epoch,
        grpc_address=address.grpc_address,
        host_id=address.host_id,
    )


def address_from_proto(message: pb.WorkerAddress) -> WorkerAddress:
    return WorkerAddress(
        worker_id=WorkerId(message.worker_id),
        epoch=Epoch(message.epoch),
        grpc_address=message.grpc_address,
        host_id=message.host_id,
    )


def generate_request_to_proto(request: GenerateRequest) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=sampling_to_proto(request.sampling),
        tenant=request.tenant,
        session_id=request.session_id or "",
        deadline_unix_ns=request.deadline_unix_ns,
        handoff_id=request.handoff_id or "",
        emitted_token_ids=request.emitted_token_ids,
        targeting=None if request.targeting is None else targeting_params_to_proto(request.targeting),
        campaign=request.campaign,
        speculate=request.speculate,
        phrases=None if request.phrases is None else catalogue_ref_to_proto(request.phrases),
    )


def generate_request_from_proto(message: pb.GenerateRequest) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(message.request_id),
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_proto(message.sampling),
        tenant=message.tenant,
        session_id=SessionId(message.session_id) if message.session_id else None,
        deadline_unix_ns=message.deadline_unix_ns if message.HasField("deadline_unix_ns") else None,
        handoff_id=HandoffId(message.handoff_id) if message.handoff_id else None,
        emitted_token_ids=tuple(message.emitted_token_ids),
        targeting=targeting_params_from_proto(message.targeting) if message.HasField("targeting") else None,
        campaign=message.campaign,
        speculate=message.speculate if message.HasField("speculate") else True,
        phrases=catalogue_ref_from_proto(message.phrases) if message.HasField("phrases") else None,
    )


def prefill_request_to_proto(request: PrefillRequest) -> pb.PrefillRequest:
    return pb.PrefillRequest(
        request_id=request.request_id,
        handoff_id=request.handoff_id,
        prompt_token_ids=request.prompt_token_ids,
        first_token=request.first_token,
        target=address_to_proto(request.target),
        layout_fingerprint=request.layout_fingerprint,
        tenant=request.tenant,
        deadline_unix_ns=request.deadline_unix_ns,
    )


def prefill_request_from_proto(message: pb.PrefillRequest) -> PrefillRequest:
    return PrefillRequest(
        request_id=RequestId(message.request_id),
        handoff_id=HandoffId(message.handoff_id),
        prompt_token_ids=tuple(message.prompt_token_ids),
        first_token=message.first_token,
        target=address_from_proto(message.target),
        layout_fingerprint=message.layout_fingerprint,
        tenant=message.tenant,
        deadline_unix_ns=message.deadline_unix_ns if message.HasField("deadline_unix_ns") else None,
    )


def prefill_result_to_proto(result: PrefillResult) -> pb.PrefillResult:
    return pb.PrefillResult(
        cached_tokens=result.cached_tokens,
        bytes_sent=result.bytes_sent,
        bytes_sent_before_forward_end=result.bytes_sent_before_forward_end,
        transport=result.transport,
        stamps_ns=result.stamps_ns,
    )


def prefill_result_from_proto(message: pb.PrefillResult) -> PrefillResult:
    return PrefillResult(
        cached_tokens=message.cached_tokens,
        bytes_sent=message.bytes_sent,
        bytes_sent_before_forward_end=message.bytes_sent_before_forward_end,
        transport=message.transport,
        stamps_ns=dict(message.stamps_ns),
    )


def usage_to_proto(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def usage_from_proto(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
    )


def token_to_proto(token: EmittedToken) -> pb.Token:
    return pb.Token(
        token_id=token.token_id,
        logprob=token.logprob,
        top_logprobs=[pb.TokenLogprob(token_id=t.token_id, logprob=t.logprob) for t in token.top_logprobs],
    )


def token_from_proto(message: pb.Token) -> EmittedToken:
    return EmittedToken(
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top_logprobs=tuple(
            TokenLogprob(token_id=t.token_id, logprob=t.logprob) for t in message.top_logprobs
        ),
    )


def _tokens_emitted_to_proto(event: TokensEmitted) -> pb.TokensEmitted:
    # Most tokens have no logprob: a packed list of ids is a tenth of the work of a list of messages.
    if all(token.logprob is None for token in event.tokens):
        ids = [token.token_id for token in event.tokens]
        return pb.TokensEmitted(first_index=event.first_index, text=event.text, token_ids=ids)
    tokens = [token_to_proto(token) for token in event.tokens]
    return pb.TokensEmitted(first_index=event.first_index, text=event.text, tokens=tokens)


def _tokens_emitted_from_proto(request_id: RequestId, message: pb.TokensEmitted) -> TokensEmitted:
    tokens = (
        tuple(EmittedToken(token_id=token_id) for token_id in message.token_ids)
        if message.token_ids
        else tuple(token_from_proto(token) for token in message.tokens)
    )
    return TokensEmitted(
        request_id=request_id, first_index=message.first_index, tokens=tokens, text=message.text
    )


def _finished_to_proto(event: SequenceFinished) -> pb.SequenceFinished:
    return pb.SequenceFinished(
        reason=event.reason.value,
        usage=usage_to_proto(event.usage),
        stamps_ns=event.stamps_ns,
        text=event.text,
        stop_match=event.stop_match,
        targeting=None if event.targeting is None else targeting_result_to_proto(event.targeting),
    )


def _finished_from_proto(request_id: RequestId, message: pb.SequenceFinished) -> SequenceFinished:
    try:
        reason = FinishReason(message.reason)
    except ValueError:
        raise WireError(f"unknown finish reason {message.reason!r}") from None
    return SequenceFinished(
        request_id=request_id,
        reason=reason,
        usage=usage_from_proto(message.usage),
        stamps_ns=dict(message.stamps_ns),
        text=message.text,
        stop_match=message.stop_match if message.HasField("stop_match") else None,
        targeting=targeting_result_from_proto(message.targeting) if message.HasField("targeting") else None,
    )


def _failed_from_proto(request_id: RequestId, message: pb.SequenceFailed) -> SequenceFailed:
    try:
        code = FailureCode(message.code)
    except ValueError:
        raise WireError(f"unknown failure code {message.code!r}") from None
    return SequenceFailed(
        request_id=request_id, code=code, message=message.message, is_retryable=message.is_retryable
    )


def event_to_proto(event: DecodeEvent) -> pb.DecodeEvent:
    match event:
        case TokensEmitted():
            return pb.DecodeEvent(request_id=event.request_id, tokens=_tokens_emitted_to_proto(event))
        case SequenceFinished():
            return pb.DecodeEvent(request_id=event.request_id, finished=_finished_to_proto(event))
        case Reserved():
            reserved = pb.Reserved(handoff_id=event.handoff_id, first_token=event.first_token)
            return pb.DecodeEvent(request_id=event.request_id, reserved=reserved)
        case SequenceFailed():
            failed = pb.SequenceFailed(
                code=event.code.value, message=event.message, is_retryable=event.is_retryable
            )
            return pb.DecodeEvent(request_id=event.request_id, failed=failed)
        case HandoffFailed():
            handoff_failed = pb.HandoffFailed(handoff_id=event.handoff_id, message=event.message)
            return pb.DecodeEvent(request_id=event.request_id, handoff_failed=handoff_failed)


def event_from_proto(message: pb.DecodeEvent) -> DecodeEvent:
    request_id = RequestId(message.request_id)
    match message.WhichOneof("event"):
        case "tokens":
            return _tokens_emitted_from_proto(request_id, message.tokens)
        case "finished":
            return _finished_from_proto(request_id, message.finished)
        case "reserved":
            return Reserved(
                request_id=request_id,
                handoff_id=HandoffId(message.reserved.handoff_id),
                first_token=message.reserved.first_token,
            )
        case "failed":
            return _failed_from_proto(request_id, message.failed)
        case "handoff_failed":
            return HandoffFailed(
                request_id=request_id,
                handoff_id=HandoffId(message.handoff_failed.handoff_id),
                message=message.handoff_failed.message,
            )
        case _:
            raise WireError("a decode event without content")


def events_to_proto(events: Sequence[DecodeEvent]) -> pb.DecodeEvents:
    return pb.DecodeEvents(events=[event_to_proto(event) for event in events])
