"""Asks the index, lets `placement.choose` decide, and keeps the session's record."""

import asyncio
import logging
from collections.abc import Sequence

import msgspec

from cluster.block_hash import chain_hashes, chain_salt
from cluster.config import PlacementConfig
from cluster.ids import ChainHash, SessionId, WorkerId
from cluster.messages import SessionRecord, WorkerRecord
from cluster.metrics import RouterMetrics
from cluster.placement.choose import (
    NO_HITS,
    HopPolicy,
    InsufficientKvError,
    NoWorkerError,
    Placement,
    PlacementRequest,
    choose,
    is_hop_worthwhile,
)
from cluster.placement.predict import PlacementCosts
from cluster.placement.store import IndexHits, PlacementStore, PlacementUnavailableError
from router.decode_pool import DecodePool, Directory
from router.errors import RequestError, invalid, unavailable
from router.sequence import PromptFacts, SequenceAsk

MAX_SESSION_WRITES = 256
SESSION_WRITE_TIMEOUT_S = 1.0

_log = logging.getLogger(__name__)


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """A placement with what dispatch must know of its decode worker."""

    placement: Placement
    request: PlacementRequest
    hits: IndexHits
    costs: PlacementCosts
    decode: WorkerRecord
    prefill: WorkerRecord | None

    def is_hop_worthwhile(self, held_tokens: int) -> bool:
        """Asked again when the decode worker has said how many of the prompt's tokens it holds."""
        if self.prefill is None:
            return False
        return is_hop_worthwhile(self.request, self.decode, self.prefill, held_tokens, self.hits, self.costs)


class Placer:
    def __init__(
        self,
        store: PlacementStore,
        directory: Directory,
        pool: DecodePool,
        config: PlacementConfig,
        costs: PlacementCosts,
        metrics: RouterMetrics,
    ) -> None:
        self._store = store
        self._directory = directory
        self._pool = pool
        self._config = config
        self._costs = costs
        self._metrics = metrics
        self._session_writes: set[asyncio.Task[None]] = set()

    async def look_up(
        self, prompt_token_ids: tuple[int, ...], tenant: str, session_id: SessionId | None
    ) -> PromptFacts:
        """What the index knows, or nothing where it does not answer in time."""
        workers = self._directory.snapshot("decode")
        if not workers:
            return PromptFacts(block_hashes=(), block_size_tokens=1, hits=NO_HITS)
        block_size = workers[0].block_size_tokens
        salt = chain_salt(workers[0].layout_fingerprint, tenant)
        hashes = tuple(chain_hashes(prompt_token_ids, block_size, salt))
        has_key = bool(hashes) or session_id is not None
        hits = await self._hits(hashes, session_id) if has_key else NO_HITS
        return PromptFacts(block_hashes=hashes, block_size_tokens=block_size, hits=hits)

    async def _hits(self, hashes: tuple[ChainHash, ...], session_id: SessionId | None) -> IndexHits:
        try:
            async with asyncio.timeout(self._config.lookup_timeout_s):
                return await self._store.lookup(hashes, session_id)
        except (PlacementUnavailableError, TimeoutError):
            self._metrics.placement_unavailable.inc()
            return NO_HITS

    def place(self, ask: SequenceAsk, excluded: frozenset[WorkerId]) -> Placed:
        """Raises NoWorkerError; RequestError where the request fits no worker's KV pool."""
        workers = self._pool.usable()
        request = PlacementRequest(
            request_id=ask.request_id,
            num_prompt_tokens=len(ask.prompt_token_ids),
            max_tokens=ask.sampling.max_tokens,
            block_hashes=ask.facts.block_hashes,
            block_size_tokens=ask.facts.block_size_tokens,
            session_id=ask.session_id,
            tenant=ask.tenant,
            excluded_workers=excluded,
            hop=ask.prefill_hop or HopPolicy(self._config.prefill_hop),
        )
        prefill_workers = self._directory.snapshot("prefill")
        try:
            placement = choose(request, workers, prefill_workers, ask.facts.hits, self._costs)
        except InsufficientKvError as error:
            raise insufficient_kv(error) from None
        decode = next(w for w in workers if w.address.worker_id == placement.decode.worker_id)
        prefill = next((w for w in prefill_workers if w.address == placement.prefill), None)
        self._metrics.placements.labels(placement.reason.value).inc()
        return Placed(
            placement=placement,
            request=request,
            hits=ask.facts.hits,
            costs=self._costs,
            decode=decode,
            prefill=prefill,
        )

    def remember_session(self, ask: SequenceAsk, placed: Placed, completion: Sequence[int]) -> None:
        """Record in the background where the session's KV now is: the first choice's, for all.

        Skipped while too many writes wait.
        """
        if ask.session_id is None or ask.choice > 0 or len(self._session_writes) >= MAX_SESSION_WRITES:
            return
        task = asyncio.create_task(self._write_session(ask.session_id, ask, placed, tuple(completion)))
        self._session_writes.add(task)
        task.add_done_callback(self._session_writes.discard)

    async def _write_session(
        self, session_id: SessionId, ask: SequenceAsk, placed: Placed, completion: tuple[int, ...]
    ) -> None:
        record = session_record(ask, placed, completion)
        try:
            async with asyncio.timeout(SESSION_WRITE_TIMEOUT_S):
                await self._store.put_session(session_id, record, round(self._config.session_ttl_s * 1_000))
        except (PlacementUnavailableError, TimeoutError) as error:
            _log.info("session record not written: %s", error)

    async def stop(self) -> None:
        """Let session writes under way end, or time out."""
        if self._session_writes:
            await asyncio.wait(tuple(self._session_writes))


def session_record(ask: SequenceAsk, placed: Placed, completion: tuple[int, ...]) -> SessionRecord:
    """KV is held of all tokens but the last, which was sampled and never run."""
    held = ask.prompt_token_ids + completion[:-1]
    salt = chain_salt(placed.decode.layout_fingerprint, ask.tenant)
    hashes = chain_hashes(held, placed.decode.block_size_tokens, salt)
    return SessionRecord(
        worker_id=placed.placement.decode.worker_id,
        epoch=placed.placement.decode.epoch,
        num_tokens=len(held),
        last_hash=hashes[-1] if hashes else None,
    )


def insufficient_kv(error: InsufficientKvError) -> RequestError:
    return invalid("max_tokens", f"{error}; ask for fewer tokens", code="context_length_exceeded")


def no_worker(error: NoWorkerError, refusals: list[str]) -> RequestError:
    said = f" (refused by {'; '.join(refusals)})" if refusals else ""
    return unavailable(f"{error}{said}", code="no_worker")
