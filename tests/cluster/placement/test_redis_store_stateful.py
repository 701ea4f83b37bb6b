"""Any sequence of transitions leaves Redis saying what a model in plain Python says."""

import asyncio
import contextlib
import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cluster.ids import ChainHash, Epoch, SessionId, WorkerId
from cluster.messages import PROTOCOL_VERSION, SessionRecord, WorkerAddress, WorkerStatus
from cluster.placement.embedded import EmbeddedRedis
from cluster.placement.redis_store import RedisPlacementStore, connect
from cluster.placement.store import LeaseLostError, WorkerIdentity

TTL_MS = 600_000
WORKERS = [WorkerId(name) for name in ("a", "b")]
CHAIN = [ChainHash(f"{i:016d}".encode()) for i in range(3)]
SESSIONS = [SessionId(name) for name in ("s", "t")]

workers = st.sampled_from(WORKERS)
hash_sets = st.one_of(st.just(CHAIN), st.sets(st.sampled_from(CHAIN)).map(sorted))
few_hashes = st.one_of(st.just([]), st.sets(st.sampled_from(CHAIN), max_size=1).map(sorted))
# How many epochs ago: mostly the one in force, sometimes one that was fenced off.
ages = st.sampled_from([0, 0, 0, 1, 2])

_model_numbers = itertools.count()


class PlacementMachine(RuleBasedStateMachine):
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client = connect(self.url)
        name = f"stateful-{next(_model_numbers)}"
        self.store = RedisPlacementStore(self.client, name, block_ttl_s=600.0, op_timeout_s=5.0)
        self.leases: dict[WorkerId, tuple[Epoch, WorkerStatus]] = {}
        self.highest: dict[WorkerId, Epoch] = {}
        self.given: dict[WorkerId, list[Epoch]] = {worker: [] for worker in WORKERS}
        self.entries: dict[tuple[ChainHash, WorkerId], Epoch] = {}
        self.sessions: dict[SessionId, SessionRecord] = {}

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def address(self, worker: WorkerId, age: int) -> WorkerAddress:
        """Of a past or present incarnation; epoch 0 where there were not so many."""
        given = self.given[worker]
        epoch = given[-1 - age] if age < len(given) else Epoch(0)
        return WorkerAddress(worker_id=worker, epoch=epoch, grpc_address="h:1", host_id="host")

    def holds_lease(self, address: WorkerAddress) -> bool:
        lease = self.leases.get(address.worker_id)
        return lease is not None and lease[0] == address.epoch

    def expects(self, address: WorkerAddress) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.holds_lease(address) else pytest.raises(LeaseLostError)

    @rule(worker=workers, floor=st.integers(0, 40), queued=st.integers(0, 9))
    def register(self, worker: WorkerId, floor: int, queued: int) -> None:
        identity = WorkerIdentity(
            worker_id=worker,
            role="decode",
            model="m",
            grpc_address="h:1",
            host_id="host",
            protocol_version=PROTOCOL_VERSION,
            layout_fingerprint="layout",
            block_size_tokens=16,
        )
        status = WorkerStatus(queued_tokens=queued)
        # As a worker does it: never below an epoch it had, so that a flush cannot bring one back.
        floor = max([floor, *(epoch + 1 for epoch in self.given[worker])])
        address = self.runner.run(self.store.register(identity, status, TTL_MS, floor=Epoch(floor)))
        assert address.epoch == max(self.highest.get(worker, 0) + 1, floor)
        self.highest[worker] = address.epoch
        self.given[worker].append(address.epoch)
        self.leases[worker] = (address.epoch, status)

    @rule(worker=workers, age=ages, queued=st.integers(0, 9))
    def renew(self, worker: WorkerId, age: int, queued: int) -> None:
        address, status = self.address(worker, age), WorkerStatus(queued_tokens=queued)
        with self.expects(address):
            self.runner.run(self.store.renew(address, status, TTL_MS))
            self.leases[worker] = (address.epoch, status)

    @rule(worker=workers, age=ages)
    def release(self, worker: WorkerId, age: int) -> None:
        address = self.address(worker, age)
        self.runner.run(self.store.release(address))
        if self.holds_lease(address):
            del self.leases[worker]

    @rule(worker=workers, age=ages, stored=hash_sets, removed=few_hashes)
    def publish(self, worker: WorkerId, age: int, stored: list[ChainHash], removed: list[ChainHash]) -> None:
        if not stored and not removed:
            return
        address = self.address(worker, age)
        with self.expects(address):
            self.runner.run(self.store.publish_blocks(worker, address.epoch, stored, removed))
            self.entries.update({(chain_hash, worker): address.epoch for chain_hash in stored})
            for chain_hash in removed:
                self.entries.pop((chain_hash, worker), None)

    @rule(session=st.sampled_from(SESSIONS), worker=workers, num_tokens=st.integers(0, 99))
    def put_session(self, session: SessionId, worker: WorkerId, num_tokens: int) -> None:
        record = SessionRecord(
            worker_id=worker, epoch=self.address(worker, 0).epoch, num_tokens=num_tokens, last_hash=None
        )
        self.runner.run(self.store.put_session(session, record, TTL_MS))
        self.sessions[session] = record

    @initialize()
    def start_with_full_caches(self) -> None:
        self.all_workers_come_and_fill_their_caches()

    @rule()
    def all_workers_come_and_fill_their_caches(self) -> None:
        for worker in WORKERS:
            self.register(worker, 0, 0)
            self.publish(worker, 0, CHAIN, [])

    @rule(lost=st.one_of(workers, st.sampled_from(CHAIN), st.sampled_from(SESSIONS), st.just("everything")))
    def something_is_lost(self, lost: WorkerId | ChainHash | SessionId | str) -> None:
        if lost in WORKERS:
            self.lease_expires(WorkerId(str(lost)))
        elif isinstance(lost, bytes):
            self.block_expires(lost)
        elif lost in SESSIONS:
            self.session_expires(SessionId(lost))
        else:
            self.redis_is_flushed()

    def lease_expires(self, worker: WorkerId) -> None:
        # An expiry in the past deletes at once, as Redis does at the end of a TTL.
        self.runner.run(self.client.pexpire(self.store._lease_keys(worker)[0], -1))
        self.leases.pop(worker, None)

    def block_expires(self, chain_hash: ChainHash) -> None:
        self.runner.run(self.client.pexpire(self.store._block_key(chain_hash), -1))
        self.entries = {key: epoch for key, epoch in self.entries.items() if key[0] != chain_hash}

    def session_expires(self, session: SessionId) -> None:
        self.runner.run(self.client.pexpire(self.store._session_key(session), -1))
        self.sessions.pop(session, None)

    def redis_is_flushed(self) -> None:
        keys = self.runner.run(self.client.keys(self.store._prefix + b"*"))
        if keys:
            self.runner.run(self.client.delete(*keys))
        for forgotten in (self.leases, self.highest, self.entries, self.sessions):
            forgotten.clear()

    @invariant()
    def the_chain_is_found(self) -> None:
        self.lookup(len(CHAIN), SESSIONS[0])

    @rule(length=st.integers(0, len(CHAIN)), session=st.sampled_from([None, *SESSIONS]))
    def lookup(self, length: int, session: SessionId | None) -> None:
        hits = self.runner.run(self.store.lookup(CHAIN[:length], session))
        assert hits.session == (self.sessions.get(session) if session else None)
        expected = {}
        for worker, (epoch, _) in self.leases.items():
            held = (self.entries.get((chain_hash, worker)) == epoch for chain_hash in CHAIN[:length])
            blocks = sum(1 for _ in itertools.takewhile(bool, held))
            if blocks:
                expected[worker] = blocks
        assert hits.cached_blocks == expected

    @invariant()
    def the_living_are_listed(self) -> None:
        records = self.runner.run(self.store.workers())
        listed = {record.address.worker_id: (record.address.epoch, record.status) for record in records}
        assert listed == self.leases


def test_redis_says_what_the_model_says(redis_server: EmbeddedRedis) -> None:
    class Machine(PlacementMachine):
        url = redis_server.url

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
