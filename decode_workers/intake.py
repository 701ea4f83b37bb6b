"""From a request to a sequence that can be queued, or to the reason why it never can."""

from functools import lru_cache

from cluster.block_hash import chain_salt
from cluster.catalogue.trie import ROOT
from cluster.ids import ChainHash
from cluster.messages import GenerateRequest
from cluster.placement.predict import StepTable
from cluster.text import Tokenizer
from cluster.timeline import Stage
from decode_workers.completion import Completion
from decode_workers.kv_pool import MAX_SEARCH_SLOTS
from decode_workers.request_check import RequestLimits, completion_limit, find_fault, kv_tokens_needed
from decode_workers.sequence import Sequence
from decode_workers.targeting.chosen_items import ChosenItems
from decode_workers.targeting.search import TargetingSearch
from decode_workers.targeting.slots import slots_needed

MAX_TENANTS_REMEMBERED = 1024
SPARE_SLOTS = 128
"""Of a search, for rows of a parallel step and what they leave behind: two of the largest steps."""


class InvalidRequestError(ValueError):
    """A request that no retry makes servable. The roster tells its router."""


class Intake:
    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
        limits: RequestLimits,
        layout_fingerprint: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._limits = limits
        self._layout_fingerprint = layout_fingerprint
        self.step_table: StepTable | None = None
        """What searches predict by; None: they go token by token."""
        self._salt_of = lru_cache(maxsize=MAX_TENANTS_REMEMBERED)(self._new_salt)

    def accept(self, request: GenerateRequest, arrival: int, items: ChosenItems | None = None) -> Sequence:
        """A sequence that knows its tokens so far; it has ended already where a replay had reached its end.

        `items`: what a targeting request chooses from. Raises InvalidRequestError.
        """
        fault = find_fault(request, self._limits)
        if fault is not None:
            raise InvalidRequestError(fault)
        completion = Completion(
            self._tokenizer, request.sampling, self._eos_token_ids, completion_limit(request, self._limits)
        )
        for token_id in request.emitted_token_ids:
            # A client has these already: they bring detokenizer and stop strings to where they were.
            if completion.finish_reason is not None:
                raise InvalidRequestError("emitted_token_ids go on after the token that ends the completion")
            completion.push(token_id)
        search = None if items is None else self._new_search(request, items)
        sequence = Sequence(
            request,
            completion,
            salt=self._salt_of(request.tenant),
            kv_tokens=(
                kv_tokens_needed(request, self._limits)
                if search is None
                else len(request.prompt_token_ids) + search.capacity_slots
            ),
            arrival=arrival,
            search=search,
            items=items,
        )
        sequence.timeline.stamp(Stage.DECODE_RECEIVED)
        return sequence

    def _new_search(self, request: GenerateRequest, items: ChosenItems) -> TargetingSearch:
        assert request.targeting is not None, "items for a request that wants none"
        num_prompt, height = len(request.prompt_token_ids), int(items.catalogue.trie.height[ROOT])
        if num_prompt + height > self._limits.max_context_tokens:
            raise InvalidRequestError(
                f"prompt of {num_prompt} tokens: at most {self._limits.max_context_tokens - height} before "
                f"items of {height - 1} tokens"
            )
        if items.catalogue.header.vocab_size > self._limits.vocab_size:
            raise InvalidRequestError(
                f"catalogue {request.targeting.catalogue.name} was compiled for a vocabulary of "
                f"{items.catalogue.header.vocab_size} tokens, this model has {self._limits.vocab_size}"
            )
        beams = request.targeting.beams
        fewest = slots_needed(items.level_widths, beams, 0)
        room = self._limits.kv_pool_tokens - num_prompt
        if fewest > room:
            raise InvalidRequestError(
                f"prompt of {num_prompt} tokens and {beams} beams need {num_prompt + fewest} KV slots: the "
                f"pool has {self._limits.kv_pool_tokens}"
            )
        num_slots = min(fewest + SPARE_SLOTS, room, MAX_SEARCH_SLOTS)
        return TargetingSearch(items.wanted, request.targeting, self.step_table, num_slots)

    def _new_salt(self, tenant: str) -> ChainHash:
        return chain_salt(self._layout_fingerprint, tenant)
