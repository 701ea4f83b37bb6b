"""Host time a decode step: schedule, batch, verify and stream, with an executor that computes nothing.

    python benchmarks/host_time.py [--quick] [--json FILE] [--profile]

The engine, the packaged model's detokenizer and the gRPC service are the real ones; in place of a network
stands a context that serialises each message, as gRPC would. Everything runs in one thread, so a step's
time is the sum of what the engine's thread and the event loop do for it. `host_us_b1` and `host_us_b16` are
whole greedy steps, from schedule to serialised bytes; `engine_us_*` is the engine's step alone; `sampled_*`
is the same at temperature 0.8. A figure is the median over repeats of a repeat's median step.
"""

import asyncio
import cProfile
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

from benchmarks.harness import parser, write_figures
from cluster.config import DecodeConfig
from cluster.ids import Epoch, RequestId
from cluster.kv_layout import KvLayout
from cluster.messages import PROTOCOL_VERSION, GenerateRequest, SamplingParams
from cluster.model_card import ModelCard, ServedModel
from cluster.text import Tokenizer
from cluster.transfer.receiver import HandoffReceiver
from cluster.wire import conversions
from cluster.wire import headrace_pb2 as pb
from decode_workers.engine import DecodeEngine
from decode_workers.inbox import Inbox
from decode_workers.noop_executor import NoopExecutor
from decode_workers.service import DecodeContext, DecodeService
from megakernel.model.load import PACKAGED_MODEL, open_model

BATCHES = (1, 16)
PROMPT = "Write one line that sells a folding bicycle to people who take the train to work."
TEXT = " a folding bicycle that fits under the seat of every train"
"""Its tokens are prompts' last ones and, one of them, what the executor emits."""
SAMPLED_TEMPERATURE = 0.8
REPEATS, REPEATS_QUICK = 25, 9
STEPS, STEPS_QUICK = 200, 60
WARM_UP_STEPS = 30


class StepTimes(NamedTuple):
    """Microseconds of each step."""

    engine_us: list[float]
    whole_us: list[float]


class LoopbackContext:
    """A gRPC stream's server side without the network: commands come from a list, messages become bytes."""

    def __init__(self, commands: list[pb.DecodeCommand]) -> None:
        self._commands = commands
        self._end = asyncio.Event()
        self.num_bytes = 0

    async def read(self) -> pb.DecodeCommand | None:
        if self._commands:
            return self._commands.pop(0)
        await self._end.wait()
        return None

    async def write(self, message: pb.DecodeEvents) -> None:
        self.num_bytes += len(message.SerializeToString())

    def close(self) -> None:
        self._end.set()


class Host:
    """An engine and its service, driven step by step on one event loop."""

    def __init__(self) -> None:
        opened = open_model(PACKAGED_MODEL)
        shape, config = opened.weights.shape, DecodeConfig()
        self.card = ModelCard(
            name=opened.name,
            architecture=shape.architecture,
            fingerprint=opened.fingerprint,
            vocab_size=shape.vocab_size,
            max_context_tokens=shape.max_context_tokens,
            bos_token_id=opened.tokenizer.bos_token_id,
            add_bos_token=opened.tokenizer.add_bos,
            eos_token_ids=opened.tokenizer.eos_token_ids,
            chat_template=None,
            bos_token=opened.tokenizer.bos_token,
            eos_token=opened.tokenizer.eos_token,
            created_unix_s=0,
            num_parameters=opened.num_parameters,
            quantization=opened.quantization,
        )
        layout = KvLayout(
            model_fingerprint=opened.fingerprint,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype="float16",
            block_size_tokens=config.block_size_tokens,
        )
        served = ServedModel(card=self.card, tokenizer_json=opened.tokenizer.tokenizer_json)
        self.tokenizer = Tokenizer.of(served)
        self.word_ids = self.tokenizer.encode(TEXT, allow_special=False)
        num_blocks = layout.num_blocks_for(shape.max_context_tokens) * max(BATCHES)
        executor = NoopExecutor(layout, num_blocks, shape.vocab_size, token_id=self.word_ids[0])
        receiver = HandoffReceiver(layout, lambda: Epoch(1), config.handoff_timeout_s)
        self.inbox = Inbox()
        self.engine = DecodeEngine(
            executor, self.tokenizer, self.card, config, handoffs=receiver, inbox=self.inbox
        )
        self.service = DecodeService(self.engine.roster, self.inbox, self.card, max_commands_waiting=1024)

    def commands(self, batch: int, temperature: float, max_tokens: int) -> list[pb.DecodeCommand]:
        """A router's hello, then its requests."""
        hello = pb.Hello(
            protocol_version=PROTOCOL_VERSION, model=self.card.name, model_fingerprint=self.card.fingerprint
        )
        prompt = self.tokenizer.encode(PROMPT, allow_special=False)
        requests = [
            GenerateRequest(
                request_id=RequestId(f"request-{number}"),
                prompt_token_ids=(*prompt, self.word_ids[number % len(self.word_ids)]),
                sampling=SamplingParams(max_tokens=max_tokens, seed=number, temperature=temperature),
            )
            for number in range(batch)
        ]
        return [
            pb.DecodeCommand(hello=hello),
            *(
                pb.DecodeCommand(generate=conversions.generate_request_to_proto(request))
                for request in requests
            ),
        ]

    async def run(
        self, batch: int, temperature: float, repeats: int, steps: int, profiler: cProfile.Profile | None
    ) -> list[StepTimes]:
        """Steps of a batch that stays as it is; one StepTimes a repeat."""
        context = LoopbackContext(
            self.commands(batch, temperature, max_tokens=repeats * steps + 2 * WARM_UP_STEPS)
        )
        stream = asyncio.create_task(self.service.Generate(_no_commands(), cast(DecodeContext, context)))
        await asyncio.sleep(0.01)
        for _ in range(WARM_UP_STEPS):
            await self._step(context)
        assert len(self.engine.roster.running) == batch
        if profiler is not None:
            profiler.enable()
        timed = [
            StepTimes(*map(list, zip(*[await self._step(context) for _ in range(steps)], strict=True)))
            for _ in range(repeats)
        ]
        if profiler is not None:
            profiler.disable()
        assert len(self.engine.roster.running) == batch, "a sequence ended: the batch was not steady"
        context.close()
        await stream
        self.inbox.drain()
        self.engine.step()
        return timed

    async def _step(self, context: LoopbackContext) -> tuple[float, float]:
        """Microseconds of the engine's step, and of all up to the serialised message."""
        written = context.num_bytes
        started = time.perf_counter()
        self.inbox.drain()
        events = self.engine.step()
        stepped = time.perf_counter()
        asyncio.get_running_loop().call_soon_threadsafe(self.service.deliver, events)
        while context.num_bytes == written:  # noqa: ASYNC110 - an event is what is measured here
            await asyncio.sleep(0)
        ended = time.perf_counter()
        return (stepped - started) * 1e6, (ended - started) * 1e6


async def _no_commands():  # type: ignore[no-untyped-def]
    """The service reads its context instead."""
    return
    yield


def measured(quick: bool, *, profile: bool = False) -> dict[str, float]:
    """Microseconds a step by figure's name; see the module."""
    repeats, steps = (REPEATS_QUICK, STEPS_QUICK) if quick else (REPEATS, STEPS)
    host = Host()
    figures: dict[str, float] = {}
    for prefix, temperature in (("", 0.0), ("sampled_", SAMPLED_TEMPERATURE)):
        for batch in BATCHES:
            profiler = cProfile.Profile() if profile else None
            timed = asyncio.run(host.run(batch, temperature, repeats, steps, profiler))
            whole = [statistics.median(times.whole_us) for times in timed]
            engine = [statistics.median(times.engine_us) for times in timed]
            figures[f"{prefix}host_us_b{batch}"] = statistics.median(whole)
            figures[f"{prefix}engine_us_b{batch}"] = statistics.median(engine)
            if profiler is not None:
                print(f"{prefix}b{batch}: calls and seconds over {repeats * steps} steps")
                pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
    return figures


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--profile", action="store_true", help="print where the time goes")
    arguments = options.parse_args()
    figures = measured(arguments.quick, profile=arguments.profile)
    for name, value in figures.items():
        print(f"{name:24} {value:8.1f} us")
    write_figures(arguments.json, figures, runs=REPEATS_QUICK if arguments.quick else REPEATS)


if __name__ == "__main__":
    main()
