import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.kv_layout import KvLayout
from cluster.transfer import MAX_CHUNK_BYTES, HandoffError
from cluster.transfer.verify import ChunkPlace, HandoffVerifier, PayloadDigest, Trailer
from tests.cluster.transfer.loopback import LAYOUT, kv_bytes

Piece = tuple[int, int, int]
"""layer, first token, tokens"""


@st.composite
def interleavings(draw: st.DrawFn) -> tuple[int, int, list[Piece]]:
    """A hand-off cut into runs, each layer's ascending, the layers interleaved in any way."""
    first, count = draw(st.integers(0, 50)), draw(st.integers(1, 12))
    waiting: dict[int, list[Piece]] = {}
    for layer in range(LAYOUT.num_layers):
        cuts = sorted(draw(st.sets(st.integers(first + 1, first + count - 1)))) if count > 1 else []
        edges = [first, *cuts, first + count]
        waiting[layer] = [(layer, a, b - a) for a, b in itertools.pairwise(edges)]
    pieces = []
    while waiting:
        layer = draw(st.sampled_from(sorted(waiting)))
        pieces.append(waiting[layer].pop(0))
        if not waiting[layer]:
            del waiting[layer]
    return first, count, pieces


def verify(first: int, count: int, pieces: list[Piece], trailer: Trailer | None = None) -> None:
    verifier = HandoffVerifier(LAYOUT, first, count)
    sent = PayloadDigest()
    for i, (layer, start, tokens) in enumerate(pieces):
        place = ChunkPlace(sequence_number=i, layer=layer, first_token=start, num_tokens=tokens)
        data = memoryview(kv_bytes(layer, start, tokens))
        assert verifier.admit(place) == len(data)
        verifier.add(place, data)
        sent.add(data)
    verifier.check_trailer(trailer or sent.trailer(count))


@given(interleavings())
def test_every_order_that_covers_each_layer_once_is_whole(handoff: tuple[int, int, list[Piece]]) -> None:
    verify(*handoff)


@given(interleavings(), st.data())
def test_dropping_repeating_or_moving_a_piece_never_passes(
    handoff: tuple[int, int, list[Piece]], data: st.DataObject
) -> None:
    first, count, pieces = handoff
    i = data.draw(st.integers(0, len(pieces) - 1))
    layer, start, tokens = pieces[i]
    spoiled = data.draw(
        st.sampled_from(
            [
                pieces[:i] + pieces[i + 1 :],
                [*pieces[: i + 1], pieces[i], *pieces[i + 1 :]],
                [*pieces[:i], (layer, start + 1, tokens), *pieces[i + 1 :]],
                [*pieces[:i], (layer, start, tokens + 1), *pieces[i + 1 :]],
                [*pieces[:i], ((layer + 1) % LAYOUT.num_layers, start, tokens), *pieces[i + 1 :]],
                [*pieces, (layer, first + count, 1)],
            ]
        )
    )
    with pytest.raises(HandoffError) as caught:
        verify(first, count, spoiled)
    assert caught.value.code in ("out_of_order", "size_mismatch")


def test_the_trailer_must_match_in_every_fact() -> None:
    pieces = [(layer, 0, 2) for layer in range(LAYOUT.num_layers)]
    digest = PayloadDigest()
    for piece in pieces:
        digest.add(kv_bytes(*piece))
    good = digest.trailer(2)
    verify(0, 2, pieces, good)
    facts = {name: getattr(good, name) for name in ("num_chunks", "num_bytes", "valid_tokens", "checksum")}
    for name in facts:
        with pytest.raises(HandoffError):
            verify(0, 2, pieces, Trailer(**{**facts, name: facts[name] ^ 1}))


def test_a_chunk_larger_than_a_message_is_refused_before_its_payload_is_looked_at() -> None:
    layout = KvLayout(
        model_fingerprint="wide",
        num_layers=1,
        num_kv_heads=64,
        head_dim=256,
        dtype="float32",
        block_size_tokens=16,
    )
    tokens = MAX_CHUNK_BYTES // layout.bytes_per_token_layer + 1
    place = ChunkPlace(sequence_number=0, layer=0, first_token=0, num_tokens=tokens)
    with pytest.raises(HandoffError, match="at most"):
        HandoffVerifier(layout, 0, tokens).admit(place)
