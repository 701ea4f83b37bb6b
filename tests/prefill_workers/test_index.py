"""What prefill workers announce: found in a real index, and the hop goes to who holds the prompt."""

from collections.abc import Iterator

import pytest

from cluster.block_hash import chain_hashes, chain_salt
from cluster.config import PrefillConfig, TransferConfig
from cluster.ids import RequestId, WorkerId
from cluster.membership import LeaseKeeper
from cluster.messages import PROTOCOL_VERSION, Role, StepCost, WorkerStatus
from cluster.placement.choose import PlacementRequest, choose
from cluster.placement.embedded import EmbeddedRedis
from cluster.placement.predict import PlacementCosts
from cluster.placement.redis_store import RedisPlacementStore, connect
from cluster.placement.store import WorkerIdentity
from prefill_workers.engine import PrefillEngine
from prefill_workers.torch_engine import TorchPrefillEngine
from prefill_workers.worker import PrefillWorker
from tests.cluster.test_membership import eventually
from tests.prefill_workers.exports import Exported, job, random_tokens
from tests.prefill_workers.test_trtllm import WEIGHTS, Rig, keep

INDEX_BLOCK = 16
STATUS = WorkerStatus(
    total_kv_tokens=4000,
    free_kv_tokens=4000,
    step_table=(StepCost(rows=1, ms=2.0), StepCost(rows=64, ms=9.0)),
)


@pytest.fixture
def torch_engine() -> TorchPrefillEngine:
    return TorchPrefillEngine(WEIGHTS, "tiny", 400, INDEX_BLOCK, 256, 1)


@pytest.fixture(params=["torch", "tensorrt"])
def engine(request, torch_engine) -> Iterator[PrefillEngine]:
    made = torch_engine if request.param == "torch" else Rig(torch_engine.layout).engine
    yield made
    made.close()


async def test_the_hop_goes_to_the_prefill_worker_that_holds_the_prompt(engine, torch_engine) -> None:
    one = job("one", random_tokens(300), tenant="mine")
    engine.admit(one, keep(Exported(engine.layout)))
    while not engine.step():
        pass
    engine.release(one.request_id)
    worker = PrefillWorker(
        engine,
        vocab_size=160,
        max_context_tokens=4000,
        config=PrefillConfig(max_tokens_per_step=64),
        transfer=TransferConfig(),
    )
    fingerprint = torch_engine.layout.fingerprint

    def identity(name: str, role: Role, block_size_tokens: int) -> WorkerIdentity:
        return WorkerIdentity(
            worker_id=WorkerId(name),
            role=role,
            model="m",
            grpc_address="h:1",
            host_id="host",
            protocol_version=PROTOCOL_VERSION,
            layout_fingerprint=fingerprint,
            block_size_tokens=block_size_tokens,
        )

    with EmbeddedRedis() as server:
        store = RedisPlacementStore(connect(server.url), "m", block_ttl_s=60.0, op_timeout_s=5.0)
        keepers = [
            LeaseKeeper(
                store,
                identity("p-holds", "prefill", worker.index_block_tokens),
                lambda: STATUS,
                drain_blocks=worker.drain_block_changes,
                all_blocks=worker.all_block_hashes,
            ),
            *(
                LeaseKeeper(store, identity(name, role, INDEX_BLOCK), lambda: STATUS)
                for name, role in (("p-a", "prefill"), ("p-z", "prefill"), ("d", "decode"))
            ),
        ]
        for keeper in keepers:
            await keeper.start()
        hashes = chain_hashes(one.token_ids, INDEX_BLOCK, chain_salt(fingerprint, "mine"))

        async def is_held() -> bool:
            hits = await store.lookup(hashes, None)
            return hits.cached_blocks == {"p-holds": 288 // INDEX_BLOCK}

        await eventually(is_held)
        records = await store.workers()
        placement = choose(
            PlacementRequest(
                request_id=RequestId("r"),
                num_prompt_tokens=300,
                max_tokens=8,
                block_hashes=tuple(hashes),
                block_size_tokens=INDEX_BLOCK,
                tenant="mine",
            ),
            [record for record in records if record.role == "decode"],
            [record for record in records if record.role == "prefill"],
            await store.lookup(hashes, None),
            PlacementCosts(kv_bytes_per_token=1),
        )
        assert placement.prefill is not None
        assert placement.prefill.worker_id == "p-holds"
        assert placement.computed_tokens == 299 - 288
        assert await store.lookup(
            chain_hashes(one.token_ids, INDEX_BLOCK, chain_salt(fingerprint, "")), None
        ) == (await store.lookup([], None))
        for keeper in keepers:
            await keeper.stop()
        await store.close()
