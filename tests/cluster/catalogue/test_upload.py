"""Uploads parsed beside Python's csv and json, cut anywhere; what is wrong is named by line."""

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.catalogue import upload_lines
from cluster.catalogue.faults import MAX_LISTED_FAULTS, Faults, UploadCutError, UploadError
from cluster.catalogue.upload import MAX_TEXT_BYTES, Format, Item, parse_upload
from cluster.catalogue.upload_lines import MAX_RECORD_BYTES
from tests.cluster.catalogue.support import chunks_of

cuts = st.lists(st.integers(0, 10_000), max_size=12)
field_texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters='\n",; '), max_size=12
)
item_texts = field_texts.filter(lambda text: bool(text.strip()))
values = st.one_of(st.none(), st.booleans(), st.floats(-1e6, 1e6), st.integers(-9, 9), field_texts)
json_items = st.fixed_dictionaries(
    {"text": item_texts},
    optional={
        "id": item_texts,
        "bid": st.one_of(st.none(), st.floats(0, 100)),
        "brand": values,
        "größe": values,
    },
)


def parsed(
    data: bytes, upload_format: Format, at: list[int] | None = None, **options: Any
) -> tuple[list[Item], Faults]:
    faults = Faults()
    return list(parse_upload(chunks_of(data, at or []), upload_format, faults, **options)), faults


def faults_of(data: bytes, upload_format: Format, **options: Any) -> dict[int, str]:
    _, faults = parsed(data, upload_format, **options)
    return {fault.line: fault.message for fault in faults.listed()}


@given(
    items=st.lists(json_items, max_size=12),
    at=cuts,
    bom=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
)
@settings(deadline=None)
def test_json_lines_equal_pythons(
    items: list[dict[str, Any]], at: list[int], bom: bool, newline: str
) -> None:
    data = newline.join(json.dumps(item, ensure_ascii=False) for item in items).encode(
        "utf-8-sig" if bom else "utf-8"
    )
    found, faults = parsed(data, "jsonl", at)
    assert faults.count == 0
    assert [(item.text, item.item_id, item.bid) for item in found] == [
        (item["text"], item.get("id", str(line)), item.get("bid")) for line, item in enumerate(items, 1)
    ]
    for item, expected in zip(found, items, strict=True):
        attributes = {name: expected[name] for name in ("brand", "größe") if expected.get(name) is not None}
        words = {True: "true", False: "false"}
        assert item.attributes == {
            name: words[value] if isinstance(value, bool) else value for name, value in attributes.items()
        }


@given(
    rows=st.lists(st.tuples(item_texts, item_texts, field_texts, field_texts), max_size=12),
    at=cuts,
    bom=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@settings(deadline=None)
def test_csv_equals_pythons(
    rows: list[tuple[str, ...]], at: list[int], bom: bool, newline: str, quoting: Any
) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=newline, quoting=quoting)
    writer.writerows([("id", "brand", "text", "note"), *((a, b, text, c) for text, a, b, c in rows)])
    found, faults = parsed(buffer.getvalue().encode("utf-8-sig" if bom else "utf-8"), "csv", at)
    assert faults.count == 0
    assert [(item.item_id, item.text) for item in found] == [(a, text) for text, a, _, _ in rows]
    assert [item.attributes for item in found] == [
        {name: value for name, value in (("brand", b), ("note", c)) if value} for _, _, b, c in rows
    ]


def test_lines_are_those_of_the_file_where_fields_have_several() -> None:
    found, _ = parsed(b'text,bid\n"a\nb",1\n\nc,2\n"d\r\n\r\ne",3\nf,4', "csv")
    assert [(item.line, item.text, item.bid) for item in found] == [
        (2, "a\nb", 1.0),
        (5, "c", 2.0),
        (6, "d\r\n\r\ne", 3.0),
        (9, "f", 4.0),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "an array where an object"),
        ('{"name": "x"}', "no `text`; found 'name'"),
        ('{"text": 5}', "`text` is a number; it must be a string"),
        ('{"text": "  "}', "`text` is empty"),
        ('{"text": "' + "x" * (MAX_TEXT_BYTES + 1) + '"}', "`text` of 4097 bytes; at most 4096"),
        ('{"text": "x", "bid": "5"}', "`bid` is a string; it must be a number, or absent"),
        ('{"text": "x", "bid": true}', "`bid` is true or false"),
        ('{"text": "x", "bid": 1e999}', "out of range"),
        ('{"text": "x", "bid": NaN}', "not valid JSON"),
        ('{"text": "x", "bid": 1' + "0" * 400 + "}", "`bid` is not finite"),
        ('{"text": "x", "id": 1.5}', "`id` is a number; it must be a string or an integer"),
        ('{"text": "x", "id": ""}', "`id` is empty"),
        ('{"text": "x", "id": "' + "i" * 129 + '"}', "`id` of 129 bytes; at most 128"),
        ('{"text": "x", "colour": ["red"]}', "attribute 'colour' is an array"),
        ('{"text": "x", "colour": "' + "r" * 257 + '"}', "attribute 'colour' of 257 bytes; at most 256"),
        ('{"text": "x", "": 1}', "attribute name ''"),
        ('{"text": "x", "' + "n" * 65 + '": 1}', "names are 1 to 64 bytes"),
        ('{"text": "x", "code": 9007199254740993}', "beyond 2^53: send it as a string"),
        ("[" * 5000, "nested too deeply"),
        ("x" * (MAX_RECORD_BYTES + 10), "a line of more than 65536 bytes"),
        ('{"text": "\\ud800"}', "not valid JSON"),
    ],
)
def test_faults_of_json_are_named_by_line(line: str, message: str) -> None:
    data = '{"text": "before"}\n\n' + line + '\n{"text": "after"}\n'
    found, faults = parsed(data.encode(), "jsonl")
    assert [item.text for item in found] == ["before", "after"]
    (fault,) = faults.listed()
    assert fault.line == 3
    assert message in fault.message


def test_bytes_that_are_no_utf8_are_named_by_line() -> None:
    assert "not UTF-8" in faults_of(b'{"text": "a"}\n{"text": "\xff"}\n', "jsonl")[2]
    assert "not UTF-8" in faults_of(b"text\na\n\xff\nb\n", "csv")[3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,1", "2 fields; the header has 3 columns"),
        ('"a"b,1,red', "not valid CSV"),
        (" ,1,red", "`text` is empty"),
        ("a,nan,red", "`bid` is 'nan'; it must be a finite number"),
        ("a,1e999,red", "`bid` is not finite"),
        ("a,1_0,red", "`bid` is '1_0'"),
        ("a,1,\r b", "not valid CSV"),
        ("a,1," + "r" * (MAX_RECORD_BYTES + 10), "more than 65536 bytes"),
        ('"a,1,red', "not valid CSV"),
    ],
)
def test_faults_of_csv_are_named_by_line(line: str, message: str) -> None:
    data = ("text,bid,colour\n" + "x,1,red\n" * 100 + line + "\n" + '"y",2,blue\n' * 100).encode()
    found, faults = parsed(data, "csv", content_length=len(data))
    assert len(found) == 200
    (fault,) = faults.listed()
    assert fault.line == 102
    assert message in fault.message


def test_an_open_quote_far_before_the_end_costs_its_line_only() -> None:
    data = b"text\n" + b"x\n" * 70_000 + b'"broken\n' + b"y\n" * 70_000
    found, faults = parsed(data, "csv")
    assert len(found) == 140_000
    (fault,) = faults.listed()
    assert fault.line == 70_002
    assert "is a quote not closed?" in fault.message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"name,bid\n", "no column `text`; found 'name', 'bid'"),
        (b"text;bid\n", "columns are separated by commas"),
        (b"text,a,a\n", "column 'a' appears twice"),
        (b"text,\n", "attribute name ''"),
        (b"text," + b",".join(b"a%d" % i for i in range(33)) + b"\n", "at most 32 attributes"),
        (b"te\xffxt\n", "the header: not UTF-8"),
    ],
)
def test_a_header_that_will_not_do_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UploadError, match=message.replace("[", "\\[")):
        parsed(data, "csv")


def test_too_many_attributes_and_items_are_refused() -> None:
    lines = b"".join(b'{"text": "x%d", "a%d": 1}\n' % (i, i) for i in range(40))
    with pytest.raises(UploadError, match="line 33: a catalogue has at most 32 attributes"):
        parsed(lines, "jsonl")
    with pytest.raises(UploadError, match="line 4: more than 3 items"):
        parsed(b'{"text": "x"}\n' * 4, "jsonl", max_items=3)


@pytest.mark.parametrize(
    ("data", "upload_format"), [(b'{"text": "a"}\n{"text": "b', "jsonl"), (b'text\na\n"b', "csv")]
)
def test_a_cut_upload_is_refused(data: bytes, upload_format: Format) -> None:
    with pytest.raises(UploadCutError, match="the upload ends within"):
        parsed(data, upload_format)
    with pytest.raises(UploadCutError, match=f"of {len(data) + 1} bytes was announced, {len(data)} came"):
        parsed(data, upload_format, content_length=len(data) + 1)
    with pytest.raises(UploadCutError, match="more came"):
        parsed(b"text\na\n" + data, "csv", content_length=4)


def test_the_first_faults_are_listed_and_all_counted() -> None:
    faults = Faults()
    for line in [*range(500, 0, -1), *range(501, 900)]:
        faults.add(line, f"fault {line}")
    assert faults.count == 899
    assert [fault.line for fault in faults.listed()] == list(range(1, MAX_LISTED_FAULTS + 1))


def test_rereading_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quote that opens on every hundredth line takes what follows up to the next, again and again."""
    monkeypatch.setattr(upload_lines, "MAX_REREAD_BYTES", 2000)
    block = b'"x,1\n' + b"y,2\n" * 99
    data = b"text,bid\n" + block * 20
    found, faults = parsed(data, "csv", content_length=len(data))
    assert 0 < len(found) < 99 * 20
    assert any("with it, lines up to" in fault.message for fault in faults.listed())
    monkeypatch.undo()
    found, faults = parsed(data, "csv", content_length=len(data))
    assert len(found) == 99 * 20
    assert faults.count == 20


def test_an_endless_upload_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_lines, "MAX_UPLOAD_BYTES", 100)
    with pytest.raises(UploadError, match="more than 100 bytes"):
        parsed(b"\n" * 101, "jsonl")
