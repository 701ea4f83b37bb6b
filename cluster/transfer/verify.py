"""What makes a hand-off whole: order, coverage, sizes and one checksum. Pure; both ends use it.

Each layer's tokens arrive ascending and without a gap, layers interleaved as they are computed, so one
number a layer proves that every (layer, token) came exactly once.
"""

import xxhash

from cluster.kv_layout import KvLayout
from cluster.messages import Record
from cluster.transfer import MAX_CHUNK_BYTES, HandoffError


class ChunkPlace(Record, frozen=True, kw_only=True):
    """Where a received chunk says it belongs; the wire's KvChunk without its payload."""

    sequence_number: int
    layer: int
    first_token: int
    num_tokens: int


class Trailer(Record, frozen=True, kw_only=True):
    """What the sender says it sent in all."""

    num_chunks: int
    num_bytes: int
    valid_tokens: int
    checksum: int
    """xxh3-64 over all payload bytes in the order sent."""


class PayloadDigest:
    """Counts and hashes payload in the order sent."""

    def __init__(self) -> None:
        self.num_chunks = 0
        self.num_bytes = 0
        self._hash = xxhash.xxh3_64()

    def add(self, payload: memoryview | bytes) -> None:
        self._hash.update(payload)
        self.num_chunks += 1
        self.num_bytes += len(payload)

    def trailer(self, valid_tokens: int) -> Trailer:
        return Trailer(
            num_chunks=self.num_chunks,
            num_bytes=self.num_bytes,
            valid_tokens=valid_tokens,
            checksum=self._hash.intdigest(),
        )


class HandoffVerifier:
    """Accepts exactly the chunks of tokens [first_token, first_token + num_tokens), each once.

    Every method raises HandoffError on the first thing that is wrong; the hand-off is then void.
    """

    def __init__(self, layout: KvLayout, first_token: int, num_tokens: int) -> None:
        self._layout = layout
        self._first_token = first_token
        self._num_tokens = num_tokens
        self._next_token = [first_token] * layout.num_layers
        self._num_admitted = 0
        self._digest = PayloadDigest()

    @property
    def end_token(self) -> int:
        return self._first_token + self._num_tokens

    @property
    def total_bytes(self) -> int:
        return self._num_tokens * self._layout.bytes_per_token

    @property
    def max_chunk_bytes(self) -> int:
        return min(MAX_CHUNK_BYTES, self._num_tokens * self._layout.bytes_per_token_layer)

    def admit(self, place: ChunkPlace) -> int:
        """Take the next chunk's place as its own, and say how many payload bytes belong there."""
        if place.sequence_number != self._num_admitted:
            raise HandoffError(
                "out_of_order", f"chunk {place.sequence_number} came where {self._num_admitted} was due"
            )
        if place.layer >= self._layout.num_layers:
            raise HandoffError("size_mismatch", f"layer {place.layer} of {self._layout.num_layers}")
        due = self._next_token[place.layer]
        if place.first_token != due:
            raise HandoffError(
                "out_of_order", f"layer {place.layer} came at token {place.first_token}, due at {due}"
            )
        if not 1 <= place.num_tokens <= self.end_token - place.first_token:
            raise HandoffError(
                "size_mismatch",
                f"{place.num_tokens} tokens at {place.first_token}; this hand-off ends at {self.end_token}",
            )
        num_bytes = place.num_tokens * self._layout.bytes_per_token_layer
        if num_bytes > MAX_CHUNK_BYTES:
            raise HandoffError("size_mismatch", f"a chunk of {num_bytes} bytes; at most {MAX_CHUNK_BYTES}")
        self._num_admitted += 1
        self._next_token[place.layer] += place.num_tokens
        return num_bytes

    def add(self, place: ChunkPlace, payload: memoryview) -> None:
        """Take the payload of the oldest admitted place that has none yet."""
        expected = place.num_tokens * self._layout.bytes_per_token_layer
        if len(payload) != expected:
            raise HandoffError(
                "size_mismatch",
                f"{place.num_tokens} tokens take {expected} bytes a layer, not {len(payload)}",
            )
        self._digest.add(payload)

    def check_trailer(self, trailer: Trailer) -> None:
        for layer, reached in enumerate(self._next_token):
            if reached != self.end_token:
                raise HandoffError(
                    "size_mismatch", f"layer {layer} ends at token {reached}, not {self.end_token}"
                )
        received = self._digest.trailer(self._num_tokens)
        for fact in ("num_chunks", "num_bytes", "valid_tokens"):
            if getattr(trailer, fact) != getattr(received, fact):
                raise HandoffError(
                    "size_mismatch",
                    f"trailer says {fact} = {getattr(trailer, fact)}, received {getattr(received, fact)}",
                )
        if trailer.checksum != received.checksum:
            raise HandoffError(
                "checksum_mismatch",
                f"payload hashes to {received.checksum:016x}, the sender's to {trailer.checksum:016x}",
            )
