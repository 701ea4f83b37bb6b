"""Chooses the workers of one request: pure, from the router's view of the cluster alone.

The lowest predicted TTFT wins. Session affinity and cached prefix are terms in that prediction (fewer
rows to run, fewer bytes to move), and so is the prefill hop: it happens where it is predicted cheaper.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import TypeVar

import msgspec

from cluster.ids import ChainHash, RequestId, SessionId, WorkerId
from cluster.messages import PROTOCOL_VERSION, WorkerAddress, WorkerRecord
from cluster.placement.predict import (
    PlacementCosts,
    StepTable,
    chain_ms,
    hop_ttft_ms,
    kv_wait_ms,
    local_ttft_ms,
    step_table,
    transfer_ms,
)
from cluster.placement.store import IndexHits

T = TypeVar("T", "_PrefillOption", "_Candidate")

NO_HITS = IndexHits(cached_blocks={}, session=None)
"""What to choose with where the store did not answer."""

# Read in place of step tables while no decode worker has published one: they order workers by load and
# cache, and send long prompts to prefill workers. Predictions made from them are not reported.
ASSUMED_DECODE_TABLE = StepTable(rows=(1, 64), ms=(2.0, 32.0))
ASSUMED_PREFILL_TABLE = StepTable(rows=(1, 256), ms=(2.0, 32.0))


class NoWorkerError(Exception):
    """No decode worker can take the request now; the message counts why. The router answers 503."""


class InsufficientKvError(Exception):
    """The request fits no decode worker's KV pool, now or later. The router answers 400."""

    def __init__(self, needed_tokens: int, limit_tokens: int) -> None:
        super().__init__(
            f"prompt and max_tokens need {needed_tokens} tokens of KV, "
            f"the largest decode worker holds {limit_tokens}"
        )
        self.needed_tokens = needed_tokens
        self.limit_tokens = limit_tokens


class PlacementReason(StrEnum):
    """What decided for the decode worker; a label of the placements metric."""

    SESSION = "session"
    """Cheapest, and it holds the session's KV."""
    CACHED_PREFIX = "cached_prefix"
    """Cheapest, and it holds a prefix of the prompt."""
    LOWEST_TTFT = "lowest_ttft"
    """Cheapest without any cached KV."""
    RENDEZVOUS = "rendezvous"
    """Several were equally cheap without cached KV: the hash of session and worker decided."""


class HopPolicy(StrEnum):
    """Whether the prefill hop is a matter of prediction."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"
    """Wherever a prefill worker can take it and there is something to bring."""


class PlacementRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What placement must know of a request."""

    request_id: RequestId
    num_prompt_tokens: int
    max_tokens: int
    block_hashes: tuple[ChainHash, ...] = ()
    """Of the prompt's full blocks, first to last (`block_hash.chain_hashes`)."""
    block_size_tokens: int = 16
    """The hashes are of blocks this long; a worker with another size has no use for them."""
    session_id: SessionId | None = None
    tenant: str = ""
    excluded_workers: frozenset[WorkerId] = frozenset()
    """Those that already failed this request."""
    hop: HopPolicy = HopPolicy.AUTO

    @property
    def needed_kv_tokens(self) -> int:
        return self.num_prompt_tokens + self.max_tokens


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    decode: WorkerAddress
    prefill: WorkerAddress | None
    """None: the decode worker runs the uncached suffix itself."""
    reason: PlacementReason
    predicted_ttft_ms: float | None
    """From now to the first token; None while no decode worker has published a step table."""
    cached_tokens: int
    """Prompt tokens whose KV the decode worker is said to hold."""
    computed_tokens: int
    """Prompt tokens left for `prefill` to compute or, without one, for `decode`: what to add to that
    worker's queue (`WorkerDirectory.local_adjust`) until its first token."""


class _PrefillOption(msgspec.Struct, frozen=True, kw_only=True):
    worker: WorkerRecord
    computed_tokens: int
    compute_ms: float
    """Its queue, then the prompt's tokens it does not hold."""


class _PrefillShortlist(msgspec.Struct, frozen=True, kw_only=True):
    """Enough of the options to find the best for any decode host, without comparing all pairs."""

    best_of_host: dict[str, _PrefillOption]
    first: _PrefillOption
    second: _PrefillOption | None
    """The best on another host than `first`'s."""

    def for_host(self, host_id: str) -> list[_PrefillOption]:
        """The best option on `host_id` and the best elsewhere, where there are such."""
        is_first_elsewhere = self.first.worker.address.host_id != host_id
        options = (self.best_of_host.get(host_id), self.first if is_first_elsewhere else self.second)
        return [option for option in options if option is not None]


class _Candidate(msgspec.Struct, frozen=True, kw_only=True):
    worker: WorkerRecord
    cached_tokens: int
    prefill: _PrefillOption | None
    ttft_ms: float


def choose(
    request: PlacementRequest,
    decode_workers: Sequence[WorkerRecord],
    prefill_workers: Sequence[WorkerRecord],
    hits: IndexHits,
    costs: PlacementCosts,
) -> Placement:
    """The decode worker with the lowest predicted TTFT, and a prefill worker where the hop is cheaper.

    Deterministic: equal predictions are settled by a rendezvous hash of (tenant, session or request,
    worker), whatever the order of the workers. Raises NoWorkerError, InsufficientKvError.
    """
    able = _able(request, decode_workers)
    if not able:
        raise NoWorkerError(_why_none(request, decode_workers))
    fitting = [worker for worker in able if worker.status.total_kv_tokens >= request.needed_kv_tokens]
    if not fitting:
        limit = max(worker.status.total_kv_tokens for worker in able)
        raise InsufficientKvError(request.needed_kv_tokens, limit)

    decode_tables = _tables(fitting)
    is_assumed = decode_tables is None
    if decode_tables is None:
        decode_tables = [ASSUMED_DECODE_TABLE] * len(fitting)
    shortlists = _prefill_shortlists(request, prefill_workers, hits, is_assumed=is_assumed)
    candidates = [
        _candidate(
            request,
            worker,
            table,
            shortlists.get(worker.layout_fingerprint),
            cached_tokens(request, worker, hits),
            costs,
        )
        for worker, table in zip(fitting, decode_tables, strict=True)
    ]
    best, is_tie = _cheapest(request, candidates, lambda candidate: candidate.ttft_ms)
    return Placement(
        decode=best.worker.address,
        prefill=best.prefill.worker.address if best.prefill else None,
        reason=_reason(request, best, hits, is_tie=is_tie),
        predicted_ttft_ms=None if is_assumed else best.ttft_ms,
        cached_tokens=best.cached_tokens,
        computed_tokens=(
            best.prefill.computed_tokens if best.prefill else request.num_prompt_tokens - best.cached_tokens
        ),
    )


def is_hop_worthwhile(
    request: PlacementRequest,
    decode: WorkerRecord,
    prefill: WorkerRecord,
    held_tokens: int,
    hits: IndexHits,
    costs: PlacementCosts,
) -> bool:
    """Whether a hop already chosen still pays, now that `decode` has said how much of the prompt it holds.

    The index may have known less: it was slow, or the worker's news had not reached it.
    """
    tables = _tables([decode])
    shortlists = _prefill_shortlists(request, [prefill], hits, is_assumed=tables is None)
    table = tables[0] if tables else ASSUMED_DECODE_TABLE
    shortlist = shortlists.get(decode.layout_fingerprint)
    return _candidate(request, decode, table, shortlist, held_tokens, costs).prefill is not None


def cached_tokens(request: PlacementRequest, worker: WorkerRecord, hits: IndexHits) -> int:
    """Leading prompt tokens whose KV `worker` is said to hold, by the index or by the session's record.

    Never the whole prompt: its last token is always run, for the first token's logits.
    """
    if worker.block_size_tokens != request.block_size_tokens:
        return 0
    blocks = min(hits.cached_blocks.get(worker.address.worker_id, 0), len(request.block_hashes))
    if _is_session_worker(worker, hits):
        blocks = max(blocks, _session_blocks(request, hits))
    return max(0, min(blocks * request.block_size_tokens, request.num_prompt_tokens - 1))


def _is_session_worker(worker: WorkerRecord, hits: IndexHits) -> bool:
    session, address = hits.session, worker.address
    return session is not None and session.worker_id == address.worker_id and session.epoch == address.epoch


def _session_blocks(request: PlacementRequest, hits: IndexHits) -> int:
    """Full blocks the session left, if the prompt continues it: an edited history matches nowhere."""
    last_hash = hits.session.last_hash if hits.session else None
    if last_hash is None or last_hash not in request.block_hashes:
        return 0
    return request.block_hashes.index(last_hash) + 1


def _able(request: PlacementRequest, workers: Sequence[WorkerRecord]) -> list[WorkerRecord]:
    return [
        worker
        for worker in workers
        if worker.status.is_accepting
        and worker.protocol_version == PROTOCOL_VERSION
        and worker.address.worker_id not in request.excluded_workers
    ]


def _why_none(request: PlacementRequest, workers: Sequence[WorkerRecord]) -> str:
    if not workers:
        return "no decode worker is registered"
    failed = sum(worker.address.worker_id in request.excluded_workers for worker in workers)
    skewed = sorted({w.protocol_version for w in workers if w.protocol_version != PROTOCOL_VERSION})
    closed = sum(not worker.status.is_accepting for worker in workers)
    versions = f", {skewed} spoken where protocol {PROTOCOL_VERSION} is needed" if skewed else ""
    return (
        f"none of {len(workers)} decode workers can take the request: "
        f"{closed} not accepting, {failed} already failed it{versions}"
    )


def _tables(workers: Sequence[WorkerRecord]) -> list[StepTable] | None:
    """A step table for each worker, or None where none has published one.

    A worker that has not is read as the slowest of its peers.
    """
    tables = [step_table(worker.status.step_table) for worker in workers]
    known = [table for table in tables if table is not None]
    if not known:
        return None
    slowest = max(known, key=lambda table: (table.ms[-1] / table.rows[-1], table.ms))
    return [table or slowest for table in tables]


def _prefill_shortlists(
    request: PlacementRequest, workers: Sequence[WorkerRecord], hits: IndexHits, *, is_assumed: bool
) -> dict[str, _PrefillShortlist]:
    """By layout fingerprint, the prefill workers worth comparing: KV passes only between equal layouts.

    Empty while decode's costs are known and prefill's are not: such a hop cannot be compared.
    """
    wanted = request.num_prompt_tokens - 1
    able = [w for w in _able(request, workers) if w.status.total_kv_tokens >= wanted]
    tables = [ASSUMED_PREFILL_TABLE] * len(able) if is_assumed else _tables(able)
    by_layout: dict[str, dict[str, list[_PrefillOption]]] = {}
    for worker, table in zip(able, tables or (), strict=False):
        computed = max(0, wanted - cached_tokens(request, worker, hits))
        compute_ms = chain_ms(table, max(0, worker.status.queued_tokens) + computed)
        option = _PrefillOption(worker=worker, computed_tokens=computed, compute_ms=compute_ms)
        by_layout.setdefault(worker.layout_fingerprint, {}).setdefault(worker.address.host_id, []).append(
            option
        )
    return {layout: _shortlist(request, by_host) for layout, by_host in by_layout.items()}


def _shortlist(request: PlacementRequest, by_host: dict[str, list[_PrefillOption]]) -> _PrefillShortlist:
    best_of_host = {host: _cheapest(request, options, _compute_ms)[0] for host, options in by_host.items()}
    first, _ = _cheapest(request, best_of_host.values(), _compute_ms)
    others = [option for option in best_of_host.values() if option is not first]
    second = _cheapest(request, others, _compute_ms)[0] if others else None
    return _PrefillShortlist(best_of_host=best_of_host, first=first, second=second)


def _compute_ms(option: _PrefillOption) -> float:
    return option.compute_ms


def _candidate(
    request: PlacementRequest,
    worker: WorkerRecord,
    table: StepTable,
    shortlist: _PrefillShortlist | None,
    cached: int,
    costs: PlacementCosts,
) -> _Candidate:
    """One decode worker, holding `cached` tokens of the prompt, with the cheaper of its two paths."""
    uncached = request.num_prompt_tokens - cached
    wait = kv_wait_ms(table, worker.status, needed_tokens=uncached + 1)
    local = local_ttft_ms(table, worker.status, uncached_tokens=uncached, kv_wait=wait)
    local_candidate = _Candidate(worker=worker, cached_tokens=cached, prefill=None, ttft_ms=local)
    if uncached <= 1 or shortlist is None or request.hop is HopPolicy.NEVER:
        return local_candidate

    def arrival_ms(option: _PrefillOption) -> float:
        is_same_host = option.worker.address.host_id == worker.address.host_id
        transfer = transfer_ms(costs, uncached - 1, is_same_host=is_same_host)
        return option.compute_ms + transfer + costs.handoff_overhead_ms

    option, _ = _cheapest(request, shortlist.for_host(worker.address.host_id), arrival_ms)
    hop = hop_ttft_ms(table, worker.status, arrival_ms=arrival_ms(option), kv_wait=wait)
    if hop < local or request.hop is HopPolicy.ALWAYS:
        return _Candidate(worker=worker, cached_tokens=cached, prefill=option, ttft_ms=hop)
    return local_candidate


def _cheapest(
    request: PlacementRequest,
    items: Iterable[T],
    cost: Callable[[T], float],
) -> tuple[T, bool]:
    """The item of lowest cost, and whether the rendezvous hash had to decide between several."""
    priced = [(cost(item), item) for item in items]
    lowest = min(price for price, _ in priced)
    tied = [item for price, item in priced if price == lowest]
    if len(tied) == 1:
        return tied[0], False
    key = f"{request.tenant}\0{request.session_id or request.request_id}"
    return max(tied, key=lambda item: rendezvous_score(key, item.worker.address.worker_id)), True


def rendezvous_score(key: str, worker_id: WorkerId) -> bytes:
    """Highest wins: each key keeps its worker while that worker lives, and keys spread evenly."""
    text = f"{key}\0{worker_id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def _reason(request: PlacementRequest, best: _Candidate, hits: IndexHits, *, is_tie: bool) -> PlacementReason:
    if best.cached_tokens and _is_session_worker(best.worker, hits) and _session_blocks(request, hits):
        return PlacementReason.SESSION
    if best.cached_tokens:
        return PlacementReason.CACHED_PREFIX
    return PlacementReason.RENDEZVOUS if is_tie else PlacementReason.LOWEST_TTFT
