"""Regions against a plain set of taken pages."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.regions import ALIGNMENT_BYTES, Regions

PAGES = 12


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5 * ALIGNMENT_BYTES)), max_size=40), st.data())
def test_no_page_has_two_owners_and_room_is_found_where_there_is_any(
    steps: list[tuple[bool, int]], data: st.DataObject
) -> None:
    regions, owned = Regions(PAGES * ALIGNMENT_BYTES - 1), dict[int, set[int]]()
    assert regions.num_bytes == PAGES * ALIGNMENT_BYTES
    for gives_back, num_bytes in steps:
        if gives_back and owned:
            start = data.draw(st.sampled_from(sorted(owned)))
            regions.give_back(start)
            del owned[start]
        taken = set().union(*owned.values())
        count = max(1, -(-num_bytes // ALIGNMENT_BYTES))
        fitting = [p for p in range(PAGES - count + 1) if not taken & set(range(p, p + count))]
        assert regions.find(num_bytes) == (fitting[0] * ALIGNMENT_BYTES if fitting else None)
        start_or_none = regions.take(num_bytes)
        assert (start_or_none is None) == (not fitting)
        if start_or_none is not None:
            first = start_or_none // ALIGNMENT_BYTES
            owned[start_or_none] = set(range(first, first + count))
        assert regions.num_taken == len(owned)
