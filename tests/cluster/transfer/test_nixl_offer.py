"""What comes from outside as a NIXL offer: parsed whole, or not used. No NIXL needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.transfer.nixl_offer import (
    MAX_METADATA_BYTES,
    OfferError,
    RemoteMemory,
    check_offer,
    memory_of,
    offer_of,
)

ADDRESS, NUM_BYTES, VERSION = 0x7F00_0000_0000, 2**20, "1.5.1"


def field(tag: bytes, value: bytes) -> bytes:
    return tag + len(value).to_bytes(8, "little") + value + b"|"


def number(value: int, num_bytes: int = 8) -> bytes:
    return value.to_bytes(num_bytes, "little")


def parts_of(
    name: bytes = b"agent", address: int = ADDRESS, num_bytes: int = NUM_BYTES, count: int = 1
) -> list[bytes]:
    """As nixl 1.5 writes them."""
    return [
        b"nixlSerDes|",
        field(b"Agent", name),
        field(b"Conns", number(1)),
        field(b"t", b"UCX"),
        field(b"c", b"a worker's address"),
        field(b"", b"MemSection"),
        field(b"nixlSecElms", number(1)),
        field(b"bknd", b"UCX"),
        field(b"nixlDList", b"nixlSDList"),
        field(b"t", number(0, 4)),
        field(b"n", number(count)),
        field(b"", number(address) + number(num_bytes) + number(0) + b"a key"),
    ]


def metadata_of(**facts: object) -> bytes:
    return b"".join(parts_of(**facts))  # type: ignore[arg-type]


def test_metadata_says_whose_memory_is_where() -> None:
    assert memory_of(metadata_of()) == RemoteMemory(agent="agent", address=ADDRESS, num_bytes=NUM_BYTES)


@pytest.mark.parametrize(
    "facts",
    [
        {"name": b""},
        {"name": b"n" * 201},
        {"name": "é".encode()},
        {"address": 0},
        {"num_bytes": 0},
        {"address": 2**63},
        {"num_bytes": 2**64 - 1},
        {"count": 2},
    ],
)
def test_facts_that_cannot_be_are_refused(facts: dict[str, object]) -> None:
    with pytest.raises(OfferError):
        memory_of(metadata_of(**facts))


@given(st.data())
def test_metadata_that_is_cut_lengthened_or_out_of_order_is_refused(data: st.DataObject) -> None:
    parts, whole = parts_of(), metadata_of()
    cut = data.draw(st.integers(0, len(whole) - 1))
    i = data.draw(st.integers(0, len(parts) - 1))
    for wrong in (
        whole[:cut],
        whole + data.draw(st.binary(min_size=1, max_size=9)),
        b"".join(parts[:i] + parts[i + 1 :]),
        b"".join([*parts[:i], parts[i], *parts[i:]]),
    ):
        with pytest.raises(OfferError):
            memory_of(wrong)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_garbage_never_parses_past_its_end(garbage: bytes, at: int) -> None:
    whole = metadata_of()
    for bad in (garbage, b"nixlSerDes|" + garbage, whole[:at] + garbage + whole[at + len(garbage) :]):
        try:
            memory = memory_of(bad)
        except OfferError:
            continue
        assert 0 < memory.address < memory.address + memory.num_bytes <= 2**63


def test_an_offer_with_anything_wrong_is_not_used() -> None:
    good = offer_of(VERSION, metadata_of(), ADDRESS + 4096, 8192)
    assert check_offer(good, VERSION, 8192).agent == "agent"
    long = b"x" * (MAX_METADATA_BYTES + 1)
    for wrong, reason in (
        (offer_of("1.4.0", metadata_of(), ADDRESS, 8192), "has NIXL 1.4.0"),
        (offer_of("", metadata_of(), ADDRESS, 8192), "of no version"),
        (offer_of(VERSION, long, ADDRESS, 8192), "at most"),
        (offer_of(VERSION, b"", ADDRESS, 8192), "did not write"),
        (offer_of(VERSION, metadata_of(), ADDRESS - 1, 8192), "is not all of"),
        (offer_of(VERSION, metadata_of(), ADDRESS + 1, NUM_BYTES), "is not all of"),
        (offer_of(VERSION, metadata_of(), 2**64 - 1, 2**64 - 1), "is not all of"),
        (offer_of(VERSION, metadata_of(), ADDRESS, 8191), "for a payload of 8192"),
    ):
        with pytest.raises(OfferError, match=reason):
            check_offer(wrong, VERSION, 8192)
    good.metadata_checksum ^= 1
    with pytest.raises(OfferError, match="checksum"):
        check_offer(good, VERSION, 8192)
