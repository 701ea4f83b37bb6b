import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.ids import ChainHash, Epoch, RequestId, SessionId, WorkerId
from cluster.messages import (
    PROTOCOL_VERSION,
    Role,
    SessionRecord,
    StepCost,
    WorkerAddress,
    WorkerRecord,
    WorkerStatus,
)
from cluster.placement.choose import (
    NO_HITS,
    HopPolicy,
    InsufficientKvError,
    NoWorkerError,
    Placement,
    PlacementReason,
    PlacementRequest,
    choose,
    is_hop_worthwhile,
    rendezvous_score,
)
from cluster.placement.predict import PlacementCosts
from cluster.placement.store import IndexHits

BLOCK = 16
DECODE_TABLE = ((1, 2.0), (64, 20.0))
PREFILL_TABLE = ((1, 2.0), (256, 6.0))
COSTS = PlacementCosts(kv_bytes_per_token=50_000)


def worker(
    worker_id: str,
    role: Role = "decode",
    *,
    table: tuple[tuple[int, float], ...] | None = None,
    epoch: int = 1,
    host: str = "host",
    layout: str = "layout",
    protocol: int = PROTOCOL_VERSION,
    block_size: int = BLOCK,
    **status: int | bool,
) -> WorkerRecord:
    entries = (DECODE_TABLE if role == "decode" else PREFILL_TABLE) if table is None else table
    facts = {"total_kv_tokens": 8192, "free_kv_tokens": 8192} | status
    return WorkerRecord(
        address=WorkerAddress(
            worker_id=WorkerId(worker_id), epoch=Epoch(epoch), grpc_address="h:1", host_id=host
        ),
        role=role,
        model="m",
        protocol_version=protocol,
        layout_fingerprint=layout,
        block_size_tokens=block_size,
        status=WorkerStatus(step_table=tuple(StepCost(rows=r, ms=ms) for r, ms in entries), **facts),
    )


def prefill(worker_id: str, **facts) -> WorkerRecord:
    return worker(worker_id, "prefill", **facts)


def request(num_prompt_tokens: int = 100, **facts) -> PlacementRequest:
    num_blocks = num_prompt_tokens // BLOCK
    defaults = {
        "request_id": RequestId("r"),
        "max_tokens": 16,
        "block_hashes": tuple(ChainHash(f"{i:016d}".encode()) for i in range(num_blocks)),
    }
    return PlacementRequest(num_prompt_tokens=num_prompt_tokens, **(defaults | facts))


def held(**cached_blocks: int) -> IndexHits:
    return IndexHits(cached_blocks={WorkerId(w): n for w, n in cached_blocks.items()}, session=None)


def session(worker_id: str, blocks: int, epoch: int = 1) -> IndexHits:
    last_hash = ChainHash(f"{blocks - 1:016d}".encode()) if blocks else None
    record = SessionRecord(
        worker_id=WorkerId(worker_id), epoch=Epoch(epoch), num_tokens=blocks * BLOCK + 3, last_hash=last_hash
    )
    return IndexHits(cached_blocks={}, session=record)


def place(
    decode: list[WorkerRecord],
    prefill_workers: list[WorkerRecord] | None = None,
    hits: IndexHits = NO_HITS,
    asked: PlacementRequest | None = None,
    costs: PlacementCosts = COSTS,
) -> Placement:
    return choose(asked or request(), decode, prefill_workers or [], hits, costs)


# Which decode worker


@pytest.mark.parametrize(
    ("workers", "hits", "chosen", "reason"),
    [
        ([worker("a"), worker("b", queued_tokens=500)], NO_HITS, "a", PlacementReason.LOWEST_TTFT),
        ([worker("a", running_requests=32), worker("b")], NO_HITS, "b", PlacementReason.LOWEST_TTFT),
        ([worker("a", queued_requests=32), worker("b")], NO_HITS, "b", PlacementReason.LOWEST_TTFT),
        ([worker("a"), worker("b", table=((1, 1.0), (64, 5.0)))], NO_HITS, "b", PlacementReason.LOWEST_TTFT),
        ([worker("a", free_kv_tokens=0), worker("b")], NO_HITS, "b", PlacementReason.LOWEST_TTFT),
        # Cache is a term, not a rule: it wins among equals and loses against a long queue.
        ([worker("a"), worker("b")], held(b=3), "b", PlacementReason.CACHED_PREFIX),
        ([worker("a"), worker("b")], held(a=2, b=5), "b", PlacementReason.CACHED_PREFIX),
        ([worker("a"), worker("b", queued_tokens=2000)], held(b=5), "a", PlacementReason.LOWEST_TTFT),
        ([worker("a"), worker("b")], session("b", 4), "b", PlacementReason.SESSION),
        ([worker("a"), worker("b", queued_tokens=2000)], session("b", 4), "a", PlacementReason.LOWEST_TTFT),
    ],
)
def test_the_lowest_predicted_ttft_wins(
    workers: list[WorkerRecord], hits: IndexHits, chosen: str, reason: PlacementReason
) -> None:
    placement = place(workers, hits=hits)
    assert (placement.decode.worker_id, placement.reason) == (chosen, reason)
    assert placement.predicted_ttft_ms is not None
    assert placement.predicted_ttft_ms > 0


@pytest.mark.parametrize(
    ("hits", "prompt", "cached"),
    [
        (NO_HITS, 100, 0),
        (held(a=3), 100, 48),
        # The last token is always run, so a prompt is never cached whole.
        (held(a=6), 96, 95),
        (held(a=1), 16, 15),
        # More blocks than the prompt has: an index that is wrong.
        (held(a=600), 100, 96),
        (session("a", 4), 100, 64),
        # The session's worker died and came back without its KV.
        (session("a", 4, epoch=7), 100, 0),
        # The prompt does not continue the session: its last hash is none of the prompt's.
        (session("a", 50), 100, 0),
        (session("a", 0), 100, 0),
        (session("b", 4), 100, 0),
        (msgspec.structs.replace(session("a", 4), cached_blocks={WorkerId("a"): 5}), 100, 80),
        (msgspec.structs.replace(session("a", 4), cached_blocks={WorkerId("a"): 1}), 100, 64),
    ],
)
def test_cached_tokens(hits: IndexHits, prompt: int, cached: int) -> None:
    placement = place([worker("a")], hits=hits, asked=request(prompt))
    assert placement.cached_tokens == cached
    assert placement.computed_tokens == prompt - cached


def test_hits_of_another_block_size_do_not_count() -> None:
    assert place([worker("a", block_size=32)], hits=held(a=3)).cached_tokens == 0


# Whether there is a prefill hop


@pytest.mark.parametrize(
    ("prompt", "decode", "prefill_workers", "hits", "chosen"),
    [
        # Short: a step or two of the decode worker beat the hop's overhead.
        (8, worker("d"), [prefill("p")], NO_HITS, None),
        (1, worker("d"), [prefill("p")], NO_HITS, None),
        (2000, worker("d"), [prefill("p")], NO_HITS, "p"),
        # Long, but cached: the suffix is what counts.
        (2000, worker("d"), [prefill("p")], held(d=124), None),
        (2000, worker("d"), [prefill("p", queued_tokens=50_000)], NO_HITS, None),
        # The decode worker's queue drains while prefill computes.
        (300, worker("d", queued_tokens=300), [prefill("p")], NO_HITS, "p"),
        (2000, worker("d"), [prefill("p", table=((1, 9.0), (64, 90.0)))], NO_HITS, None),
        (2000, worker("d"), [prefill("p", table=())], NO_HITS, None),
        (2000, worker("d"), [prefill("p", layout="other")], NO_HITS, None),
        (2000, worker("d"), [prefill("p", is_accepting=False)], NO_HITS, None),
        (2000, worker("d"), [prefill("p", protocol=99)], NO_HITS, None),
        (2000, worker("d"), [prefill("p", total_kv_tokens=1998)], NO_HITS, None),
        (2000, worker("d"), [prefill("p", total_kv_tokens=1999)], NO_HITS, "p"),
        (2000, worker("d"), [], NO_HITS, None),
        (2000, worker("d"), [prefill("p", queued_tokens=900), prefill("q")], NO_HITS, "q"),
        (2000, worker("d"), [prefill("p"), prefill("q")], held(p=100), "p"),
        (2000, worker("d"), [prefill("p", table=()), prefill("q")], held(p=100), "p"),
        # The same host's shared memory beats a little more queue behind a slower link; not a lot more.
        (2000, worker("d"), [prefill("p", host="far"), prefill("q", queued_tokens=256)], NO_HITS, "q"),
        (2000, worker("d"), [prefill("p", host="far"), prefill("q", queued_tokens=9999)], NO_HITS, "p"),
        (2000, worker("d", host="x"), [prefill("p", host="y"), prefill("q", host="z", queued_tokens=1)],
         NO_HITS, "p"),
    ],
)  # fmt: skip
def test_the_hop_happens_where_it_is_cheaper(
    prompt: int,
    decode: WorkerRecord,
    prefill_workers: list[WorkerRecord],
    hits: IndexHits,
    chosen: str | None,
) -> None:
    placement = place([decode], prefill_workers, hits, request(prompt))
    assert (placement.prefill.worker_id if placement.prefill else None) == chosen


def test_a_hop_leaves_the_last_token_and_what_prefill_holds() -> None:
    placement = place([worker("d")], [prefill("p")], held(p=100, d=2), request(2000))
    assert placement.prefill is not None
    assert (placement.cached_tokens, placement.computed_tokens) == (32, 1999 - 1600)


@pytest.mark.parametrize(
    ("prompt", "policy", "chosen"),
    [
        (2000, HopPolicy.AUTO, "p"),
        (2000, HopPolicy.NEVER, None),
        (2, HopPolicy.AUTO, None),
        (2, HopPolicy.ALWAYS, "p"),
        (1, HopPolicy.ALWAYS, None),  # the only token runs on the decode worker: nothing to bring
    ],
)
def test_a_policy_overrides_the_prediction(prompt: int, policy: HopPolicy, chosen: str | None) -> None:
    placement = place([worker("d")], [prefill("p")], asked=request(prompt, hop=policy))
    assert (placement.prefill.worker_id if placement.prefill else None) == chosen


@pytest.mark.parametrize(
    ("held_tokens", "policy", "is_worthwhile"),
    [
        (0, HopPolicy.AUTO, True),
        (1995, HopPolicy.AUTO, False),
        (1995, HopPolicy.ALWAYS, True),
        (1999, HopPolicy.ALWAYS, False),
        (0, HopPolicy.NEVER, False),
    ],
)
def test_a_hop_is_asked_about_again_with_what_decode_really_holds(
    held_tokens: int, policy: HopPolicy, is_worthwhile: bool
) -> None:
    asked = request(2000, hop=policy)
    verdict = is_hop_worthwhile(asked, worker("d"), prefill("p"), held_tokens, NO_HITS, COSTS)
    assert verdict is is_worthwhile


def test_a_hop_can_decide_for_another_decode_worker() -> None:
    """The worker whose layout matches a prefill worker wins over an equal one that must run all rows."""
    workers = [worker("a", layout="old"), worker("b")]
    placement = place(workers, [prefill("p")], asked=request(2000))
    assert placement.prefill is not None
    assert (placement.decode.worker_id, placement.prefill.worker_id) == ("b", "p")


# Nothing known


def test_without_step_tables_nothing_is_predicted() -> None:
    workers = [worker("a", table=()), worker("b", table=(), queued_tokens=50)]
    placement = place(workers, [prefill("p", table=())])
    assert placement.decode.worker_id == "a"
    assert placement.predicted_ttft_ms is None


def test_without_step_tables_long_prompts_hop_and_short_ones_do_not() -> None:
    for prompt, hops in ((2000, True), (8, False)):
        placement = place([worker("d", table=())], [prefill("p", table=())], asked=request(prompt))
        assert (placement.prefill is not None) == hops


def test_a_worker_without_a_table_is_read_as_its_slowest_peer() -> None:
    slow = ((1, 5.0), (64, 50.0))
    assert place([worker("a", table=()), worker("b"), worker("c", table=slow)]).decode.worker_id == "b"
    queued = [worker("a", table=()), worker("b", queued_tokens=5000)]
    assert place(queued).decode.worker_id == "a"


def test_equal_workers_share_sessions_by_rendezvous() -> None:
    workers = [worker(f"w{i}") for i in range(4)]
    chosen = {}
    for number in range(200):
        placement = place(workers, asked=request(session_id=SessionId(f"s{number}")))
        assert placement.reason == PlacementReason.RENDEZVOUS
        chosen[number] = placement.decode.worker_id
    counts = [list(chosen.values()).count(w.address.worker_id) for w in workers]
    assert min(counts) > 20
    # Sessions of the remaining workers stay where they were when one leaves.
    for number, worker_id in chosen.items():
        if worker_id != "w0":
            asked = request(session_id=SessionId(f"s{number}"), request_id=RequestId("other"))
            assert place(workers[1:], asked=asked).decode.worker_id == worker_id


def test_a_request_without_session_is_spread_by_its_id() -> None:
    workers = [worker(f"w{i}") for i in range(4)]
    chosen = {
        place(workers, asked=request(request_id=RequestId(f"r{i}"))).decode.worker_id for i in range(40)
    }
    assert len(chosen) == 4


def test_any_text_can_be_hashed() -> None:
    assert rendezvous_score("\ud800", WorkerId("w")) != rendezvous_score("\ud801", WorkerId("w"))


# Nobody can


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ([], "no decode worker is registered"),
        ([worker("a", is_accepting=False)], "1 not accepting"),
        ([worker("a", protocol=99)], rf"\[99\] spoken where protocol {PROTOCOL_VERSION} is needed"),
        ([worker("failed")], "1 already failed it"),
    ],
)
def test_no_worker_says_why(workers: list[WorkerRecord], message: str) -> None:
    with pytest.raises(NoWorkerError, match=message):
        place(workers, asked=request(excluded_workers=frozenset({WorkerId("failed")})))


def test_excluded_workers_are_chosen_for_neither_role() -> None:
    asked = request(2000, excluded_workers=frozenset({WorkerId("d1"), WorkerId("p1")}))
    placement = place([worker("d1"), worker("d2")], [prefill("p1")], asked=asked)
    assert placement.decode.worker_id == "d2"
    assert placement.prefill is None


def test_a_request_that_fits_nowhere_names_the_limit() -> None:
    workers = [worker("a", total_kv_tokens=64), worker("b", total_kv_tokens=115)]
    with pytest.raises(InsufficientKvError, match=r"need 116 tokens.*holds 115") as caught:
        place(workers)
    assert (caught.value.needed_tokens, caught.value.limit_tokens) == (116, 115)


def test_a_worker_too_small_for_the_request_is_passed_over() -> None:
    workers = [worker("small", total_kv_tokens=115), worker("large", total_kv_tokens=116, queued_tokens=999)]
    assert place(workers, hits=held(small=6)).decode.worker_id == "large"


# Whatever the cluster


@st.composite
def step_tables(draw: st.DrawFn) -> tuple[tuple[int, float], ...]:
    milliseconds = st.floats(0.01, 100, allow_nan=False)
    return tuple(draw(st.dictionaries(st.integers(1, 256), milliseconds, min_size=1, max_size=5)).items())


@st.composite
def workers(draw: st.DrawFn, role: Role) -> list[WorkerRecord]:
    return [
        worker(
            f"{role}{i}",
            role,
            table=draw(step_tables()),
            host=draw(st.sampled_from(["x", "y", "z"])),
            layout=draw(st.sampled_from(["layout", "layout", "other"])),
            protocol=draw(st.sampled_from([PROTOCOL_VERSION] * 4 + [99])),
            is_accepting=draw(st.sampled_from([True, True, True, False])),
            queued_tokens=draw(st.integers(0, 4000)),
            queued_requests=draw(st.integers(0, 50)),
            running_requests=draw(st.integers(0, 100)),
            free_kv_tokens=draw(st.integers(0, 8192)),
            total_kv_tokens=draw(st.sampled_from([64, 1024, 8192])),
        )
        for i in range(draw(st.integers(0, 5)))
    ]


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    asked: PlacementRequest
    decode: list[WorkerRecord]
    prefill: list[WorkerRecord]
    hits: IndexHits

    def choose(self, costs: PlacementCosts = COSTS) -> Placement:
        return choose(self.asked, self.decode, self.prefill, self.hits, costs)

    def chosen(self, costs: PlacementCosts = COSTS) -> Placement:
        try:
            return self.choose(costs)
        except (NoWorkerError, InsufficientKvError):
            assume(False)
            raise


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    decode, prefills = draw(workers("decode")), draw(workers("prefill"))
    prompt = draw(st.integers(1, 2000))
    ids = [w.address.worker_id for w in (*decode, *prefills)]
    blocks = st.dictionaries(st.sampled_from(ids), st.integers(0, 130)) if ids else st.just({})
    return Cluster(
        asked=request(prompt, request_id=RequestId(draw(st.text(max_size=4)))),
        decode=decode,
        prefill=prefills,
        hits=IndexHits(cached_blocks=draw(blocks), session=None),
    )


@given(clusters())
def test_only_able_workers_are_chosen(cluster: Cluster) -> None:
    placement = cluster.chosen()
    by_id = {w.address.worker_id: w for w in (*cluster.decode, *cluster.prefill)}
    decode = by_id[placement.decode.worker_id]
    assert decode.role == "decode"
    assert decode.status.is_accepting
    assert decode.protocol_version == PROTOCOL_VERSION
    assert decode.status.total_kv_tokens >= cluster.asked.needed_kv_tokens
    assert 0 <= placement.cached_tokens < cluster.asked.num_prompt_tokens
    if placement.prefill is not None:
        chosen = by_id[placement.prefill.worker_id]
        assert chosen.role == "prefill"
        assert chosen.status.is_accepting
        assert chosen.protocol_version == PROTOCOL_VERSION
        assert chosen.layout_fingerprint == decode.layout_fingerprint


@given(clusters(), st.randoms(use_true_random=False))
def test_the_order_of_the_workers_does_not_matter(cluster: Cluster, random) -> None:
    placement = cluster.chosen()
    decode, prefills = list(cluster.decode), list(cluster.prefill)
    random.shuffle(decode)
    random.shuffle(prefills)
    assert choose(cluster.asked, decode, prefills, cluster.hits, COSTS) == placement


@given(clusters(), st.integers(1, 130))
def test_more_cache_never_makes_a_worker_less_preferred(cluster: Cluster, more: int) -> None:
    before = cluster.chosen()
    chosen = before.decode.worker_id
    grown = dict(cluster.hits.cached_blocks)
    grown[chosen] = grown.get(chosen, 0) + more
    after = msgspec.structs.replace(cluster, hits=IndexHits(cached_blocks=grown, session=None)).choose()
    assert after.decode.worker_id == chosen
    assert after.predicted_ttft_ms <= before.predicted_ttft_ms


@given(clusters(), st.integers(1, 4000))
def test_a_longer_queue_elsewhere_changes_nothing(cluster: Cluster, more: int) -> None:
    before = cluster.chosen()
    others = [
        w
        if w.address == before.decode
        else msgspec.structs.replace(
            w, status=msgspec.structs.replace(w.status, queued_tokens=w.status.queued_tokens + more)
        )
        for w in cluster.decode
    ]
    after = choose(cluster.asked, others, cluster.prefill, cluster.hits, COSTS)
    assert after.decode == before.decode


@given(clusters(), st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_scaling_all_costs_keeps_the_choice(cluster: Cluster, factor: float) -> None:
    """Powers of two, which scale floating-point numbers exactly."""

    def scaled(record: WorkerRecord) -> WorkerRecord:
        table = tuple(StepCost(rows=c.rows, ms=c.ms * factor) for c in record.status.step_table)
        return msgspec.structs.replace(
            record, status=msgspec.structs.replace(record.status, step_table=table)
        )

    before = cluster.chosen()
    after = choose(
        cluster.asked,
        [scaled(w) for w in cluster.decode],
        [scaled(w) for w in cluster.prefill],
        cluster.hits,
        PlacementCosts(
            kv_bytes_per_token=COSTS.kv_bytes_per_token,
            link_bytes_per_s=COSTS.link_bytes_per_s / factor,
            shared_memory_bytes_per_s=COSTS.shared_memory_bytes_per_s / factor,
            handoff_overhead_ms=COSTS.handoff_overhead_ms * factor,
        ),
    )
    assert (after.decode, after.prefill, after.reason) == (before.decode, before.prefill, before.reason)


@given(clusters())
def test_the_shortlist_finds_what_comparing_all_pairs_finds(cluster: Cluster) -> None:
    best = cluster.chosen()
    assert best.predicted_ttft_ms is not None
    for decode in cluster.decode:
        for one in ([], *([p] for p in cluster.prefill)):
            try:
                pair = choose(cluster.asked, [decode], one, cluster.hits, COSTS)
            except (NoWorkerError, InsufficientKvError):
                continue
            assert pair.predicted_ttft_ms >= best.predicted_ttft_ms
