"""What a CUDA step's kernel is told of its rows, and which steps are refused."""

import msgspec
import numpy as np
import pytest

from megakernel.cuda_rows import Limits, read_rows
from megakernel.step import StepError
from megakernel.vm_state import NO_PARENT
from tests.megakernel.native_steps import BLOCK, Group, chain, int32, rows_of, slot_of

LIMITS = Limits(
    max_rows=16,
    vocab_size=170,
    max_context_tokens=100,
    block_size_tokens=BLOCK,
    num_blocks=12,
    stats_span=32,
)
TREE = [NO_PARENT, 0, 0, NO_PARENT, 1, 4]
TABLE = [3, 7, 1]


def two_groups(**options):
    """A tree of six rows after 20 tokens, and one row at the start."""
    return rows_of(
        Group(tokens=[5, 6, 7, 8, 9, 10], parents=TREE, context=20, table=TABLE),
        Group(tokens=[11], parents=[NO_PARENT], context=0, table=[2]),
        **options,
    )


def changed(rows, **changes):
    return msgspec.structs.replace(rows, **changes)


def edited(rows, name, index, value):
    array = getattr(rows, name).copy()
    array[index] = value
    return changed(rows, **{name: array})


def test_rows_know_their_sequence():
    tables = read_rows(two_groups(), LIMITS).tables
    assert tables.table_rows.tolist() == [0] * 6 + [1]
    assert tables.context_lengths.tolist() == [20] * 6 + [0]


def test_paths_are_ancestors_first_itself_last():
    tables = read_rows(two_groups(), LIMITS).tables
    paths = np.split(tables.path_slots, tables.path_starts[1:-1])
    ancestors = [[0], [0, 1], [0, 2], [3], [0, 1, 4], [0, 1, 4, 5], [6]]
    assert [path.tolist() for path in paths] == [tables.slots[rows].tolist() for rows in ancestors]


def test_rows_without_ancestors_are_their_own_paths():
    groups = [Group(tokens=[1], parents=[NO_PARENT], context=3, table=[block]) for block in range(4)]
    tables = read_rows(rows_of(*groups), LIMITS).tables
    assert tables.path_starts.tolist() == [0, 1, 2, 3, 4]
    assert tables.path_slots.tolist() == tables.slots.tolist()


def with_held(rows, *held):
    """`held` are slots, by row."""
    return changed(
        rows,
        held_starts=int32(np.cumsum([0, *map(len, held)])),
        held_slots=int32([slot for slots in held for slot in slots]),
    )


def held_groups():
    """`two_groups`, its first root two tokens behind the context, its second one, and the last row none."""
    rows = changed(two_groups(), positions=int32([22, 23, 23, 21, 24, 25, 0]))
    return with_held(rows, [190, 2], [], [], [190], [], [], [])


def test_held_ancestors_come_before_those_of_the_step():
    tables = read_rows(held_groups(), LIMITS).tables
    paths = np.split(tables.path_slots, tables.path_starts[1:-1])
    own, two, one = tables.slots, [190, 2], [190]
    of_step = [[0], [0, 1], [0, 2], [3], [0, 1, 4], [0, 1, 4, 5], [6]]
    held = [two, two, two, one, two, two, []]
    assert [path.tolist() for path in paths] == [
        before + own[rows].tolist() for before, rows in zip(held, of_step, strict=True)
    ]


def test_branches_of_one_row_each_have_their_held_ancestors():
    rows = rows_of(Group(tokens=[1] * 3, parents=[NO_PARENT] * 3, context=20, table=TABLE))
    rows = with_held(changed(rows, positions=int32([22, 20, 21])), [9, 8], [], [9])
    tables = read_rows(rows, LIMITS).tables
    own = tables.slots.tolist()
    assert tables.path_starts.tolist() == [0, 3, 4, 6]
    assert tables.path_slots.tolist() == [9, 8, own[0], own[1], 9, own[2]]


def test_a_held_path_may_be_longer_than_a_step_has_rows():
    rows = rows_of(Group(tokens=[1], parents=[NO_PARENT], context=0, table=[0]))
    tables = read_rows(with_held(changed(rows, positions=int32([40])), range(50, 90)), LIMITS).tables
    assert tables.path_slots.tolist() == [*range(50, 90), 0]


def test_block_tables_are_as_wide_as_contexts_need():
    asked = read_rows(two_groups(), LIMITS)
    assert asked.max_blocks == 2
    assert asked.tables.block_tables.tolist() == [[3, 7], [2, -1]]
    assert asked.tables.block_tables.flags.c_contiguous


def spans(asked) -> list[int]:
    bits = np.unpackbits(asked.tables.needed_spans.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def test_a_row_that_asks_nothing_needs_no_span():
    asked = read_rows(two_groups(needs_logits=[False] * 7), LIMITS)
    assert asked.tables.row_flags.tolist() == [0] * 7
    assert spans(asked) == []
    assert len(asked.logit_rows) == len(asked.full_rows) == len(asked.reduced_rows) == 0


def test_whole_logits_need_every_span():
    asked = read_rows(two_groups(needs_logits=[False] * 6 + [True]), LIMITS)
    assert asked.tables.row_flags.tolist() == [0] * 6 + [1]
    assert spans(asked) == list(range(6))
    assert asked.logit_rows.tolist() == asked.full_rows.tolist() == [6]


def test_restricted_rows_need_the_spans_of_their_tokens():
    rows = changed(
        two_groups(needs_logits=[False, True, False, True, False, False, False]),
        allowed_starts=int32([0, 2, 5]),
        allowed_token_ids=int32([0, 31, 3, 64, 169]),
    )
    asked = read_rows(rows, LIMITS)
    assert asked.tables.row_flags.tolist() == [0, 4, 0, 4, 0, 0, 0]
    assert asked.tables.allowed_starts.tolist() == [0, 0, 2, 2, 5, 5, 5, 5]
    assert spans(asked) == [0, 2, 5]
    assert asked.num_allowed == 5
    assert len(asked.logit_rows) == len(asked.full_rows) == 0


def test_a_reduced_row_with_allowed_tokens_is_whole_but_not_handed_out():
    rows = changed(
        two_groups(needs_logits=[True] * 2 + [False] * 5),
        needs_best=np.array([False, True, True, False, False, False, False]),
        allowed_starts=int32([0, 0, 1, 2]),
        allowed_token_ids=int32([8, 9]),
        top_k=3,
    )
    asked = read_rows(rows, LIMITS)
    assert asked.tables.row_flags.tolist() == [1, 2, 2, 0, 0, 0, 0]
    assert asked.logit_rows.tolist() == [0]
    assert asked.full_rows.tolist() == [0, 1, 2]
    assert asked.reduced_rows.tolist() == [1, 2]
    assert spans(asked) == list(range(6))


def test_all_tables_are_contiguous_words():
    tables = read_rows(two_groups(), LIMITS).tables
    for name in tables.__struct_fields__:
        array = getattr(tables, name)
        assert array.itemsize == 4, name
        assert array.flags.c_contiguous, name


REFUSED = {
    "no rows": (
        lambda rows: rows_of(
            *[Group(tokens=[1], parents=[-1], context=0, table=[i % 12]) for i in range(17)]
        ),
        "a step has 1 to 16 rows, not 17",
    ),
    "starts": (
        lambda rows: changed(rows, sequence_starts=int32([0, 6, 6])),
        "sequence starts do not cover the 7 rows",
    ),
    "empty sequence": (
        lambda rows: changed(rows, sequence_starts=int32([0, 0, 7])),
        "sequence 0 has no rows",
    ),
    "long context": (
        lambda rows: edited(rows, "context_lengths", 0, 49),
        "sequence 0: 49 committed tokens do not fit its block table of 3 blocks",
    ),
    "negative context": (lambda rows: edited(rows, "context_lengths", 1, -1), "sequence 1: -1 committed"),
    "no block": (
        lambda rows: edited(rows, "block_tables", (0, 1), -1),
        "sequence 0: block table entry 1 is -1; the pool has 12 blocks",
    ),
    "block past the pool": (lambda rows: edited(rows, "block_tables", (0, 0), 12), "entry 0 is 12"),
    "token": (
        lambda rows: edited(rows, "token_ids", 2, 170),
        "row 2: token 170 is not in a vocabulary of 170",
    ),
    "slot": (lambda rows: edited(rows, "slots", 1, 192), "row 1: slot 192 is not in a pool of 192"),
    "position before the context": (
        lambda rows: edited(rows, "positions", 0, 19),
        r"row 0: position 19 is not in \[20, 100\)",
    ),
    "position past the model": (lambda rows: edited(rows, "positions", 6, 100), "row 6: position 100"),
    "too few ancestors": (
        lambda rows: edited(rows, "positions", 1, 22),
        "row 1: its position is 22, but it has not 2 ancestors",
    ),
    "too many ancestors": (
        lambda rows: edited(rows, "positions", 4, 21),
        "row 4: it has more than 1 ancestors",
    ),
    "parent after": (lambda rows: edited(rows, "parents", 1, 1), "row 1: its parent 1 is not before it"),
    "parent in another sequence": (
        lambda rows: edited(edited(rows, "parents", 6, 5), "positions", 6, 1),
        "row 6: its position is 1, but it has not 1 ancestors",
    ),
    "parent below none": (lambda rows: edited(rows, "parents", 1, -2), "row 1: its position is 21"),
    "few held starts": (
        lambda rows: changed(rows, held_starts=int32([0, 0]), held_slots=int32([])),
        "2 held_starts: one a row, and one, are 8",
    ),
    "held end": (
        lambda rows: changed(rows, held_starts=int32([0] * 8), held_slots=int32([5])),
        "held_starts end at 0 of 1 held slots",
    ),
    "held begin": (
        lambda rows: changed(rows, held_starts=int32([1] * 8), held_slots=int32([5])),
        "held_starts begin at 1",
    ),
    "falling held starts": (
        lambda rows: changed(rows, held_starts=int32([0, 2, 1, *[2] * 5]), held_slots=int32([5, 6])),
        r"row 1: its held slots are \[2, 1\)",
    ),
    "held slot": (
        lambda rows: with_held(rows, [], [], [], [191, 192], [], [], []),
        "row 3: held slot 192 is not in a pool of 192",
    ),
    "held by a child": (
        lambda rows: with_held(rows, [], [], [7], [], [], [], []),
        "row 2: its parent is row 0, so it has no held slots of its own",
    ),
    "held, and too near": (
        lambda rows: with_held(rows, [], [], [], [7], [], [], []),
        "row 3: it has more than 0 ancestors",
    ),
    "held, and too far": (
        lambda rows: edited(with_held(rows, [], [], [], [7], [], [], []), "positions", 3, 22),
        "row 3: its position is 22, but it has not 2 ancestors",
    ),
    "top k": (lambda rows: changed(rows, top_k=65), "top_k is 65; it is at most 64"),
    "few starts": (
        lambda rows: changed(rows, allowed_starts=int32([0, 1]), allowed_token_ids=int32([1])),
        "2 allowed_starts: one a row that needs logits, and one",
    ),
    "end": (
        lambda rows: changed(rows, allowed_starts=int32([0] * 7 + [2]), allowed_token_ids=int32([1])),
        "allowed_starts end at 2 of 1 allowed tokens",
    ),
    "begin": (
        lambda rows: changed(rows, allowed_starts=int32([1] * 8), allowed_token_ids=int32([1])),
        "allowed_starts begin at 1",
    ),
    "falling starts": (
        lambda rows: changed(
            rows, allowed_starts=int32([0, 2, 1, 2, 2, 2, 2, 2]), allowed_token_ids=int32([1, 2])
        ),
        r"row 1: its allowed tokens are \[2, 1\)",
    ),
    "twice the same": (
        lambda rows: changed(
            rows, allowed_starts=int32([0, 1] + [3] * 6), allowed_token_ids=int32([9, 4, 4])
        ),
        "row 1: allowed token 4 after 4, in a vocabulary of 170",
    ),
    "outside the vocabulary": (
        lambda rows: changed(rows, allowed_starts=int32([0, 1, *[2] * 6]), allowed_token_ids=int32([9, 170])),
        "row 1: allowed token 170 after -1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_be_are_refused(case):
    change, message = REFUSED[case]
    read_rows(two_groups(), LIMITS)
    with pytest.raises(StepError, match=message):
        read_rows(change(two_groups()), LIMITS)


def test_a_long_chain_has_a_long_path():
    rows = rows_of(Group(tokens=[1] * 16, parents=chain(16), context=40, table=[0, 1, 2, 3]))
    tables = read_rows(rows, LIMITS).tables
    assert tables.path_starts.tolist() == [length * (length + 1) // 2 for length in range(17)]
    assert tables.path_slots[-16:].tolist() == [slot_of([0, 1, 2, 3], at) for at in range(40, 56)]
