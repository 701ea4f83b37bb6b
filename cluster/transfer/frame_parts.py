"""What the frames of a hand-off say, as the receiver's own records."""

from cluster.transfer import HandoffError
from cluster.transfer.shared_memory import MappedSegment
from cluster.transfer.verify import ChunkPlace, Trailer
from cluster.wire import headrace_pb2 as pb


def place_of(message: pb.KvChunk) -> ChunkPlace:
    return ChunkPlace(
        sequence_number=message.sequence_number,
        layer=message.layer,
        first_token=message.first_token,
        num_tokens=message.num_tokens,
    )


def nixl_offset_of(message: pb.KvChunk) -> int:
    if message.WhichOneof("payload") != "nixl_offset":
        raise HandoffError("size_mismatch", "a chunk without an offset into the NIXL memory agreed on")
    return message.nixl_offset


def payload_of(message: pb.KvChunk, num_bytes: int, segment: MappedSegment | None) -> memoryview:
    """The chunk's bytes, from the stream or from the segment: whichever was agreed on."""
    if segment is None:
        if message.WhichOneof("payload") != "data":
            raise HandoffError("size_mismatch", "a chunk without bytes, and no memory agreed on")
        return memoryview(message.data)
    if message.WhichOneof("payload") != "shared_memory_offset":
        raise HandoffError("size_mismatch", "a chunk without an offset into the shared memory agreed on")
    return segment.payload(message.shared_memory_offset, num_bytes)


def trailer_of(message: pb.HandoffTrailer) -> Trailer:
    return Trailer(
        num_chunks=message.num_chunks,
        num_bytes=message.num_bytes,
        valid_tokens=message.valid_tokens,
        checksum=message.checksum,
    )
