from rich.console import Console

from cluster.ids import Epoch, WorkerId
from cluster.messages import WorkerAddress, WorkerRecord, WorkerStatus
from headrace.live import Look, rates, workers_table
from headrace.probe import parse_metrics


def look(at_s, requests, tokens):
    text = f"""# TYPE headrace_requests counter
headrace_requests_total{{route="chat",outcome="stop"}} {requests - 1}
headrace_requests_total{{route="completions",outcome="stop"}} 1
# TYPE headrace_generation_tokens counter
headrace_generation_tokens_total {tokens}
# TYPE headrace_num_requests_running gauge
headrace_num_requests_running{{worker="a"}} 2
headrace_num_requests_running{{worker="b"}} 3
# TYPE headrace_kv_cache_used_tokens gauge
headrace_kv_cache_used_tokens{{worker="a"}} 25
# TYPE headrace_kv_cache_total_tokens gauge
headrace_kv_cache_total_tokens{{worker="a"}} 100
"""
    return Look(at_s, parse_metrics(text))


def test_metrics_are_summed_over_what_carries_the_labels():
    metrics = look(0, 10, 0).metrics
    assert metrics.total("headrace_requests_total") == 10
    assert metrics.total("headrace_requests_total", route="chat") == 9
    assert metrics.total("headrace_requests_total", route="none") == 0
    assert [sample.labels for sample in metrics.select("headrace_kv_cache_used_tokens")] == [{"worker": "a"}]


def test_rates_are_differences_over_time():
    found = rates(look(10.0, 10, 100), look(12.0, 30, 400))
    assert (found.requests_per_s, found.tokens_per_s) == (10.0, 150.0)
    assert (found.running, found.waiting, found.kv_used) == (5, 0, 0.25)
    assert found.line() == "10.0 requests/s · 150 tokens/s · 5 running, 0 waiting · KV 25%"


def test_first_look_and_restarted_router_show_no_rate():
    assert rates(None, look(1.0, 10, 100)).requests_per_s == 0
    assert rates(look(1.0, 50, 900), look(2.0, 5, 90)).tokens_per_s == 0


def test_no_worker_at_all_divides_by_nothing():
    assert rates(None, Look(0.0, parse_metrics(""))).kv_used == 0


def worker(role, name, *, is_accepting=True):
    return WorkerRecord(
        address=WorkerAddress(
            worker_id=WorkerId(name), epoch=Epoch(1), grpc_address="127.0.0.1:9", host_id="h"
        ),
        role=role,
        model="m",
        protocol_version=1,
        layout_fingerprint="f",
        block_size_tokens=16,
        status=WorkerStatus(
            free_kv_tokens=75, total_kv_tokens=100, running_requests=4, is_accepting=is_accepting
        ),
    )


def test_workers_are_listed_by_role():
    table = workers_table([worker("prefill", "p-1"), worker("decode", "d-1", is_accepting=False)])
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    _, first, second = capture.get().splitlines()
    assert first.split() == ["d-1", "decode", "127.0.0.1:9", "draining", "4", "0", "25%", "100"]
    assert second.split()[:2] == ["p-1", "prefill"]
