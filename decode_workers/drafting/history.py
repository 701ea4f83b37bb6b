"""What a campaign's requests have said: a bounded, ageing memory of each tenant's outputs.

| memory                         | bound                         | what goes when it is reached           |
|--------------------------------|-------------------------------|----------------------------------------|
| one campaign's two generations | half of a tenant's bound each | the older; the younger takes its place |
| a tenant's campaigns           | `max_nodes_per_tenant`        | its least recently used campaign       |
| all tenants'                   | `max_nodes`                   | that of the least recently used tenant |

An older generation's counts weigh half: text that no longer occurs fades, then goes, and nothing is ever
scanned. Tenants come first in every key: no tenant's text is ever proposed to another.
"""

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from operator import itemgetter

from cluster.messages import Record
from decode_workers.drafting.place import Guess
from decode_workers.drafting.suffix_trie import ROOT, START, SuffixTrie

DEPTH = 8
"""Tokens of the longest run: contexts of up to 7."""
SHORTEST = 2
"""Tokens that must match."""
MOST_GUESSES = 4
LEAST_SHARE = 0.05
OLD_WEIGHT = 0.5
UNSEEN = 1.0
"""What never followed a run counts as if it had this often: what followed once is no certainty."""
CAMPAIGN_NODES = 16
"""What a campaign costs beside its nodes, counted as nodes: many empty ones are bounded too."""
LEAST_NODES = CAMPAIGN_NODES + 4 * DEPTH
_NOTHING = SuffixTrie(DEPTH)
"""Of a campaign without an older generation; never appended to."""


class Generations(Record, frozen=True, gc=False):
    """What a campaign knows; `young` grows."""

    young: SuffixTrie
    old: SuffixTrie

    @property
    def num_nodes(self) -> int:
        return CAMPAIGN_NODES + self.young.num_nodes + self.old.num_nodes


class HistoryPlace(Record, frozen=True, gc=False):
    """A run in one generation or in both; ROOT where a generation does not know it."""

    known: Generations
    young_node: int
    old_node: int
    length: int

    def guesses(self) -> list[Guess]:
        young, old = self.known.young, self.known.old
        weights: dict[int, float] = {}
        total = UNSEEN
        if self.young_node != ROOT:
            total += young.counts[self.young_node]
            for child in young.children(self.young_node):
                weights[young.tokens[child]] = young.counts[child]
        if self.old_node != ROOT:
            total += OLD_WEIGHT * old.counts[self.old_node]
            for child in old.children(self.old_node):
                token = old.tokens[child]
                weights[token] = weights.get(token, 0.0) + OLD_WEIGHT * old.counts[child]
        best = sorted(weights.items(), key=itemgetter(1), reverse=True)[:MOST_GUESSES]
        least = LEAST_SHARE * total
        return [Guess(token, weight / total, self._after(token)) for token, weight in best if weight >= least]

    def _after(self, token: int) -> "HistoryPlace":
        young, old = self.known.young, self.known.old
        return _longer(
            self.known,
            young.follow(self.young_node, token),
            old.follow(self.old_node, token),
            self.length + 1,
        )


class HistoryWriter:
    """One text's end in its campaign's younger generation."""

    __slots__ = ("ends", "trie")

    def __init__(self) -> None:
        self.trie: SuffixTrie | None = None
        self.ends: SequenceOf[int] = START


class History:
    """Shared by a worker's requests; owned by the engine's thread. Lost without harm."""

    def __init__(self, max_nodes: int, max_nodes_per_tenant: int) -> None:
        """Nodes take about 130 bytes each. Both bounds are at least LEAST_NODES."""
        self.max_nodes = max_nodes
        self.max_nodes_per_tenant = min(max_nodes, max_nodes_per_tenant)
        assert self.max_nodes_per_tenant >= LEAST_NODES, "a bound that no text fits"
        self._tenants: OrderedDict[str, OrderedDict[str, Generations]] = OrderedDict()
        """Least recently written first, campaigns of a tenant too."""
        self._nodes_of: dict[str, int] = {}
        self.num_nodes = 0

    def tenant_nodes(self, tenant: str) -> int:
        return self._nodes_of.get(tenant, 0)

    def append(self, tenant: str, campaign: str, writer: HistoryWriter, token: int) -> None:
        """Count the next token of the writer's text."""
        known = self._room_for(tenant, campaign)
        trie = known.young
        if writer.trie is not trie:
            # The first token, or what it was in has aged or gone.
            writer.trie, writer.ends = trie, START
        before = trie.num_nodes
        writer.ends = trie.append(writer.ends, token)
        self._count(tenant, trie.num_nodes - before)

    def find(
        self, tenant: str, campaign: str, tokens: SequenceOf[int], writer: HistoryWriter | None = None
    ) -> HistoryPlace | None:
        """Where the longest run that `tokens` ends with has gone on before; `writer`: wrote them here."""
        campaigns = self._tenants.get(tenant)
        known = None if campaigns is None else campaigns.get(campaign)
        if known is None:
            return None
        young, old = known.young, known.old
        if writer is not None and writer.trie is young:
            young_node = young.longest(writer.ends)
        else:
            young_node = young.find(tokens)
        place = _longer(known, young_node, old.find(tokens) if old.num_nodes else ROOT, 0)
        return place if place.length >= SHORTEST else None

    def _room_for(self, tenant: str, campaign: str) -> Generations:
        """The campaign's memory, with room for one more token's runs."""
        campaigns = self._tenants.get(tenant)
        if campaigns is None:
            campaigns = self._tenants[tenant] = OrderedDict()
        self._tenants.move_to_end(tenant)
        known = campaigns.get(campaign)
        if known is None:
            known = Generations(SuffixTrie(DEPTH), _NOTHING)
            campaigns[campaign] = known
            self._count(tenant, CAMPAIGN_NODES)
        elif known.young.num_nodes + DEPTH > (self.max_nodes_per_tenant - CAMPAIGN_NODES) // 2:
            self._count(tenant, -known.old.num_nodes)
            known = Generations(SuffixTrie(DEPTH), known.young)
            campaigns[campaign] = known
        campaigns.move_to_end(campaign)
        while self.tenant_nodes(tenant) + DEPTH > self.max_nodes_per_tenant and len(campaigns) > 1:
            self._forget_oldest(tenant)
        while self.num_nodes + DEPTH > self.max_nodes and (len(self._tenants) > 1 or len(campaigns) > 1):
            self._forget_oldest(next(iter(self._tenants)))
        return known

    def _forget_oldest(self, tenant: str) -> None:
        campaigns = self._tenants[tenant]
        _, known = campaigns.popitem(last=False)
        self._count(tenant, -known.num_nodes)
        if not campaigns:
            del self._tenants[tenant], self._nodes_of[tenant]

    def _count(self, tenant: str, change: int) -> None:
        self.num_nodes += change
        self._nodes_of[tenant] = self._nodes_of.get(tenant, 0) + change


def _longer(known: Generations, young_node: int, old_node: int, length: int) -> HistoryPlace:
    """Of both generations those that know the longer run; `length` where more is known to match."""
    young_depth, old_depth = known.young.depths[young_node], known.old.depths[old_node]
    return HistoryPlace(
        known,
        young_node if young_depth >= old_depth else ROOT,
        old_node if old_depth >= young_depth else ROOT,
        max(length, young_depth, old_depth),
    )
