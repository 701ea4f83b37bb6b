"""The drafter that serves: guesses of all sources, measured against what came, within the step's budget.

A function of the requests and the tokens that it saw, in their order, and of which phrases were open: no
clock, no chance. It changes how fast tokens come, never which.
"""

from collections.abc import Sequence as SequenceOf

from cluster.messages import GenerateRequest
from cluster.placement.predict import StepTable
from decode_workers.draft_tree import NO_DRAFT, DraftTree
from decode_workers.drafting.budget import StepCosts, spend
from decode_workers.drafting.draft_state import DraftState
from decode_workers.drafting.growth import Found, TreeGrowth
from decode_workers.drafting.history import DEPTH, History, HistoryPlace
from decode_workers.drafting.phrase_files import PhraseFiles
from decode_workers.drafting.phrases import PhrasePlace
from decode_workers.drafting.place import Source
from decode_workers.drafting.rates import RateBook, Rates
from decode_workers.scheduler import RowGrant
from decode_workers.sequence import Sequence


class Speculator:
    """`Drafter` of one engine; owned by its thread."""

    def __init__(self, history: History, phrases: PhraseFiles | None = None) -> None:
        """Without `phrases` requests that name some are drafted from the other sources."""
        self._history = history
        self._phrases = phrases
        self._rates = RateBook()
        self._table: StepTable | None = None
        self._costs = StepCosts(None)

    def expect(self, request: GenerateRequest) -> None:
        if self._phrases is not None and request.phrases is not None and request.speculate:
            self._phrases.want(request.phrases, request.tenant)

    def draft(
        self, grants: SequenceOf[RowGrant], spare_rows: int, table: StepTable | None
    ) -> SequenceOf[DraftTree]:
        growths: list[TreeGrowth] = []
        places: list[int] = []
        num_sampled = num_rows = 0
        for at, grant in enumerate(grants):
            num_rows += grant.num_rows
            num_sampled += grant.is_sampled
            if grant.max_draft_nodes and grant.sequence.request.speculate:
                growth = self._growth(grant)
                if growth is not None:
                    growths.append(growth)
                    places.append(at)
        trees = [NO_DRAFT] * len(grants)
        if growths:
            if table is not self._table:
                self._table, self._costs = table, StepCosts(table)
            grown = spend(growths, num_sampled, num_rows, spare_rows, self._costs)
            for at, tree in zip(places, grown, strict=True):
                trees[at] = tree
        return trees

    def learn(self, sequence: Sequence) -> None:
        """Compare its new tokens with what was foreseen, and remember them."""
        request, tokens = sequence.request, sequence.tokens
        if not request.speculate:
            return
        state = self._state(sequence)
        rates = self._rates.of(request.tenant, request.campaign)
        for at in range(state.num_learned, len(tokens)):
            token = tokens[at]
            if state.expected:
                _compare(state, token, rates)
            self._history.append(request.tenant, request.campaign, state.writer, token)
        state.num_learned = len(tokens)
        state.expected = ()

    def _growth(self, grant: RowGrant) -> TreeGrowth | None:
        """None where no source has anything to say."""
        sequence = grant.sequence
        request, state = sequence.request, self._state(sequence)
        found = self._find(sequence, state)
        state.expected = found
        if not found:
            return None
        return TreeGrowth(
            found,
            self._rates.of(request.tenant, request.campaign),
            max_nodes=grant.max_draft_nodes,
            max_depth=sequence.completion.num_left - 1,
            barred=sequence.completion.stop_token_ids,
        )

    def _find(self, sequence: Sequence, state: DraftState) -> list[Found]:
        request, tokens, streaks = sequence.request, sequence.tokens, state.streaks
        found: list[Found] = []
        state.ngrams.catch_up(tokens)
        match = state.ngrams.find(tokens)
        if match is not None:
            found.append(Found(Source.NGRAM, match))
        known = self._history.find(request.tenant, request.campaign, tokens, state.writer)
        if known is not None:
            length = known.length + streaks[Source.HISTORY]
            place = HistoryPlace(known.known, known.young_node, known.old_node, length)
            found.append(Found(Source.HISTORY, place))
        found += [Found(Source.PHRASES, place) for place in self._find_phrases(sequence, state)]
        return found

    def _find_phrases(self, sequence: Sequence, state: DraftState) -> SequenceOf[PhrasePlace]:
        ref = sequence.request.phrases
        if self._phrases is None or ref is None:
            return ()
        phrases = self._phrases.find(ref)
        if phrases is None:
            return ()
        return state.phrases.find(phrases, self._phrases.bare_words, sequence.tokens)

    def _state(self, sequence: Sequence) -> DraftState:
        state = sequence.drafts
        if state is None:
            request = sequence.request
            num_known = sequence.num_prompt + len(request.emitted_token_ids)
            state = sequence.drafts = DraftState(num_known)
            # How outputs begin is learned too: behind the end of their prompts.
            for token in sequence.tokens[max(0, num_known - DEPTH + 1) : num_known]:
                self._history.append(request.tenant, request.campaign, state.writer, token)
        return state


def _compare(state: DraftState, token: int, rates: Rates) -> None:
    """Measure each source's guesses by the token that came; those that were right stay."""
    right: list[Found] = []
    for one in state.expected:
        source, place = one.source, one.place
        guesses = place.guesses()
        if not guesses:
            continue
        hit = next((guess for guess in guesses if guess.token_id == token), None)
        rates.observe(source, place.length, sum(guess.share for guess in guesses), is_right=hit is not None)
        if hit is None:
            state.streaks[source] = 0
        else:
            state.streaks[source] += 1
            right.append(Found(source, hit.place))
    state.expected = right
