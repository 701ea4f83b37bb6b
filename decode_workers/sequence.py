"""A sequence: one request's decode state, and the invariant that every step keeps.

`tokens` is the prompt and everything emitted. KV of `tokens[:committed]` is in the pool; the rest is
pending and runs as rows. Between steps a decoding sequence has exactly one pending token, the
last one, which is the first row of its next step.

    queued -> awaiting_handoff -> running -> finished
        \\--------------------------^
"""

from enum import StrEnum

from cluster.ids import ChainHash, HandoffId
from cluster.messages import GenerateRequest, TargetingResult, Usage
from cluster.timeline import Timeline
from decode_workers.completion import Completion
from decode_workers.drafting.draft_state import DraftState
from decode_workers.kv_pool import Reservation
from decode_workers.targeting.chosen_items import ChosenItems
from decode_workers.targeting.search import TargetingSearch
from megakernel.head import MAX_TOP_K


class SequenceState(StrEnum):
    QUEUED = "queued"
    AWAITING_HANDOFF = "awaiting_handoff"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Mutable; owned by the engine's thread."""

    __slots__ = (
        "arrival",
        "committed",
        "completion",
        "drafts",
        "handoff_id",
        "is_prompt_published",
        "items",
        "kv_tokens",
        "last_grant",
        "num_prompt",
        "num_top",
        "reads_logits",
        "request",
        "reservation",
        "salt",
        "search",
        "state",
        "timeline",
        "tokens",
    )

    def __init__(
        self,
        request: GenerateRequest,
        completion: Completion,
        salt: ChainHash,
        kv_tokens: int,
        arrival: int,
        search: TargetingSearch | None = None,
        items: ChosenItems | None = None,
    ) -> None:
        self.request = request
        self.completion = completion
        self.salt = salt
        self.kv_tokens = kv_tokens
        """KV slots that the whole sequence needs."""
        self.arrival = arrival
        """Order of submission: the older goes first where all else is equal."""
        self.num_prompt = len(request.prompt_token_ids)
        sampling = request.sampling
        self.num_top = sampling.num_logprobs
        """Likeliest tokens to tell beside each; None: no logprobs at all."""
        self.reads_logits = sampling.temperature > 0 or (self.num_top or 0) > MAX_TOP_K
        """Whether its tokens are judged from whole logits rows; else from reductions of them."""
        self.tokens: list[int] = [*request.prompt_token_ids, *request.emitted_token_ids]
        self.committed = 0
        self.search = search
        """Set: it emits nothing, and searches `items` once its prompt is computed."""
        self.items = items
        self.state = SequenceState.QUEUED
        self.reservation: Reservation | None = None
        self.handoff_id: HandoffId | None = request.handoff_id
        self.last_grant = 0
        """Number of its last grant of rows, counted over all sequences; 0: none yet."""
        self.is_prompt_published = False
        self.drafts: DraftState | None = None
        """A drafter's own; None: it has not seen the sequence."""
        self.timeline = Timeline()

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.committed

    @property
    def is_searching(self) -> bool:
        """Whether the rows of its next step are its search's."""
        return self.search is not None and self.committed == len(self.tokens)

    @property
    def next_index(self) -> int:
        """Completion index of the next token to be sampled."""
        return len(self.tokens) - self.num_prompt

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was here on admission."""
        return min(self.reservation.cached_tokens, self.num_prompt) if self.reservation else 0

    @property
    def uncomputed_prompt_tokens(self) -> int:
        return max(0, self.num_prompt - self.committed)

    def found_items(self) -> TargetingResult | None:
        """The best so far of a targeting request."""
        if self.search is None or self.items is None:
            return None
        return self.items.result(self.search)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=len(self.tokens) - self.num_prompt,
            cached_tokens=self.cached_tokens,
        )
