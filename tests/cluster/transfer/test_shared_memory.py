import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.transfer import HandoffError
from cluster.transfer.shared_memory import PAYLOAD_START, SegmentPool, SharedSegment, open_offer
from cluster.wire import headrace_pb2 as pb
from tests.cluster.transfer.loopback import open_fds

PAYLOAD = 100_000


@pytest.fixture
def segment() -> Iterator[SharedSegment]:
    segment = SharedSegment(PAYLOAD)
    yield segment
    segment.close()


def test_the_receiver_reads_what_the_sender_appended(segment: SharedSegment) -> None:
    offer = segment.offer()
    opened = open_offer(offer, PAYLOAD)
    assert opened is not None
    first = segment.append(memoryview(b"abc"))
    second = segment.append(memoryview(b"defg"))
    assert bytes(opened.payload(first, 3)) == b"abc"
    assert bytes(opened.payload(second, 4)) == b"defg"
    opened.close()


def test_a_mapping_outlives_its_sender() -> None:
    segment = SharedSegment(PAYLOAD)
    opened = open_offer(segment.offer(), PAYLOAD)
    assert opened is not None
    offset = segment.append(memoryview(b"kept"))
    segment.close()
    view = opened.payload(offset, 4)
    opened.close()
    assert bytes(view) == b"kept"


def test_a_payload_past_the_end_is_refused_on_both_sides(segment: SharedSegment) -> None:
    with pytest.raises(HandoffError):
        segment.append(memoryview(bytes(segment.num_bytes)))
    opened = open_offer(segment.offer(), PAYLOAD)
    assert opened is not None
    room = segment.num_bytes - PAYLOAD_START
    assert len(opened.payload(PAYLOAD_START, room)) == room
    for offset, size in [(PAYLOAD_START, room + 1), (0, 1), (segment.num_bytes, 1), (2**62, 1)]:
        with pytest.raises(HandoffError):
            opened.payload(offset, size)
    opened.close()


def test_the_segment_cannot_be_resized(segment: SharedSegment) -> None:
    offer = segment.offer()
    for size in (0, segment.num_bytes * 2):
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/{offer.pid}/fd/{offer.fd}", size)


def changed(offer: pb.SharedMemoryOffer, **facts: object) -> pb.SharedMemoryOffer:
    copy = pb.SharedMemoryOffer()
    copy.CopyFrom(offer)
    for name, value in facts.items():
        setattr(copy, name, value)
    return copy


def test_an_offer_with_anything_wrong_is_not_used(segment: SharedSegment) -> None:
    offer = segment.offer()
    opened = open_offer(offer, PAYLOAD)
    assert opened is not None
    opened.close()
    before = open_fds()
    for wrong in (
        changed(offer, nonce=b"x" * 16),
        changed(offer, nonce=b""),
        changed(offer, num_bytes=offer.num_bytes + 4096),
        changed(offer, num_bytes=offer.num_bytes - 4096),
        changed(offer, num_bytes=2**63),
        changed(offer, fd=-1),
        changed(offer, fd=2**31 - 1),
        changed(offer, pid=-1),
        changed(offer, pid=0),
        changed(offer, pid=2**31 - 1),
        pb.SharedMemoryOffer(),
    ):
        assert open_offer(wrong, PAYLOAD) is None, wrong
    assert open_offer(offer, offer.num_bytes) is None, "too small for the payload"
    assert open_fds() == before


def test_an_earlier_hand_offs_nonce_opens_nothing(segment: SharedSegment) -> None:
    stale = segment.offer()
    segment.offer()
    assert open_offer(stale, PAYLOAD) is None


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK])
def test_memory_that_could_be_truncated_is_not_used(seals: int) -> None:
    fd = os.memfd_create("headrace-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, b"n" * 16 + bytes(4096 - 16))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        offer = pb.SharedMemoryOffer(pid=os.getpid(), fd=fd, num_bytes=4096, nonce=b"n" * 16)
        assert open_offer(offer, 100) is None
    finally:
        os.close(fd)


def test_what_is_no_memory_file_is_not_even_opened(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"n" * 16 + bytes(4096 - 16))
    os.mkfifo(tmp_path / "fifo")
    fds = [
        os.open(plain, os.O_RDWR),
        os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK),
        os.open("/dev/zero", os.O_RDWR),
        *os.pipe(),
    ]
    try:
        for fd in fds:
            offer = pb.SharedMemoryOffer(pid=os.getpid(), fd=fd, num_bytes=4096, nonce=b"n" * 16)
            assert open_offer(offer, 100) is None
    finally:
        for fd in fds:
            os.close(fd)


def test_another_users_memory_is_not_used(segment: SharedSegment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert open_offer(segment.offer(), PAYLOAD) is None


def test_the_pool_reuses_the_smallest_that_fits() -> None:
    pool = SegmentPool()
    small, large = pool.take(PAYLOAD), pool.take(10_000_000)
    pool.give_back(large)
    pool.give_back(small)
    assert pool.take(PAYLOAD // 2) is small
    assert pool.take(PAYLOAD // 2) is large
    pool.give_back(small)
    fresh = pool.take(10_000_000)
    assert fresh is not small, "it is too small"
    pool.give_back(fresh)
    pool.give_back(large)
    pool.close()


def test_the_pool_keeps_no_more_than_its_bound_and_nothing_after_close() -> None:
    pool = SegmentPool(max_idle_bytes=3 * 1024 * 1024)
    segments = [pool.take(PAYLOAD) for _ in range(5)]
    before = open_fds()
    for segment in segments[:4]:
        pool.give_back(segment)
    freed = before - open_fds()
    assert freed == 2, "a segment is its file and its mapping's own handle on it"
    pool.close()
    pool.give_back(segments[4])
    assert open_fds() == before - 10


def test_a_kernel_without_memory_to_give_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> mmap.mmap:
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    before = open_fds()
    with pytest.raises(OSError, match="no memory"):
        SharedSegment(PAYLOAD)
    assert open_fds() == before
