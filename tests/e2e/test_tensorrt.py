"""A cluster whose prefill worker runs the TensorRT-LLM engine, against the double: the oracle's tokens, while
clients leave, workers stop and are killed, and receivers refuse; then nothing is held."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import numpy as np
import psutil
import pytest

from cluster.block_hash import chain_hashes, chain_salt
from cluster.ids import RequestId, new_handoff_id
from cluster.messages import PrefillRequest, WorkerRecord
from cluster.placement.redis_store import RedisPlacementStore, connect
from cluster.wire import headrace_pb2_grpc as pb_grpc
from cluster.wire.conversions import prefill_request_to_proto
from megakernel.model.load import open_model
from megakernel.reference import reference_generate
from router.admission import tenant_of
from tests.cluster.test_membership import eventually
from tests.cluster.transfer.loopback import KeepingSink, receiver_at_work, target_at
from tests.e2e.failures import Belongings, replica, stopped, wait_for_workers, wait_until
from tests.e2e.held import DoubleLog, wait_until_nothing_is_held
from tests.e2e.inference import generate, generate_all, generate_and_leave, greedy
from tests.e2e.local_cluster import LocalCluster
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_hf_folder
from tests.tensorrt import DOUBLE, has_real_tensorrt

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(has_real_tensorrt(), reason="a real TensorRT-LLM is installed"),
]
LENGTHS = (5, 33, 64, 200, 300, 301, 302, 400)
NUM_TOKENS, VOCAB_SIZE = 12, 300
AT_ONCE, NUM_LEAVING = 16, 64
LEASE_S = 4
FATES = ("ends", "ends", "leaves at once", "leaves early", "leaves amid tokens", "is too late")


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    expected: list[int]
    """Of the oracle, NUM_TOKENS."""


@dataclass(frozen=True)
class Served:
    cluster: LocalCluster
    log: DoubleLog
    prompts: list[Prompt]
    """Of LENGTHS, then as many that share 150 tokens."""
    keys: Iterator[int]

    def metadata(self, hop: str = "always") -> tuple[tuple[str, str], ...]:
        """Of a tenant of its own: none of its prompts is cached anywhere."""
        return (("authorization", f"Bearer {next(self.keys)}"), ("x-headrace-prefill-hop", hop))

    def outcomes(self) -> dict[str, float]:
        """Of hand-offs, as the prefill worker counts them."""
        samples = self.cluster.metrics().select("headrace_handoffs_sent_total")
        return {sample.labels["outcome"]: sample.value for sample in samples}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tensorrt")
    shape = tiny_shape("llama", max_context_tokens=512, vocab_size=VOCAB_SIZE)
    write_hf_folder(folder / "tiny", shape, random_tensors(shape))
    config = folder / "headrace.toml"
    config.write_text(
        f"[model]\nsource = {json.dumps(str(folder / 'tiny'))}\n"
        "[decode]\nexecutor = 'torch'\nkv_pool_tokens = 16384\n"
        "[prefill]\nengine = 'tensorrt'\ntensor_parallel_size = 2\nkv_pool_tokens = 16384\nstaging_mb = 8\n"
        f"[placement]\nlease_ttl_s = {LEASE_S}\n"
    )
    path = os.pathsep.join([str(DOUBLE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    cluster = LocalCluster.at(folder / "home")
    log = DoubleLog(folder / "double.log")
    cluster.more_env = {
        "PYTHONPATH": path,
        "TRTLLM_DOUBLE_LOG": str(log.path),
        "TRTLLM_DOUBLE_DELAY_S": "0.002",
    }
    cluster.model = "tiny"
    cluster.up("--config", str(config))
    yield Served(cluster, log, prompts(str(folder / "tiny")), itertools.count())
    cluster.down()
    cluster.assert_nothing_left()


def prompts(source: str) -> list[Prompt]:
    weights = open_model(source).weights
    dice = np.random.default_rng(0)
    token_ids = [dice.integers(0, VOCAB_SIZE, length).tolist() for length in LENGTHS]
    token_ids += [[*token_ids[-1][:150], *own[:250]] for own in token_ids]
    return [Prompt(ids, reference_generate(weights, ids, NUM_TOKENS)) for ids in token_ids]


def test_tokens_are_the_oracles_by_the_hop_and_without(served: Served) -> None:
    cluster = served.cluster
    assert "prefill tensorrt" in str(cluster.state()["execution"])
    requests = [greedy(cluster.model, prompt.token_ids, NUM_TOKENS) for prompt in served.prompts]
    before = committed(cluster)
    for hop in ("never", "always"):
        answers = generate_all(cluster.grpc_address, requests, AT_ONCE, served.metadata(hop))
        expected = [prompt.expected for prompt in served.prompts]
        assert [answer.token_ids for answer in answers] == expected, f"hop {hop}"
    assert committed(cluster) - before == len(requests)
    wait_until_nothing_is_held(cluster, served.log)


def committed(cluster: LocalCluster) -> float:
    return cluster.metrics().total("headrace_handoffs_received_total", outcome="committed")


async def test_its_prefix_cache_is_in_the_placement_index(served: Served) -> None:
    """Of a prompt that no other tenant has: events of 1.2 do not say whose a block is."""
    cluster, prompt = served.cluster, np.random.default_rng(1).integers(0, VOCAB_SIZE, 300).tolist()
    metadata = (("authorization", "Bearer index"), ("x-headrace-prefill-hop", "always"))
    generate_all(cluster.grpc_address, [greedy(cluster.model, prompt, 1)], 1, metadata)
    async with placement(cluster) as store:
        prefill = await worker(store, "prefill")
        size = prefill.block_size_tokens
        salt = chain_salt(prefill.layout_fingerprint, tenant_of("Bearer index"))

        async def is_held() -> bool:
            hits = await store.lookup(chain_hashes(prompt, size, salt), None)
            return hits.cached_blocks.get(prefill.address.worker_id) == 288 // size

        await eventually(is_held)


@contextlib.asynccontextmanager
async def placement(cluster: LocalCluster) -> AsyncIterator[RedisPlacementStore]:
    url = str(cluster.state()["redis_url"])
    store = RedisPlacementStore(connect(url), cluster.model, block_ttl_s=60.0, op_timeout_s=5.0)
    yield store
    await store.close()


async def worker(store: RedisPlacementStore, role: str) -> WorkerRecord:
    return next(record for record in await store.workers() if record.role == role)


def test_sixteen_at_once_while_some_leave(served: Served) -> None:
    """At random moments: at once, before the first token, amid tokens; others have too short a deadline."""
    dice = random.Random(0)
    shared = served.metadata()

    def one(fate: str) -> str:
        prompt = dice.choice(served.prompts)
        metadata = dice.choice([shared, served.metadata()])
        request = greedy(served.cluster.model, prompt.token_ids, NUM_TOKENS)
        leaves: dict[str, float] = {}
        match fate:
            case "leaves at once":
                leaves["after_s"] = 0.0
            case "leaves early":
                leaves["after_s"] = dice.random() * 0.3
            case "leaves amid tokens":
                leaves["at_token"] = dice.randrange(1, NUM_TOKENS)
            case "is too late":
                request.deadline_ms = dice.randrange(1, 300)
        answer = generate_and_leave(served.cluster.grpc_address, request, metadata, **leaves)
        assert answer.token_ids == prompt.expected[: len(answer.token_ids)], fate
        assert len(answer.token_ids) == NUM_TOKENS or answer.finish_reason in ("", "deadline"), fate
        return answer.finish_reason

    with ThreadPoolExecutor(AT_ONCE) as pool:
        fates = [dice.choice(FATES) for _ in range(NUM_LEAVING)]
        reasons = list(pool.map(one, fates))
    assert all(reason == "length" for fate, reason in zip(fates, reasons, strict=True) if fate == "ends")
    assert reasons.count("") >= NUM_LEAVING // 8
    assert reasons.count("deadline") >= 1
    assert served.outcomes()["client_gone"] >= 1, "some left while their KV was computed or handed off"
    wait_until_nothing_is_held(served.cluster, served.log)


class Load:
    """Sixteen clients that go on and on, each token compared with the oracle's."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._is_over = threading.Event()
        self.num_ended = 0

    def client(self, number: int) -> None:
        cluster, prompts = self._served.cluster, self._served.prompts
        for turn in itertools.count(number):
            if self._is_over.is_set():
                return
            prompt = prompts[turn % len(prompts)]
            request = greedy(cluster.model, prompt.token_ids, NUM_TOKENS)
            answer = generate(cluster.grpc_address, request, self._served.metadata())
            assert answer.token_ids == prompt.expected
            self.num_ended += 1

    def end(self) -> None:
        self._is_over.set()

    def go_on(self) -> None:
        """Until as many as there are clients have ended after now."""
        enough = self.num_ended + AT_ONCE
        wait_until(lambda: self.num_ended >= enough, lambda: f"{self.num_ended} of {enough} have ended")


@contextlib.contextmanager
def load(served: Served) -> Iterator[Load]:
    """Afterwards nothing is held."""
    clients = Load(served)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = [pool.submit(clients.client, number) for number in range(AT_ONCE)]
        try:
            clients.go_on()
            yield clients
        finally:
            clients.end()
    for answer in answers:
        answer.result()
    wait_until_nothing_is_held(served.cluster, served.log)


@contextlib.contextmanager
def stopped_amid_hand_offs(served: Served) -> Iterator[psutil.Process]:
    """The decode worker: hand-offs to it are under way, and none can end."""
    decode = replica(served.cluster, "DecodeWorker")
    for _ in range(100):
        with stopped(decode):
            if served.cluster.metrics().total("headrace_prefill_requests_running") >= 4:
                yield decode
                return
        time.sleep(0.02)
    pytest.fail("there were no hand-offs under way")


def test_a_decode_worker_killed_amid_hand_offs(served: Served) -> None:
    with load(served) as clients:
        with stopped_amid_hand_offs(served) as decode:
            before, belongings = served.outcomes(), Belongings(decode)
            decode.kill()
        wait_for_workers(served.cluster, "decode")
        clients.go_on()
    after = served.outcomes()
    # By whoever notices first: the prefill worker, or the router.
    gone = [after.get(outcome, 0) - before.get(outcome, 0) for outcome in ("unreachable", "client_gone")]
    assert sum(gone) >= 4
    wait_until_gone(served, belongings)


def test_a_prefill_worker_killed_amid_hand_offs(served: Served) -> None:
    """With its ranks, which are in it."""
    with load(served) as clients:
        with stopped_amid_hand_offs(served):
            prefill = replica(served.cluster, "PrefillWorker")
            belongings = Belongings(prefill)
            assert any("headrace-ranks-" in name for name in belongings.sockets)
            assert len(belongings.memory_files) >= 2, "staging memory, and what hand-offs go through"
            prefill.kill()
        wait_for_workers(served.cluster, "prefill")
        clients.go_on()
    wait_until_gone(served, belongings)


def wait_until_gone(served: Served, belongings: Belongings) -> None:
    wait_until(
        lambda: belongings.left_in(served.cluster) == [], lambda: f"{belongings.left_in(served.cluster)}"
    )


def test_a_decode_worker_that_stops_for_a_moment(served: Served) -> None:
    with load(served) as clients:
        with stopped(replica(served.cluster, "DecodeWorker")):
            time.sleep(1)
        clients.go_on()


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_worker_that_stops_for_longer_than_its_lease(served: Served, role: str) -> None:
    """It comes back as another incarnation, amid its hand-offs."""
    with load(served) as clients:
        before = asyncio.run(epoch(served.cluster, role))
        with stopped(replica(served.cluster, f"{role.capitalize()}Worker")):
            time.sleep(LEASE_S + 1)
        wait_for_workers(served.cluster, role)
        clients.go_on()
    assert asyncio.run(epoch(served.cluster, role)) > before


async def epoch(cluster: LocalCluster, role: str) -> int:
    async with placement(cluster) as store:
        return (await worker(store, role)).address.epoch


async def test_receivers_that_refuse_vanish_and_say_nothing(served: Served) -> None:
    """A router of our own has the prefill worker send to them, among the hand-offs of the cluster's."""
    before, dice = served.outcomes(), random.Random(0)
    with load(served) as clients:
        async with (
            placement(served.cluster) as store,
            receiver_at_work() as other,
            listener(is_silent=False) as vanishing,
            listener(is_silent=True) as silent,
        ):
            prefill, decode = await worker(store, "prefill"), await worker(store, "decode")
            targets = {
                "not_found": decode.address,
                "layout_mismatch": other.target(),
                "unreachable": target_at(vanishing),
                "client_gone": target_at(silent),
            }
            async with grpc.aio.insecure_channel(prefill.address.grpc_address) as channel:
                stub = pb_grpc.PrefillStub(channel)

                async def is_refused(outcome: str) -> None:
                    tokens = dice.choice(served.prompts).token_ids
                    handoff_id = new_handoff_id()
                    if outcome == "layout_mismatch":
                        other.receiver.expect(handoff_id, 0, len(tokens), KeepingSink())
                    request = PrefillRequest(
                        request_id=RequestId("ours"),
                        handoff_id=handoff_id,
                        prompt_token_ids=tuple(tokens),
                        first_token=0,
                        target=targets[outcome],
                        layout_fingerprint=prefill.layout_fingerprint,
                    )
                    call = stub.Run(prefill_request_to_proto(request), timeout=60)
                    if outcome == "client_gone":
                        asyncio.get_running_loop().call_later(0.5 + dice.random(), call.cancel)
                    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                        await call

                await asyncio.gather(*(is_refused(outcome) for outcome in targets for _ in range(4)))
        await asyncio.to_thread(clients.go_on)

    async def are_counted() -> bool:
        """The cluster's router may leave too: where it has all tokens before the acknowledgement is read."""
        after = served.outcomes()
        # A call that is cancelled before the worker has it is nobody's.
        least = {outcome: 1 if outcome == "client_gone" else 4 for outcome in targets}
        return all(after.get(one, 0) - before.get(one, 0) >= count for one, count in least.items())

    await eventually(are_counted)


@contextlib.asynccontextmanager
async def listener(*, is_silent: bool) -> AsyncIterator[str]:
    """Takes connections, and says nothing or breaks them once it was told something; its address."""

    writers: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if is_silent:
            writers.append(writer)
        else:
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    yield f"{host}:{port}"
    server.close()
    for writer in writers:
        writer.transport.abort()
