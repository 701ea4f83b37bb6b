"""Payload through memory that two processes of one host share: an anonymous memory file (Linux memfd).

The sender owns the file and offers it as (pid, fd); the receiver opens it through /proc. It has no name, so
no crash of either end leaves anything behind, and a mapping keeps the memory alive after its owner died.
The file is sealed against resizing, so that no mapping of it can ever fault.
"""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import secrets
import stat

from cluster.transfer import HandoffError
from cluster.wire import headrace_pb2 as pb

NONCE_BYTES = 16
PAYLOAD_START = 64
"""The nonce has the file's first cache line to itself."""
SIZE_STEP_BYTES = 1024 * 1024
"""Sizes are rounded up to this, so that segments fit hand-offs other than their first."""
MAX_IDLE_BYTES = 256 * 1024 * 1024
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

logger = logging.getLogger(__name__)


class SharedSegment:
    """The sender's end: room for one hand-off's payload, filled front to back."""

    def __init__(self, payload_bytes: int) -> None:
        """Raises OSError where the kernel gives no such memory."""
        self.num_bytes = -(-(PAYLOAD_START + payload_bytes) // SIZE_STEP_BYTES) * SIZE_STEP_BYTES
        self._fd = os.memfd_create("headrace-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, self.num_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self._fd, self.num_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._end = PAYLOAD_START

    def offer(self) -> pb.SharedMemoryOffer:
        """Empty the segment and write a fresh nonce; what a receiver needs to open it."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._map[:NONCE_BYTES] = nonce
        self._end = PAYLOAD_START
        return pb.SharedMemoryOffer(pid=os.getpid(), fd=self._fd, num_bytes=self.num_bytes, nonce=nonce)

    def append(self, payload: memoryview) -> int:
        """Copy payload in; returns its offset. Raises HandoffError where it does not fit."""
        start, end = self._end, self._end + len(payload)
        if end > self.num_bytes:
            raise HandoffError("size_mismatch", "more payload than the hand-off's header announced")
        self._map[start:end] = payload
        self._end = end
        return start

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


class SegmentPool:
    """Idle segments, kept because fresh pages cost more than the copy into them. For one event loop."""

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[SharedSegment] = []
        self._is_closed = False

    def take(self, payload_bytes: int) -> SharedSegment:
        """The smallest idle segment that fits, or a new one. Raises OSError."""
        fitting = [s for s in self._idle if s.num_bytes >= PAYLOAD_START + payload_bytes]
        if not fitting:
            return SharedSegment(payload_bytes)
        segment = min(fitting, key=lambda s: s.num_bytes)
        self._idle.remove(segment)
        return segment

    def give_back(self, segment: SharedSegment) -> None:
        """Only of a hand-off that ended in an acknowledgement or a rejection: else its receiver may still be
        reading, and would take the next hand-off's bytes for its own. Close any other."""
        self._idle.append(segment)
        limit = 0 if self._is_closed else self._max_idle_bytes
        while self._idle and sum(s.num_bytes for s in self._idle) > limit:
            self._idle.pop(0).close()

    def close(self) -> None:
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()


class MappedSegment:
    """The receiver's end: a read-only mapping of an offered segment."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._map = mapping
        self._view = memoryview(mapping)

    def payload(self, offset: int, num_bytes: int) -> memoryview:
        """Raises HandoffError where the range is not all inside the segment's payload."""
        if offset < PAYLOAD_START or offset + num_bytes > len(self._view):
            raise HandoffError(
                "size_mismatch",
                f"bytes [{offset}, {offset + num_bytes}) of a shared segment whose payload is "
                f"[{PAYLOAD_START}, {len(self._view)})",
            )
        return self._view[offset : offset + num_bytes]

    def close(self) -> None:
        self._view.release()
        # A view of a chunk may outlive us, in a traceback say; the mapping then goes with its last view.
        with contextlib.suppress(BufferError):
            self._map.close()


def open_offer(offer: pb.SharedMemoryOffer, payload_bytes: int) -> MappedSegment | None:
    """Map what a sender offers, or None (bytes must then go inline) where it is not exactly that.

    Takes only a sealed memory file of our own user, of the stated size, with room for `payload_bytes`, that
    shows the nonce: pid and fd are numbers from outside, and could name anything.
    """
    if offer.num_bytes < PAYLOAD_START + payload_bytes or len(offer.nonce) != NONCE_BYTES:
        return None
    try:
        mapping = _map_memfd(f"/proc/{offer.pid}/fd/{offer.fd}", offer.num_bytes)
    except (OSError, ValueError, OverflowError) as error:
        logger.info("shared memory of process %d not used: %s", offer.pid, error)
        return None
    segment = MappedSegment(mapping)
    if not secrets.compare_digest(mapping[:NONCE_BYTES], offer.nonce):
        segment.close()
        logger.info("shared memory of process %d not used: another nonce", offer.pid)
        return None
    return segment


def _map_memfd(path: str, num_bytes: int) -> mmap.mmap:
    """Raises OSError or ValueError where `path` is not a sealed memory file of ours of that size."""
    # Looked at before it is opened: opening a device or a pipe can do things.
    if not os.readlink(path).startswith("/memfd:"):
        raise OSError(errno.EINVAL, "not a memory file")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "not a memory file of this user")
        if facts.st_size != num_bytes:
            raise OSError(errno.EINVAL, f"has {facts.st_size} bytes, not {num_bytes}")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise OSError(errno.EPERM, "not sealed against resizing")
        return mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    finally:
        os.close(fd)
