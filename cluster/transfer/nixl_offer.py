"""What a sender offers through NIXL, and what of it is believed.

An agent describes itself in bytes that NIXL's C++ and UCX parse without bounds of their own, some of them by
ending the process. So the frame around UCX's parts is parsed here first, every length of it; those parts (the
worker's address, the memory's key) are believed of the same version of the package, undamaged.
"""

import xxhash

from cluster.messages import Record
from cluster.wire import headrace_pb2 as pb

MAX_METADATA_BYTES = 64 * 1024
"""About 500 bytes with TCP alone; more for every network device."""
MAX_NAME_BYTES = 200
_MAGIC = b"nixlSerDes|"
_BACKEND = b"UCX"
_DRAM = 0
_DESC_HEAD_BYTES = 24
"""Address, length, device; the memory's key follows."""
_MAX_ADDRESS = 2**63


class RemoteMemory(Record, frozen=True, kw_only=True):
    """The one stretch of host memory that an agent has registered."""

    agent: str
    address: int
    num_bytes: int


class OfferError(ValueError):
    """An offer that is not used; bytes go inline. The message says what is wrong with it."""


def offer_of(version: str, metadata: bytes, address: int, num_bytes: int) -> pb.NixlOffer:
    return pb.NixlOffer(
        version=version,
        metadata=metadata,
        metadata_checksum=xxhash.xxh3_64_intdigest(metadata),
        address=address,
        num_bytes=num_bytes,
    )


def check_offer(offer: pb.NixlOffer, own_version: str, payload_bytes: int) -> RemoteMemory:
    """Whose memory it is. Raises OfferError."""
    if offer.version != own_version:
        raise OfferError(f"its sender has NIXL {offer.version or 'of no version'}, this end {own_version}")
    if len(offer.metadata) > MAX_METADATA_BYTES:
        raise OfferError(f"{len(offer.metadata)} bytes of metadata; at most {MAX_METADATA_BYTES}")
    if xxhash.xxh3_64_intdigest(offer.metadata) != offer.metadata_checksum:
        raise OfferError("metadata with another checksum")
    memory = memory_of(offer.metadata)
    end = offer.address + offer.num_bytes
    if offer.address < memory.address or end > memory.address + memory.num_bytes:
        raise OfferError(
            f"[{offer.address:#x}, {end:#x}) is not all of the {memory.num_bytes} bytes registered at "
            f"{memory.address:#x}"
        )
    if offer.num_bytes < payload_bytes:
        raise OfferError(f"{offer.num_bytes} bytes for a payload of {payload_bytes}")
    return memory


def memory_of(metadata: bytes) -> RemoteMemory:
    """Parses what `get_agent_metadata` of an agent with UCX and one registered stretch gives.

    Raises OfferError on anything else, a byte too many included.
    """
    fields = _Fields(metadata)
    name = fields.take(b"Agent")
    if not 0 < len(name) <= MAX_NAME_BYTES or not name.isascii():
        raise OfferError(f"an agent whose name has {len(name)} bytes")
    fields.expect_number(b"Conns", 8, 1)
    fields.expect(b"t", _BACKEND)
    if not fields.take(b"c"):
        raise OfferError("no address to connect to")
    fields.expect(b"", b"MemSection")
    fields.expect_number(b"nixlSecElms", 8, 1)
    fields.expect(b"bknd", _BACKEND)
    fields.expect(b"nixlDList", b"nixlSDList")
    fields.expect_number(b"t", 4, _DRAM)
    fields.expect_number(b"n", 8, 1)
    desc = fields.take(b"")
    fields.end()
    if len(desc) <= _DESC_HEAD_BYTES:
        raise OfferError("memory without a key to read it by")
    address, num_bytes = (int.from_bytes(desc[at : at + 8], "little") for at in (0, 8))
    if not address or not num_bytes or address + num_bytes > _MAX_ADDRESS:
        raise OfferError(f"{num_bytes} bytes registered at {address:#x}")
    return RemoteMemory(agent=name.decode("ascii"), address=address, num_bytes=num_bytes)


class _Fields:
    """A row of: tag, length in 8 bytes, so many bytes, `|`."""

    def __init__(self, data: bytes) -> None:
        if not data.startswith(_MAGIC):
            raise OfferError("metadata that NIXL did not write")
        self._data = data
        self._at = len(_MAGIC)

    def take(self, tag: bytes) -> bytes:
        start = self._at + len(tag) + 8
        if self._data[self._at : self._at + len(tag)] != tag or start > len(self._data):
            raise OfferError(f"metadata without {tag.decode() or 'its parts'} where it is due")
        end = start + int.from_bytes(self._data[start - 8 : start], "little")
        if self._data[end : end + 1] != b"|":
            raise OfferError(f"metadata that is cut off in {tag.decode() or 'its parts'}")
        self._at = end + 1
        return self._data[start:end]

    def expect(self, tag: bytes, value: bytes) -> None:
        found = self.take(tag)
        if found != value:
            raise OfferError(f"metadata with {tag.decode()} = {found[:32]!r}; {value!r} is due")

    def expect_number(self, tag: bytes, num_bytes: int, value: int) -> None:
        self.expect(tag, value.to_bytes(num_bytes, "little"))

    def end(self) -> None:
        if self._at != len(self._data):
            raise OfferError(f"metadata with {len(self._data) - self._at} bytes too many")
