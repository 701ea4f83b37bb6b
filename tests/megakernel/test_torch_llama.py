import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.model import row_invariant
from megakernel.model.attention_plan import SPLIT_TOKENS, plan_attention
from megakernel.model.paged_kv import PagedKv
from megakernel.model.row_batch import NO_PARENT, RowBatch, RowSpan, chain_parents, leaf_paths
from megakernel.model.row_invariant import (
    BASE_ROWS,
    ROW_BUCKETS,
    RowInvariantLinear,
    RowVarianceError,
    bucket_for,
    verified_tiles,
)
from megakernel.model.torch_llama import TorchLlama
from megakernel.reference import reference_generate, reference_logits
from tests.tiny_model import LLAMA3_SCALING, Architecture, tiny_weights

ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3")
NO_ROWS = np.empty(0, dtype=np.int64)
LONG = 3 * SPLIT_TOKENS + 20


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request) -> TorchLlama:
    torch.set_num_threads(1)
    return TorchLlama(tiny_weights(1, request.param))


@pytest.fixture(scope="module")
def llama() -> TorchLlama:
    torch.set_num_threads(1)
    return TorchLlama(tiny_weights(1))


class Sequence:
    """One sequence's committed tokens, at slots scattered over a pool it may share."""

    def __init__(self, slots: np.ndarray) -> None:
        self.slots = slots
        self.num_tokens = 0

    def rows(self, tokens, parents=None):
        """(token ids, positions, slots, parents, context slots) of rows that follow what is committed."""
        count = len(tokens)
        parents = chain_parents(0, count) if parents is None else np.asarray(parents, dtype=np.int64)
        depths = np.zeros(count, dtype=np.int64)
        for row, parent in enumerate(parents):
            depths[row] = 0 if parent == NO_PARENT else depths[parent] + 1
        slots = self.slots[self.num_tokens : self.num_tokens + count]
        return (
            np.asarray(tokens),
            self.num_tokens + depths,
            slots,
            parents,
            self.slots[: self.num_tokens],
        )


def batch_of(*sequences) -> RowBatch:
    spans, parents, start = [], [], 0
    for tokens, _, _, own_parents, context in sequences:
        spans.append(RowSpan(start, start + len(tokens), context))
        parents.append(np.where(own_parents == NO_PARENT, NO_PARENT, own_parents + start))
        start += len(tokens)
    return RowBatch(
        token_ids=np.concatenate([s[0] for s in sequences]),
        positions=np.concatenate([s[1] for s in sequences]),
        slots=np.concatenate([s[2] for s in sequences]),
        parents=np.concatenate(parents),
        spans=tuple(spans),
    )


def scattered(num_slots: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num_slots)


def run_chunks(model: TorchLlama, tokens, sizes, seed: int = 0) -> np.ndarray:
    """Logits of every token, the prompt cut into chunks of `sizes` (the last one repeated)."""
    kv = model.new_kv(len(tokens) + 7)
    sequence = Sequence(scattered(len(tokens), seed))
    logits, sizes = [], list(sizes)
    while sequence.num_tokens < len(tokens):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        part = tokens[sequence.num_tokens : sequence.num_tokens + size]
        batch = batch_of(sequence.rows(part))
        logits.append(model.forward(kv, batch, np.arange(len(part))).numpy())
        sequence.num_tokens += len(part)
    return np.concatenate(logits)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 160, count).tolist()


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("has_tied_head", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agrees_with_the_reference(architecture, has_tied_head, is_scaled):
    weights = tiny_weights(
        2,
        architecture,
        has_tied_head=has_tied_head,
        rope_scaling=LLAMA3_SCALING if is_scaled else None,
    )
    tokens = random_tokens(LONG)
    expected = reference_logits(weights, tokens)
    logits = run_chunks(TorchLlama(weights), tokens, [LONG])
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    assert np.array_equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_agrees_with_the_reference_for_any_grouping_of_heads(num_kv_heads):
    weights = tiny_weights(3, num_kv_heads=num_kv_heads, num_layers=1)
    tokens = random_tokens(50)
    logits = run_chunks(TorchLlama(weights), tokens, [50])
    np.testing.assert_allclose(logits, reference_logits(weights, tokens), atol=2e-4)


@pytest.mark.parametrize("sizes", [[1], [7], [64], [100, 1, 31, 200, 3], [300]])
def test_no_chunking_changes_a_bit(model, sizes):
    tokens = random_tokens(LONG, seed=5)
    assert np.array_equal(run_chunks(model, tokens, sizes, seed=9), run_chunks(model, tokens, [LONG]))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    num_tokens=st.integers(1, 300),
    seed=st.integers(0, 3),
)
def test_any_chunking_gives_the_same_bits(llama, sizes, num_tokens, seed):
    tokens = random_tokens(num_tokens, seed)
    assert np.array_equal(run_chunks(llama, tokens, sizes), run_chunks(llama, tokens, [1]))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_company(llama, data):
    """Several sequences of different lengths step together, in any order, each with a chain of its own."""
    lengths = data.draw(st.lists(st.integers(0, 280), min_size=1, max_size=10))
    steps = [data.draw(st.integers(1, 9)) for _ in lengths]
    order = data.draw(st.permutations(range(len(lengths))))
    pool = scattered(sum(lengths) + sum(steps), seed=1)
    kv, sequences, alone, used = llama.new_kv(len(pool)), [], [], 0
    for index, (length, step) in enumerate(zip(lengths, steps, strict=True)):
        tokens = random_tokens(length + step, seed=index)
        sequence = Sequence(pool[used : used + length + step])
        used += length + step
        if length:
            llama.forward(kv, batch_of(sequence.rows(tokens[:length])), NO_ROWS)
        sequence.num_tokens = length
        rows = sequence.rows(tokens[length:])
        alone.append(llama.forward(kv, batch_of(rows), np.arange(step)).numpy())
        sequences.append(rows)
    together = batch_of(*(sequences[index] for index in order))
    logits = llama.forward(kv, together, np.arange(together.num_rows)).numpy()
    assert np.array_equal(logits, np.concatenate([alone[index] for index in order]))


@st.composite
def trees(draw, max_rows: int = 24):
    count = draw(st.integers(1, max_rows))
    return [draw(st.integers(NO_PARENT, row - 1)) for row in range(count)]


@settings(max_examples=25, deadline=None)
@given(parents=trees(), context=st.sampled_from([0, 1, 100, 127, 128, 129, 250, 256]))
def test_a_path_of_a_tree_has_the_bits_of_that_path_decoded_alone(llama, parents, context):
    prompt = random_tokens(context, seed=2)
    tokens = random_tokens(len(parents), seed=3)
    kv = llama.new_kv(context + len(parents))
    sequence = Sequence(scattered(context + len(parents), seed=4))
    if context:
        llama.forward(kv, batch_of(sequence.rows(prompt)), NO_ROWS)
    sequence.num_tokens = context
    batch = batch_of(sequence.rows(tokens, parents))
    logits = llama.forward(kv, batch, np.arange(len(parents))).numpy()
    for path in leaf_paths(batch.parents, 0, len(parents))[:4]:
        sequential = run_chunks(llama, prompt + [tokens[row] for row in path], [max(context, 1), 1])
        assert np.array_equal(logits[path], sequential[context:])


def test_a_large_tree_and_a_prompt_share_a_step(llama):
    """64 tree rows beside a chunk of 200: more rows than a bucket, several tile sizes, the same bits."""
    parents = [NO_PARENT] + [row // 2 for row in range(63)]
    pool = scattered(700, seed=0)
    kv = llama.new_kv(700)
    first, second = Sequence(pool[:300]), Sequence(pool[300:])
    llama.forward(kv, batch_of(first.rows(random_tokens(150))), NO_ROWS)
    first.num_tokens = 150
    tree, chunk = first.rows(random_tokens(64, 1), parents), second.rows(random_tokens(200, 2))
    alone = [llama.forward(kv, batch_of(rows), np.arange(len(rows[0]))).numpy() for rows in (tree, chunk)]
    both = llama.forward(kv, batch_of(tree, chunk), np.arange(264)).numpy()
    assert np.array_equal(both, np.concatenate(alone))


def test_stale_memory_never_reaches_a_row(llama):
    """NaN in every slot that no row may see: after the sequence's end, and of other sequences."""
    tokens = random_tokens(40)
    kv = llama.new_kv(200)
    for pool in (*kv.keys, *kv.values):
        pool[:, : kv.zero_slot] = torch.nan
    sequence = Sequence(scattered(200, seed=0))
    logits = [llama.forward(kv, batch_of(sequence.rows(tokens[:30])), np.arange(30)).numpy()]
    sequence.num_tokens = 30
    logits.append(llama.forward(kv, batch_of(sequence.rows(tokens[30:])), np.arange(10)).numpy())
    assert np.array_equal(np.concatenate(logits), run_chunks(llama, tokens, [40]))


def test_logits_come_for_the_rows_asked_in_the_order_asked(llama):
    sequence = Sequence(np.arange(20))
    kv = llama.new_kv(20)
    batch = batch_of(sequence.rows(random_tokens(20)))
    every = llama.forward(kv, batch, np.arange(20)).numpy()
    some = llama.forward(kv, batch, np.array([17, 3])).numpy()
    assert np.array_equal(some, every[[17, 3]])


def test_kv_is_announced_layer_by_layer_once_it_is_there(llama):
    kv = llama.new_kv(5)
    seen = []

    def check(layer: int) -> None:
        seen.append((layer, bool(kv.keys[layer][:, :5].any()), bool(kv.keys[-1][:, :5].any())))

    sequence = Sequence(np.arange(5))
    logits = llama.forward(kv, batch_of(sequence.rows(random_tokens(5))), NO_ROWS, on_kv_written=check)
    assert seen == [(0, True, False), (1, True, True)]
    assert logits.shape == (0, 160)


def test_threads_change_no_bit(llama):
    tokens = random_tokens(200)
    one = run_chunks(llama, tokens, [150, 1])
    torch.set_num_threads(2)
    try:
        assert np.array_equal(run_chunks(llama, tokens, [150, 1]), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_rows_are_invariant_too(dtype):
    model = TorchLlama(tiny_weights(1), dtype=dtype)
    tokens = random_tokens(150)
    whole = run_chunks(model, tokens, [150])
    assert whole.dtype == np.float32
    assert np.array_equal(run_chunks(model, tokens, [140, 1]), whole)
    exact = reference_logits(tiny_weights(1), tokens)
    assert np.corrcoef(whole.ravel(), exact.ravel())[0, 1] > 0.99


class TestVerifiedTiles:
    def test_a_product_that_changes_with_its_rows_keeps_the_tiles_that_agree(self):
        def product(rows: torch.Tensor) -> torch.Tensor:
            return rows * 2 if len(rows) in (4, 8, 32) else rows * 2 + 1e-3

        sample = torch.randn(ROW_BUCKETS[-1], 3)
        assert verified_tiles(product, sample, ROW_BUCKETS) == (4, 8, 32)

    def test_a_product_that_looks_at_other_rows_is_refused(self):
        with pytest.raises(RowVarianceError, match="order of rows"):
            verified_tiles(lambda rows: rows - rows[:1], torch.randn(256, 3), ROW_BUCKETS)

    def test_an_unverified_bucket_is_looped_over(self, monkeypatch):
        monkeypatch.setattr(row_invariant, "ROW_BUCKETS", (BASE_ROWS,))
        calls = []
        linear = RowInvariantLinear(torch.randn(5, 3), None, {})
        direct = linear._product
        monkeypatch.setattr(linear, "_product", lambda rows: calls.append(len(rows)) or direct(rows))
        rows = torch.randn(32, 3)
        assert torch.equal(linear(rows)[8:16], direct(rows[8:16]))
        assert calls == [8, 8, 8, 8]

    def test_linear_is_the_linear_map(self):
        weight, bias, rows = torch.randn(50, 30), torch.randn(50), torch.randn(16, 30)
        result = RowInvariantLinear(weight.clone(), bias, {})(rows)
        torch.testing.assert_close(result, rows @ weight.T + bias, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(("num_rows", "bucket"), [(1, 4), (4, 4), (5, 8), (100, 128), (1000, 256)])
    def test_bucket(self, num_rows, bucket):
        assert bucket_for(num_rows, ROW_BUCKETS) == bucket


class TestItemCounts:
    def test_only_verified_counts_are_planned(self, llama):
        """As on a device where few sizes agree: groups are cut and padded to what is allowed."""
        sequences = [Sequence(np.arange(300 * index, 300 * index + 300)) for index in range(3)]
        for sequence in sequences:
            sequence.num_tokens = 290
        batch = batch_of(*(sequence.rows([1]) for sequence in sequences))
        plan = plan_attention(batch, 4, 900, {8: (2, 4)})
        assert [group.is_hidden.shape[0] for group in plan.groups] == [4, 4, 2]
        assert {group.tile_rows for group in plan.groups} == {8}
        assert plan.groups[2].is_hidden[1].all(), "the ninth item is the last; the tenth is padding"
        assert plan.partials.shape == (4, 4)
        assert plan.is_padding[:3].sum() == 3, "three splits a sequence, padded to four"

    def test_the_counts_of_a_plan_change_no_bit(self, llama, monkeypatch):
        tokens = random_tokens(LONG)
        expected = run_chunks(llama, tokens, [90, 3])
        monkeypatch.setattr(llama, "_item_counts", {8: (2, 6), 32: (3,)})
        assert np.array_equal(run_chunks(llama, tokens, [90, 3]), expected)


class TestPagedKv:
    def kv(self) -> PagedKv:
        kv = PagedKv(tiny_weights().shape, 12, "float32", torch.device("cpu"))
        for pool in (*kv.keys, *kv.values):
            pool[:, :12] = torch.randn(2, 12, 16)
        return kv

    def test_overlapping_copies_read_before_they_write(self):
        kv = self.kv()
        before = [pool.clone() for pool in (*kv.keys, *kv.values)]
        kv.copy_slots(np.array([0, 1, 2, 3]), np.array([1, 2, 3, 0]))
        for pool, was in zip((*kv.keys, *kv.values), before, strict=True):
            assert torch.equal(pool[:, [1, 2, 3, 0]], was[:, [0, 1, 2, 3]])
            assert torch.equal(pool[:, 4:], was[:, 4:])

    def test_wire_order_is_k_then_v_token_major(self):
        kv, slots = self.kv(), np.array([7, 2, 9])
        wire = np.frombuffer(kv.read_wire(1, slots), dtype=np.float32).reshape(2, 3, 2, 16)
        for token, slot in enumerate(slots):
            assert np.array_equal(wire[0, token], kv.keys[1][:, slot].numpy())
            assert np.array_equal(wire[1, token], kv.values[1][:, slot].numpy())

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_round_trip(self, dtype):
        source = PagedKv(tiny_weights().shape, 12, dtype, torch.device("cpu"))
        target = PagedKv(tiny_weights().shape, 12, dtype, torch.device("cpu"))
        for pool in (*source.keys, *source.values):
            pool[:, :12] = torch.randn(2, 12, 16)
        read, written = np.array([3, 1, 8]), np.array([0, 11, 5])
        target.write_wire(0, written, memoryview(bytes(source.read_wire(0, read))))
        assert torch.equal(target.keys[0][:, written], source.keys[0][:, read])
        assert torch.equal(target.values[0][:, written], source.values[0][:, read])
        assert not target.keys[1].any()

    def test_what_was_read_survives_later_writes(self):
        kv = self.kv()
        data = kv.read_wire(0, np.array([4]))
        before = bytes(data)
        kv.copy_slots(np.array([5]), np.array([4]))
        assert bytes(data) == before

    @pytest.mark.parametrize("num_bytes", [0, 255, 257])
    def test_wrong_length_is_refused(self, num_bytes):
        with pytest.raises(ValueError, match=f"are 256 bytes, not {num_bytes}"):
            self.kv().write_wire(0, np.array([1]), memoryview(bytes(num_bytes)))


@pytest.mark.slow
def test_the_packaged_model_generates_what_the_reference_does():
    from megakernel.model.load import PACKAGED_MODEL, open_model

    opened = open_model(PACKAGED_MODEL)
    prompt = [1, 4093, 198, 504, 3575, 282, 4649, 314]
    expected = reference_generate(opened.weights, prompt, 32)
    model = TorchLlama(opened.weights)
    kv, sequence = model.new_kv(64), Sequence(scattered(64, seed=0))
    pending, generated = prompt, []
    while len(generated) < 32:
        batch = batch_of(sequence.rows(pending))
        logits = model.forward(kv, batch, np.array([len(pending) - 1]))
        sequence.num_tokens += len(pending)
        pending = [int(logits.argmax())]
        generated += pending
    assert generated == expected


@pytest.mark.slow
def test_rows_of_the_packaged_model_have_the_same_bits_in_any_company():
    from megakernel.model.load import PACKAGED_MODEL, open_model

    torch.set_num_threads(2)
    model = TorchLlama(open_model(PACKAGED_MODEL).weights)
    lengths, pool = [1, 40, 127, 128, 129, 300, 17, 260], scattered(1200, seed=0)
    kv, alone, rows, used = model.new_kv(1200), [], [], 0
    for index, length in enumerate(lengths):
        tokens = random_tokens(length + 1, seed=index)
        sequence = Sequence(pool[used : used + length + 1])
        used += length + 1
        model.forward(kv, batch_of(sequence.rows(tokens[:length])), NO_ROWS)
        sequence.num_tokens = length
        rows.append(sequence.rows(tokens[length:]))
        alone.append(model.forward(kv, batch_of(rows[-1]), np.array([0])).numpy())
    together = model.forward(kv, batch_of(*rows), np.arange(len(rows))).numpy()
    assert np.array_equal(together, np.concatenate(alone))
    tokens = random_tokens(300, seed=5)
    sequential = run_chunks(model, tokens, [299, 1])
    assert np.array_equal(run_chunks(model, tokens, [64]), sequential)
    assert np.array_equal(run_chunks(model, tokens[:40], [1]), sequential[:40])
