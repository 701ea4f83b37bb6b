"""What a targeting request chooses from: an opened catalogue and the items of it that pass the filter."""

from cluster.catalogue.file import Catalogue
from cluster.messages import Record, ScoredItem, TargetingParams, TargetingResult
from decode_workers.targeting.search import TargetingSearch
from decode_workers.targeting.slots import level_widths
from decode_workers.targeting.wanted import WantedTrie


class ChosenItems(Record, frozen=True, kw_only=True, eq=False):
    """Searches may share one: of a catalogue, a filter and a scoring."""

    catalogue: Catalogue
    wanted: WantedTrie
    level_widths: tuple[int, ...]
    """Inner nodes of the trie's levels below the root."""

    def result(self, search: TargetingSearch) -> TargetingResult:
        """What was found by now."""
        found = search.result()
        catalogue = self.catalogue
        return TargetingResult(
            items=tuple(
                ScoredItem(
                    rank=place + 1,
                    item_id=catalogue.item_id(item),
                    text=catalogue.text(item),
                    logprob=logprob,
                    bid=catalogue.bid(item),
                )
                for place, (item, logprob) in enumerate(
                    zip(found.items.tolist(), found.logprobs.tolist(), strict=True)
                )
            ),
            is_complete=found.is_complete,
            decoding=search.decoding,
            num_steps=search.num_steps,
            num_rows=search.num_rows,
            num_verified_items=search.num_verified_items,
        )


def choose_items(
    catalogue: Catalogue, params: TargetingParams, widths: tuple[int, ...] | None = None
) -> ChosenItems:
    """Looks at every item where there is a filter, at every node where `widths` are not known.

    Raises ConditionError.
    """
    mask = catalogue.passing(params.where).mask if params.where else None
    return ChosenItems(
        catalogue=catalogue,
        wanted=WantedTrie(catalogue.trie, mask, is_renormalised=params.scoring == "catalogue"),
        level_widths=level_widths(catalogue.trie) if widths is None else widths,
    )
