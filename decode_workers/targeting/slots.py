"""How many slots of KV a search is given."""

from cluster.catalogue.trie import Trie


def level_widths(trie: Trie) -> tuple[int, ...]:
    """Inner nodes of each level below the root. Reads all nodes: once a catalogue, not once a request."""
    widths: list[int] = []
    start, end = (int(bound) for bound in trie.first_child[:2])
    while start < end:
        widths.append(int((trie.leaf_item[start:end] < 0).sum()))
        start, end = int(trie.first_child[start]), int(trie.first_child[end])
    return tuple(widths)


def slots_needed(widths: tuple[int, ...], beams: int, max_rows: int) -> int:
    """Slots with which no search of `beams` ever waits for one, in steps of at most `max_rows` rows; `widths`
    are `level_widths`.

    Stepwise, each level has at most `beams` nodes whose KV is still wanted, the rows that run included. The
    rest lets a parallel chunk be as large as a step; `slots_needed(widths, beams, 0)` are enough to end.
    """
    return sum(min(beams, width) for width in widths) + max_rows
