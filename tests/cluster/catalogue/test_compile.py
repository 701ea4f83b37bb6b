"""Uploads compiled and opened again: items, tries, faults that only tokens or others show, conditions."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.catalogue import item_spool
from cluster.catalogue.faults import UploadError
from cluster.catalogue.file import Catalogue, ConditionError, UnknownAttributeError, passing_counts
from cluster.catalogue.sample import sample_briefs, sample_csv, sample_items, sample_jsonl
from cluster.messages import Condition
from tests.cluster.catalogue.support import END, catalogue, compiled, slow_trie, tokenizer


def jsonl(*items: dict[str, Any]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def tokens_of(text: str) -> list[int]:
    return tokenizer().encode(text, allow_special=False)


texts = st.lists(
    st.one_of(
        st.text(st.sampled_from("shoe red"), min_size=1, max_size=12),
        st.text(st.characters(exclude_categories=["Cs", "Lu", "Lt"]), min_size=1, max_size=8),
    ).filter(lambda text: bool(text.strip())),
    min_size=1,
    max_size=30,
    unique_by=lambda text: tuple(tokens_of(text)),
)


@given(texts=texts, bids=st.lists(st.none() | st.floats(0, 9), min_size=30, max_size=30))
@settings(deadline=None, max_examples=60)
def test_what_went_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], bids: list[float | None]
) -> None:
    folder = tmp_path_factory.mktemp("catalogue")
    items = [
        {"id": f"i{n}", "text": text, "bid": bid}
        for n, (text, bid) in enumerate(zip(texts, bids, strict=False))
    ]
    opened = catalogue(folder, jsonl(*items))
    expected = slow_trie([tokens_of(text) for text in texts], END)
    for field in opened.trie.__struct_fields__:
        assert getattr(opened.trie, field).tolist() == expected[field], field
    for index, rank in enumerate(expected["upload_rank"]):
        assert opened.text(index) == texts[rank]
        assert opened.item_id(index) == f"i{rank}"
        assert opened.bid(index) == bids[rank]
        assert opened.find(tokens_of(texts[rank])) == index
    children = {
        token: node
        for node, token in enumerate(opened.trie.token.tolist())
        if 1 <= node < expected["first_child"][1]
    }
    assert {
        token: int(opened.root_child[token]) for token in np.flatnonzero(opened.root_child >= 0)
    } == children
    assert [path.name for path in folder.iterdir()] == ["shop.catalogue"]


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    opened = catalogue(tmp_path, b"text\nred shoe\nred shoes\n", "csv")
    assert opened.find(tokens_of("red shoe")) is not None
    for tokens in ([], tokens_of("red"), tokens_of("red shoes s"), [END], [10**6], [-1], tokens_of("blue")):
        assert opened.find(tokens) is None


def test_the_header_says_what_the_file_was_made_for(tmp_path: Path) -> None:
    opened = catalogue(tmp_path, b"text,bid,brand\nred shoe,1,a\nshoe,,b\n", "csv", name="boots", version=7)
    header = opened.header
    assert (header.name, header.version, header.fingerprint, header.end_token) == (
        "boots",
        7,
        "test-model",
        END,
    )
    assert header.num_items == opened.num_items == 2
    assert header.num_nodes == opened.trie.num_nodes
    assert header.num_path_tokens == len(tokens_of("red shoe")) + len(tokens_of("shoe")) + 2
    assert opened.attributes == ("bid", "brand")


def test_equal_uploads_make_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        compiled(tmp_path / name, b"".join(sample_csv(300)), "csv")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


FAULTY = [
    ({"id": "a", "text": "red shoe"}, None),
    ({"id": "b", "text": "red shoe"}, "`text` is that of line 1, too"),
    ({"id": "a", "text": "blue shoe"}, "`id` 'a' is that of line 1, too"),
    ({"id": "c", "text": "RED shoe"}, "`text` has the same tokens as that of line 1, too"),
    ({"id": "d", "text": "x" * 65}, "`text` has 65 tokens; at most 64"),
    ({"id": "e", "text": "y" * 64}, None),
    ({"id": "f", "text": ""}, "`text` is empty"),
    ({"id": "g", "text": "green", "size": 4}, None),
    ({"id": "h", "text": "grey", "size": "4"}, "attribute 'size' is text here and a number in a line before"),
    ({"id": "8", "text": "gold"}, None),
    ({"text": "no id"}, None),
    ({"id": "11", "text": "taken"}, "`id` '11' is that of line 11, too"),
    ({"id": "i", "text": "<|end|>"}, None),
]


def test_faults_refuse_an_upload_and_are_listed_by_line(tmp_path: Path) -> None:
    with pytest.raises(UploadError) as refused:
        compiled(tmp_path / "shop", jsonl(*(item for item, _ in FAULTY)))
    expected = {line: message for line, (_, message) in enumerate(FAULTY, 1) if message}
    assert {fault.line: fault.message for fault in refused.value.faults} == expected
    assert [fault.line for fault in refused.value.faults] == sorted(expected)
    assert refused.value.num_faults == len(expected)
    assert list(tmp_path.iterdir()) == []


def test_bad_items_can_be_left_out(tmp_path: Path) -> None:
    report = compiled(tmp_path / "shop", jsonl(*(item for item, _ in FAULTY)), skip_bad=True)
    good = [item["text"] for item, message in FAULTY if message is None]
    opened = Catalogue.open(tmp_path / "shop")
    assert report.num_faults == len(FAULTY) - len(good)
    expected = slow_trie([tokens_of(str(text)) for text in good], END)
    assert opened.trie.upload_rank.tolist() == expected["upload_rank"]
    assert [opened.text(i) for i in range(opened.num_items)] == [
        good[rank] for rank in expected["upload_rank"]
    ]
    assert [opened.find(tokens_of(str(text))) is not None for text in good] == [True] * len(good)


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_an_upload_without_items_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UploadError, match="no items"):
        compiled(tmp_path / "shop", data)
    with pytest.raises(UploadError, match="nothing is left"):
        compiled(tmp_path / "shop", b"{}\n", skip_bad=True)


def test_an_attribute_of_too_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_spool, "MAX_DISTINCT_VALUES", 3)
    data = b"text,sku,price\n" + b"".join(b"item %d,s%d,%d\n" % (i, i, i) for i in range(9))
    with pytest.raises(UploadError, match="line 5: attribute 'sku' has more than 3 distinct values"):
        compiled(tmp_path / "shop", data, "csv")


def test_progress_is_told_and_may_end_it(tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    data = b"".join(sample_jsonl(10_000))
    compiled(tmp_path / "shop", data, progress=lambda *step: told.append(step))
    assert list(dict.fromkeys(phase for phase, _, _ in told)) == ["read", "sort", "write"]
    for phase in ("sort", "write"):
        steps = [(done, total) for name, done, total in told if name == phase]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]

    def cancel(phase: str, done: int, total: int | None) -> None:
        if phase == "sort":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path / "other", data, progress=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]


ROWS = random.Random(5)
ATTRIBUTED: list[dict[str, Any]] = [
    {"text": f"item {n}"}
    | {
        name: value
        for name, value in {
            "bid": ROWS.choice([None, 0.5, 1.0, 2.5]),
            "colour": ROWS.choice([None, "red", "green", "grün", "7"]),
            "price": ROWS.choice([None, 1, 2, 2.5, -3, 1e9]),
            "in_stock": ROWS.choice([None, True, False]),
        }.items()
        if value is not None
    }
    for n in range(200)
]

conditions = st.lists(
    st.one_of(
        st.builds(
            Condition,
            attribute=st.sampled_from(["colour", "in_stock"]),
            any_of=st.none()
            | st.lists(st.sampled_from(["red", "grün", "7", "true", "no"]), max_size=3).map(tuple),
        ),
        st.builds(
            Condition,
            attribute=st.sampled_from(["price", "bid"]),
            any_of=st.none()
            | st.lists(st.sampled_from(["2", "2.0", "0.5", "x", "nan"]), max_size=2).map(tuple),
            at_least=st.none() | st.sampled_from([-5.0, 1.0, 2.0]),
            at_most=st.none() | st.sampled_from([0.0, 2.0, 1e10]),
        ),
    ),
    max_size=3,
).map(tuple)


def meets(item: dict[str, Any], condition: Condition) -> bool:
    value = item.get(condition.attribute)
    if value is None:
        return False
    if isinstance(value, bool):
        value = "true" if value else "false"
    if condition.any_of is not None:
        asked = condition.any_of
        if isinstance(value, str) and value not in asked:
            return False
        if not isinstance(value, str) and value not in [float(text) for text in asked if text != "x"]:
            return False
    is_high_enough = condition.at_least is None or value >= condition.at_least
    return is_high_enough and (condition.at_most is None or value <= condition.at_most)


@pytest.fixture(scope="module", params=["jsonl", "csv"])
def attributed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    if request.param == "jsonl":
        return catalogue(tmp_path_factory.mktemp("attributed"), jsonl(*ATTRIBUTED))
    columns = ("text", "bid", "colour", "price", "in_stock")
    words: dict[Any, str] = {None: "", True: "true", False: "false"}
    lines = [
        ",".join(
            str(value) if not isinstance(value, bool | None) else words[value]
            for value in (item.get(column) for column in columns)
        )
        for item in ATTRIBUTED
    ]
    return catalogue(
        tmp_path_factory.mktemp("attributed"), "\n".join([",".join(columns), *lines]).encode(), "csv"
    )


@given(where=conditions)
@settings(deadline=None)
def test_masks_equal_brute_force(attributed: Catalogue, where: tuple[Condition, ...]) -> None:
    passing = attributed.passing(where)
    expected = [
        all(meets(ATTRIBUTED[rank], condition) for condition in where)
        for rank in attributed.trie.upload_rank.tolist()
    ]
    assert attributed.mask(where).tolist() == expected
    assert passing.num_items == sum(expected)
    trie = attributed.trie
    does_pass = passing.counts[trie.first_item + trie.num_items] > passing.counts[trie.first_item]
    for node in range(trie.num_nodes):
        first = int(trie.first_item[node])
        assert does_pass[node] == any(expected[first : first + int(trie.num_items[node])])
    assert attributed.passing(where) is passing
    assert not passing.mask.flags.writeable


def test_conditions_that_say_nothing_are_refused(attributed: Catalogue) -> None:
    with pytest.raises(UnknownAttributeError, match="no attribute `size`; it has bid, "):
        attributed.mask((Condition(attribute="size"),))
    with pytest.raises(ConditionError, match="`colour`: it is text: ask with `any_of`"):
        attributed.mask((Condition(attribute="colour", at_least=1.0),))
    with pytest.raises(ConditionError, match="not a number"):
        attributed.mask((Condition(attribute="price", at_most=float("nan")),))


def test_names_made_of_digits_stay_text(tmp_path: Path) -> None:
    opened = catalogue(tmp_path, b"text,zip,ean\na,00501,12345678901234567890\nb,10115,2\n", "csv")
    assert opened.mask((Condition(attribute="zip", any_of=("00501",)),)).tolist() == [True, False]
    assert opened.mask((Condition(attribute="ean", any_of=("12345678901234567891",)),)).tolist() == [
        False,
        False,
    ]


@given(mask=st.lists(st.booleans(), min_size=1, max_size=50))
def test_counts_are_of_the_items_before(mask: list[bool]) -> None:
    assert passing_counts(np.array(mask)).tolist() == [sum(mask[:end]) for end in range(len(mask) + 1)]


@pytest.mark.parametrize("num_items", [1, 2, 7, 1000, 60_000])
def test_samples_are_distinct_and_seeded(num_items: int) -> None:
    items = list(sample_items(num_items, seed=3))
    assert len({item.text for item in items}) == len({item.id for item in items}) == num_items
    assert items[:50] == [item for item, _ in zip(sample_items(num_items, seed=3), range(50), strict=False)]
    if num_items > 100:
        assert items[:50] != [
            item for item, _ in zip(sample_items(num_items, seed=4), range(50), strict=False)
        ]


def test_a_sample_is_the_same_upload_in_both_formats(tmp_path: Path) -> None:
    compiled(tmp_path / "csv", b"".join(sample_csv(2000)), "csv")
    compiled(tmp_path / "jsonl", b"".join(sample_jsonl(2000)), "jsonl")
    assert (tmp_path / "csv").read_bytes() == (tmp_path / "jsonl").read_bytes()
    assert sample_briefs(5, seed=1) == sample_briefs(5, seed=1)
    assert len(set(sample_briefs(50))) > 30
