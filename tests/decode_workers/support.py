"""An executor whose logits are a hash of the KV it finds, a byte tokenizer, and an engine around both.

Every slot holds a hash over its token and all that the row saw: KV in a wrong place, or of a wrong prefix,
changes every token after it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers

from cluster.config import DecodeConfig
from cluster.ids import HandoffId, RequestId
from cluster.kv_layout import KvLayout
from cluster.messages import (
    DecodeEvent,
    FinishReason,
    GenerateRequest,
    HandoffCancelState,
    SamplingParams,
    SequenceFailed,
    SequenceFinished,
    StepCost,
    TokensEmitted,
)
from cluster.model_card import ModelCard
from cluster.text import Tokenizer
from cluster.transfer import HandoffSink
from decode_workers.engine import DecodeEngine, Drafter
from decode_workers.head_answers import answer, is_logit_row
from decode_workers.inbox import Inbox
from decode_workers.sampler import sample
from decode_workers.step_batch import (
    Float32Array,
    Int32Array,
    StepBatch,
    StepResult,
    ancestor_mask,
)
from megakernel.step import check_held

EOS = 256
VOCAB_SIZE = 257
MAX_CONTEXT_TOKENS = 96


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes, in the order of the byte-level alphabet; 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = LibraryTokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<eos>"])
    document = json.loads(library.to_str())
    return Tokenizer(json.dumps(document).encode())


TOKENIZER = byte_tokenizer()

CARD = ModelCard(
    name="hash",
    architecture="llama",
    fingerprint="hash-1",
    vocab_size=VOCAB_SIZE,
    max_context_tokens=MAX_CONTEXT_TOKENS,
    bos_token_id=None,
    add_bos_token=False,
    eos_token_ids=(EOS,),
    chat_template=None,
    bos_token="",
    eos_token="<eos>",
    created_unix_s=0,
    num_parameters=0,
    quantization="none",
)


def kv_value(token_id: int, position: int, seen: Sequence[int]) -> int:
    payload = np.array([token_id, position, *seen], dtype=np.uint64).tobytes()
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little")


def logits_of(value: int) -> Float32Array:
    return np.random.default_rng(value).standard_normal(VOCAB_SIZE).astype(np.float32) * 3


def kv_of(token_ids: Sequence[int]) -> list[int]:
    """What the slots of a sequence must hold."""
    values: list[int] = []
    for position, token_id in enumerate(token_ids):
        values.append(kv_value(token_id, position, values))
    return values


def wire_kv(token_ids: Sequence[int], first_token: int) -> bytes:
    """One layer of tokens [first_token, end): the low halves as K, the high halves as V."""
    values = np.array(kv_of(token_ids)[first_token:], dtype=np.uint64)
    low, high = (
        (values & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        (values >> np.uint64(32)).astype(np.uint32),
    )
    return low.tobytes() + high.tobytes()


class HashExecutor:
    """`StepExecutor` over 64-bit hashes instead of KV."""

    def __init__(self, num_blocks: int = 32, block_size_tokens: int = 4, max_rows: int = 64) -> None:
        self.layout = KvLayout(
            model_fingerprint="hash-1",
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            dtype="float32",
            block_size_tokens=block_size_tokens,
        )
        self.num_blocks = num_blocks
        self.vocab_size = VOCAB_SIZE
        self.buckets = (max_rows,)
        self.kv = np.full(num_blocks * block_size_tokens, 0xDEAD, dtype=np.uint64)
        self.batches: list[StepBatch] = []
        self.spoil: Callable[[StepBatch, Float32Array], None] | None = None
        """Applied to each step's logits; may raise."""
        self.is_closed = False

    def run(self, batch: StepBatch) -> StepResult:
        self._check(batch)
        self.batches.append(batch)
        rows = np.flatnonzero(is_logit_row(batch))
        values = self._values(batch)
        self.kv[batch.slots] = np.array(values, dtype=np.uint64)
        logits = (
            np.stack([logits_of(values[row]) for row in rows]) if len(rows) else np.zeros((0, VOCAB_SIZE))
        )
        logits = logits.astype(np.float32)
        if self.spoil is not None:
            self.spoil(batch, logits)
        return answer(batch, logits)

    def _values(self, batch: StepBatch) -> list[int]:
        values: list[int] = []
        size = self.layout.block_size_tokens
        for i in range(batch.num_sequences):
            start, end = int(batch.sequence_starts[i]), int(batch.sequence_starts[i + 1])
            mask = ancestor_mask(batch.parents, start, end)
            positions = np.arange(int(batch.context_lengths[i]))
            slots = batch.block_tables[i][positions // size] * size + positions % size
            prefix = self.kv[slots].tolist()
            for row in range(start, end):
                rows = [start + j for j in range(row - start + 1) if mask[row - start, j]]
                ancestors = self._held(batch, rows[0]) + [values[ancestor] for ancestor in rows[:-1]]
                position = int(batch.positions[row])
                assert position == len(prefix) + len(ancestors), "a row's position is not its depth's"
                values.append(kv_value(int(batch.token_ids[row]), position, prefix + ancestors))
        return values

    def _held(self, batch: StepBatch, root: int) -> list[int]:
        if batch.held_starts is None or batch.held_slots is None:
            return []
        values: list[int] = self.kv[
            batch.held_slots[batch.held_starts[root] : batch.held_starts[root + 1]]
        ].tolist()
        return values

    def _check(self, batch: StepBatch) -> None:
        assert 0 < batch.num_rows <= self.buckets[-1]
        assert len(set(batch.slots.tolist())) == batch.num_rows, "two rows write one slot"
        assert batch.slots.min() >= 0
        for name in ("token_ids", "positions", "slots", "parents", "sequence_starts", "context_lengths"):
            assert getattr(batch, name).dtype == np.int32, name
        if batch.held_starts is not None:
            assert batch.held_slots is not None
            assert batch.held_starts.dtype == batch.held_slots.dtype == np.int32
            check_held(batch.held_starts, batch.held_slots, batch.parents, len(self.kv))
            assert not np.isin(batch.held_slots, batch.slots).any(), "a row writes a held slot"

    def copy_slots(self, source: Int32Array, destination: Int32Array) -> None:
        self.kv[destination] = self.kv[source].copy()

    def write_kv(self, layer: int, slots: Int32Array, data: memoryview) -> None:
        assert layer == 0
        halves = np.frombuffer(data, dtype=np.uint32).reshape(2, len(slots)).astype(np.uint64)
        self.kv[slots] = halves[0] | halves[1] << np.uint64(32)

    def measure(self) -> tuple[StepCost, ...]:
        return (StepCost(rows=self.buckets[-1], ms=1.0),)

    def close(self) -> None:
        self.is_closed = True


def expected_tokens(prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    """What any path through the engine must emit: one token after the other, by the rules above."""
    tokens = list(prompt)
    values = kv_of(tokens)
    room = min(sampling.max_tokens, MAX_CONTEXT_TOKENS - len(prompt))
    for index in range(room):
        token_id = sample(logits_of(values[-1]), sampling, index)
        values.append(kv_value(token_id, len(tokens), values))
        tokens.append(token_id)
        if token_id == EOS and not sampling.ignore_eos:
            break
    return tokens[len(prompt) :]


class NoHandoffs:
    """A hand-off port that remembers; the test plays the prefill worker."""

    def __init__(self) -> None:
        self.sinks: dict[HandoffId, HandoffSink] = {}
        self.expected: dict[HandoffId, tuple[int, int]] = {}
        self.cancelled: list[HandoffId] = []

    def expect(self, handoff_id: HandoffId, first_token: int, num_tokens: int, sink: HandoffSink) -> None:
        self.sinks[handoff_id] = sink
        self.expected[handoff_id] = (first_token, num_tokens)

    def cancel(self, handoff_id: HandoffId) -> HandoffCancelState:
        self.cancelled.append(handoff_id)
        return HandoffCancelState.CANCELLED_BEFORE_ADVERTISE


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ns


class EngineRig:
    """An engine with everything around it in the test's hands."""

    def __init__(
        self,
        executor: HashExecutor | None = None,
        config: DecodeConfig | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.executor = executor or HashExecutor()
        self.handoffs = NoHandoffs()
        self.clock = Clock()
        self.inbox = Inbox()
        self.engine = DecodeEngine(
            self.executor,
            TOKENIZER,
            CARD,
            config or DecodeConfig(),
            handoffs=self.handoffs,
            inbox=self.inbox,
            drafter=drafter,
            clock_ns=self.clock,
        )
        self.events: list[DecodeEvent] = []

    def submit(self, *requests: GenerateRequest) -> None:
        for request in requests:
            self.engine.roster.submit(request)

    def step(self) -> list[DecodeEvent]:
        self.inbox.drain()
        events = self.engine.step()
        self.engine.kv.check()
        self.events += events
        return events

    def run(self, max_steps: int = 1000) -> "EngineRig":
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            self.step()
            if not self.engine.has_work and not len(self.inbox):
                return self
        raise AssertionError(f"still busy after {max_steps} steps")

    def of(self, request_id: str) -> list[DecodeEvent]:
        return [event for event in self.events if event.request_id == request_id]

    def tokens(self, request_id: str) -> list[int]:
        """Emitted tokens, their indices without gap or repeat."""
        tokens: list[int] = []
        for event in self.of(request_id):
            if isinstance(event, TokensEmitted):
                if not tokens:
                    first = event.first_index
                assert event.first_index == first + len(tokens)
                tokens += [token.token_id for token in event.tokens]
        return tokens

    def text(self, request_id: str) -> str:
        texts = [e.text for e in self.of(request_id) if isinstance(e, TokensEmitted | SequenceFinished)]
        return "".join(texts)

    def finished(self, request_id: str) -> SequenceFinished:
        last = self.of(request_id)[-1]
        assert isinstance(last, SequenceFinished), last
        return last

    def failed(self, request_id: str) -> SequenceFailed:
        last = self.of(request_id)[-1]
        assert isinstance(last, SequenceFailed), last
        return last

    def reason(self, request_id: str) -> FinishReason:
        return self.finished(request_id).reason

    @property
    def used_tokens(self) -> int:
        return self.engine.kv.total_tokens - self.engine.kv.free_tokens


def greedy(max_tokens: int = 8, **changes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "seed": 0, "temperature": 0.0, **changes})  # type: ignore[arg-type]


def drawn(max_tokens: int = 8, **changes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "seed": 7, "temperature": 0.8, **changes})  # type: ignore[arg-type]


def request_of(
    request_id: str, prompt: Iterable[int], sampling: SamplingParams | None = None, **changes: object
) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(request_id),
        prompt_token_ids=tuple(prompt),
        sampling=sampling or greedy(ignore_eos=True),
        **changes,  # type: ignore[arg-type]
    )
