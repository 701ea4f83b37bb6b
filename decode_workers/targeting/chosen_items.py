"""What a targeting request chooses from: an opened catalogue and the items of it that pass the filter."""

from cluster.catalogue.file import Catalogue, Passing
from cluster.messages import Record, ScoredItem, TargetingResult
from decode_workers.targeting.search import TargetingSearch


class ChosenItems(Record, frozen=True, kw_only=True, eq=False):
    catalogue: Catalogue
    passing: Passing | None
    """What the filter leaves; None: all."""
    level_widths: tuple[int, ...]
    """Inner nodes of the trie's levels below the root."""

    def slots_needed(self, beams: int) -> int:
        """KV slots with which a search never waits for one: see `targeting.wanted.slots_needed`."""
        return sum(min(beams, width) for width in self.level_widths)

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
            decoding="none" if search.num_steps == 0 else "parallel" if search.went_parallel else "stepwise",
            num_steps=search.num_steps,
            num_rows=search.num_rows,
            num_verified_items=search.num_verified_items,
        )
