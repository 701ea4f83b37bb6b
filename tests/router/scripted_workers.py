"""Decode and prefill workers that speak the real protocol over loopback and compute nothing.

A scripted decode worker's token at position t is a pure function of (prompt, seed, t), so a replay on
another one must continue exactly. Prefill workers call nothing: the decode worker is told in process.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from cluster.catalogue.file import Catalogue
from cluster.ids import Epoch, WorkerId
from cluster.messages import (
    PROTOCOL_VERSION,
    Role,
    ScoredItem,
    TargetingParams,
    TargetingResult,
    WorkerAddress,
    WorkerRecord,
    WorkerStatus,
)
from cluster.text import IncrementalDetokenizer, Tokenizer
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from cluster.wire.targeting_conversions import targeting_params_from_proto, targeting_result_to_proto

LAYOUT = "layout-1"
BLOCK_SIZE = 4
WORDS = " the mill wheel turns at full speed while water runs through the headrace channel,"


@dataclass
class Behaviour:
    """What a worker does to the next requests; tests change it while it runs."""

    step_delay_s: float = 0.0
    tokens_per_step: int = 1
    stop_after: int | None = None
    """Finish with `stop` after this many tokens, not at max_tokens."""
    die_at: int | None = None
    """Break the whole stream once this many tokens of a request were emitted; once."""
    hang_at: int | None = None
    """Emit no more once this many tokens were emitted."""
    skip_index_at: int | None = None
    """Break the contract: leave a gap before this index; once."""
    fail_with: tuple[str, bool] | None = None
    """(code, is_retryable) for every request."""
    ignores_hops: bool = False
    cached_tokens: int = 0
    handoffs_to_fail: int = 0
    forgets_items: bool = False
    """Break the contract: end a targeting request without a result."""


@dataclass
class Seen:
    hellos: list[pb.Hello] = field(default_factory=list)
    generates: list[pb.GenerateRequest] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    retries: list[pb.RetryHandoff] = field(default_factory=list)
    local: list[str] = field(default_factory=list)


def completion_ids(tokenizer: Tokenizer, prompt: tuple[int, ...], seed: int, count: int) -> list[int]:
    """What a scripted worker answers."""
    words = tokenizer.encode(WORDS, allow_special=False)
    start = (sum(prompt) + seed) % len(words)
    return [words[(start + index) % len(words)] for index in range(count)]


def scripted_items(params: TargetingParams) -> TargetingResult:
    """What a scripted worker answers: the catalogue's first items that pass, in its own order."""
    catalogue = Catalogue.open(Path(params.catalogue.path))
    passing = catalogue.mask(params.where).nonzero()[0][: params.k].tolist()
    items = tuple(
        ScoredItem(
            rank=rank,
            item_id=catalogue.item_id(index),
            text=catalogue.text(index),
            logprob=-0.5 * rank,
            bid=catalogue.bid(index),
        )
        for rank, index in enumerate(passing, 1)
    )
    return TargetingResult(
        items=items,
        is_complete=True,
        decoding="stepwise" if items else "none",
        num_steps=3,
        num_rows=7,
        num_verified_items=len(items),
    )


class _Handoffs:
    """Which hand-offs have arrived: set by the prefill worker, awaited by the decode worker."""

    def __init__(self) -> None:
        self._arrived: dict[str, asyncio.Event] = {}

    def event(self, handoff_id: str) -> asyncio.Event:
        return self._arrived.setdefault(handoff_id, asyncio.Event())


HANDOFFS = _Handoffs()


class ScriptedServer:
    """A gRPC server on a loopback port of its own."""

    role: Role

    def __init__(self, worker_id: str) -> None:
        self.worker_id = WorkerId(worker_id)
        self.epoch = Epoch(1)
        self.grpc_address = ""
        self.status = WorkerStatus(total_kv_tokens=100_000, free_kv_tokens=100_000)
        self.layout = LAYOUT
        self._server: grpc.aio.Server | None = None

    def _register(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._register(self._server)
        port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.grpc_address = f"127.0.0.1:{port}"
        await self._server.start()

    @property
    def port(self) -> int:
        return int(self.grpc_address.rpartition(":")[2])

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    @property
    def record(self) -> WorkerRecord:
        return WorkerRecord(
            address=WorkerAddress(
                worker_id=self.worker_id,
                epoch=self.epoch,
                grpc_address=self.grpc_address,
                host_id="host",
            ),
            role=self.role,
            model="scripted",
            protocol_version=PROTOCOL_VERSION,
            layout_fingerprint=self.layout,
            block_size_tokens=BLOCK_SIZE,
            status=self.status,
        )


class ScriptedAdmin(pb_grpc.WorkerAdminServicer):
    def __init__(self) -> None:
        name = "headrace_steps_total"
        self.text = f"# HELP {name} Steps\n# TYPE {name} counter\n{name} 3.0\n"
        self.delay_s = 0.0

    async def Metrics(self, request, context):
        await asyncio.sleep(self.delay_s)
        return pb.MetricsResponse(text=self.text)


class ScriptedDecode(ScriptedServer, pb_grpc.DecodeServicer):
    role = "decode"

    def __init__(
        self, worker_id: str, tokenizer: Tokenizer, expected: Callable[[pb.Hello], str | None]
    ) -> None:
        """`expected` returns why a Hello is refused, or None."""
        super().__init__(worker_id)
        self._tokenizer = tokenizer
        self._expected = expected
        self.behaviour = Behaviour()
        self.seen = Seen()
        self.admin = ScriptedAdmin()
        self.num_live = 0

    def _register(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_DecodeServicer_to_server(self, server)
        pb_grpc.add_WorkerAdminServicer_to_server(self.admin, server)

    async def Generate(self, requests: AsyncIterator[pb.DecodeCommand], context) -> None:
        stream = _DecodeStream(self, context)
        try:
            hello = await context.read()
            self.seen.hellos.append(hello.hello)
            if refusal := self._expected(hello.hello):
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
            await stream.obey()
        finally:
            stream.end()


class _DecodeStream:
    def __init__(self, worker: ScriptedDecode, context) -> None:
        self._worker = worker
        self._context = context
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._local: dict[str, asyncio.Event] = {}
        self._retry: dict[str, asyncio.Queue[str]] = {}
        self._lock = asyncio.Lock()
        self._broken = asyncio.Event()

    async def obey(self) -> None:
        broken = asyncio.create_task(self._broken.wait())
        try:
            while True:
                read = asyncio.create_task(self._context.read())
                await asyncio.wait((read, broken), return_when=asyncio.FIRST_COMPLETED)
                if broken.done():
                    read.cancel()
                    await self._context.abort(grpc.StatusCode.UNAVAILABLE, "scripted death")
                command = read.result()
                if command is grpc.aio.EOF:
                    return
                self._obey_one(command)
        finally:
            broken.cancel()

    def _obey_one(self, command: pb.DecodeCommand) -> None:
        seen = self._worker.seen
        match command.WhichOneof("command"):
            case "generate":
                seen.generates.append(command.generate)
                request_id = command.generate.request_id
                self._local[request_id] = asyncio.Event()
                self._retry[request_id] = asyncio.Queue()
                self._worker.num_live += 1
                self._tasks[request_id] = asyncio.create_task(self._generate(command.generate))
            case "cancel":
                seen.cancels.append(command.cancel.request_id)
                if task := self._tasks.get(command.cancel.request_id):
                    task.cancel()
            case "retry_handoff":
                seen.retries.append(command.retry_handoff)
                self._retry[command.retry_handoff.request_id].put_nowait(command.retry_handoff.handoff_id)
            case "prefill_locally":
                seen.local.append(command.prefill_locally.request_id)
                self._local[command.prefill_locally.request_id].set()

    def end(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _send(self, request_id: str, **event: object) -> None:
        async with self._lock:
            message = pb.DecodeEvent(request_id=request_id, **event)
            await self._context.write(pb.DecodeEvents(events=[message]))

    async def _generate(self, request: pb.GenerateRequest) -> None:
        try:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._run(request)
        finally:
            self._worker.num_live -= 1

    async def _run(self, request: pb.GenerateRequest) -> None:
        behaviour = self._worker.behaviour
        request_id = request.request_id
        if behaviour.fail_with is not None:
            code, is_retryable = behaviour.fail_with
            failed = pb.SequenceFailed(code=code, message="scripted failure", is_retryable=is_retryable)
            await self._send(request_id, failed=failed)
            return
        if request.handoff_id and not behaviour.ignores_hops:
            await self._await_handoff(request)
        if request.HasField("targeting"):
            await self._select(request)
        else:
            await self._emit(request)

    async def _select(self, request: pb.GenerateRequest) -> None:
        behaviour = self._worker.behaviour
        if behaviour.step_delay_s:
            await asyncio.sleep(behaviour.step_delay_s)
        if behaviour.hang_at == 0:
            await asyncio.sleep(3600)
        if behaviour.die_at == 0:
            behaviour.die_at = None
            self._broken.set()
            await asyncio.sleep(3600)
        usage = pb.Usage(prompt_tokens=len(request.prompt_token_ids), cached_tokens=behaviour.cached_tokens)
        params = targeting_params_from_proto(request.targeting)
        result = None if behaviour.forgets_items else scripted_items(params)
        finished = pb.SequenceFinished(
            reason="stop",
            usage=usage,
            stamps_ns={"first_step_started": 1, "finished": 2_000_001},
            targeting=result and targeting_result_to_proto(result),
        )
        await self._send(request.request_id, finished=finished)

    async def _await_handoff(self, request: pb.GenerateRequest) -> None:
        behaviour = self._worker.behaviour
        handoff_id = request.handoff_id
        while True:
            reserved = pb.Reserved(handoff_id=handoff_id, first_token=behaviour.cached_tokens)
            await self._send(request.request_id, reserved=reserved)
            if behaviour.cached_tokens >= len(request.prompt_token_ids) - 1:
                return
            if behaviour.handoffs_to_fail:
                behaviour.handoffs_to_fail -= 1
                failed = pb.HandoffFailed(handoff_id=handoff_id, message="scripted rejection")
                await self._send(request.request_id, handoff_failed=failed)
            else:
                arrived = asyncio.create_task(HANDOFFS.event(handoff_id).wait())
                local = asyncio.create_task(self._local[request.request_id].wait())
                retry = asyncio.create_task(self._retry[request.request_id].get())
                waiting = (arrived, local, retry)
                try:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    if not retry.done():
                        return
                    handoff_id = retry.result()
                    continue
                finally:
                    for task in waiting:
                        task.cancel()
            local = asyncio.create_task(self._local[request.request_id].wait())
            retry = asyncio.create_task(self._retry[request.request_id].get())
            await asyncio.wait((local, retry), return_when=asyncio.FIRST_COMPLETED)
            if local.done():
                retry.cancel()
                return
            local.cancel()
            handoff_id = retry.result()

    async def _emit(self, request: pb.GenerateRequest) -> None:
        behaviour, tokenizer = self._worker.behaviour, self._worker._tokenizer
        total = min(request.sampling.max_tokens, behaviour.stop_after or request.sampling.max_tokens)
        prompt = tuple(request.prompt_token_ids)
        ids = completion_ids(tokenizer, prompt, request.sampling.seed, total)
        index = len(request.emitted_token_ids)
        assert list(request.emitted_token_ids) == ids[:index], "a replay hands over what was emitted"
        detokenizer = IncrementalDetokenizer(tokenizer)
        for token_id in ids[:index]:
            detokenizer.push(token_id)
        while index < total:
            if behaviour.step_delay_s:
                await asyncio.sleep(behaviour.step_delay_s)
            if behaviour.hang_at is not None and index >= behaviour.hang_at:
                await asyncio.sleep(3600)
            if behaviour.die_at is not None and index >= behaviour.die_at:
                behaviour.die_at = None
                self._broken.set()
                await asyncio.sleep(3600)
            if behaviour.skip_index_at == index:
                behaviour.skip_index_at = None
                index += 1
            step = ids[index : index + behaviour.tokens_per_step]
            text = "".join(detokenizer.push(token_id) for token_id in step)
            await self._send(request.request_id, tokens=self._tokens(request, index, step, text))
            index += len(step)
        usage = pb.Usage(
            prompt_tokens=len(prompt), completion_tokens=total, cached_tokens=behaviour.cached_tokens
        )
        finished = pb.SequenceFinished(
            reason="stop" if behaviour.stop_after else "length",
            usage=usage,
            stamps_ns={"decode_received": 1, "first_token": 2},
            text=detokenizer.flush(),
        )
        await self._send(request.request_id, finished=finished)

    @staticmethod
    def _tokens(request: pb.GenerateRequest, index: int, step: list[int], text: str) -> pb.TokensEmitted:
        if not request.sampling.HasField("num_logprobs"):
            return pb.TokensEmitted(first_index=index, token_ids=step, text=text)
        tokens = [
            pb.Token(
                token_id=token_id,
                logprob=-0.5,
                top_logprobs=[
                    pb.TokenLogprob(token_id=token_id + rank, logprob=-0.5 - rank)
                    for rank in range(request.sampling.num_logprobs)
                ],
            )
            for token_id in step
        ]
        return pb.TokensEmitted(first_index=index, tokens=tokens, text=text)


class ScriptedPrefill(ScriptedServer, pb_grpc.PrefillServicer):
    role = "prefill"

    def __init__(self, worker_id: str) -> None:
        super().__init__(worker_id)
        self.runs: list[pb.PrefillRequest] = []
        self.num_cancelled = 0
        self.fail_with: grpc.StatusCode | None = None
        self.hangs = False
        self.cached_tokens = 0
        self.admin = ScriptedAdmin()

    def _register(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_PrefillServicer_to_server(self, server)
        pb_grpc.add_WorkerAdminServicer_to_server(self.admin, server)

    async def Run(self, request: pb.PrefillRequest, context) -> pb.PrefillResult:
        self.runs.append(request)
        if self.fail_with is not None:
            await context.abort(self.fail_with, "scripted prefill failure")
        try:
            if self.hangs:
                await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        HANDOFFS.event(request.handoff_id).set()
        return pb.PrefillResult(
            cached_tokens=self.cached_tokens,
            bytes_sent=1,
            transport="grpc",
            stamps_ns={"prefill_started": 3, "prefill_finished": 4},
        )
