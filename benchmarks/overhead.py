"""What everything but the model costs: the whole path with a no-op executor.

    python benchmarks/overhead.py [--quick] [--json FILE]

Starts a cluster of its own whose decode worker computes nothing, then measures from outside, over
HTTP: request out to first token in at concurrency 1, and requests and tokens a second at
concurrency 32. The stages' own stamps then say where the microseconds go. The load generator runs
on the same cores; its share is in every figure.
"""

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import parser, percentile, write_figures
from benchmarks.sse_client import SseConnection, completion_request

TOKENS_PER_REQUEST = 16
PROMPT = "Write one line that sells a folding bicycle to people who take the train to work."
STAGES = (
    ("received", "validated", "parse and check the body"),
    ("validated", "tokenized", "tokenize"),
    ("tokenized", "placed", "hash blocks, look up, choose"),
    ("placed", "dispatched", "build and write the command"),
    ("dispatched", "decode_received", "gRPC to the decode worker"),
    ("decode_received", "reserved", "queue, admit, hold KV blocks"),
    ("reserved", "first_step_started", "wait for the step"),
    ("first_step_started", "first_token", "the (empty) step"),
    ("first_token", "first_token_relayed", "gRPC back to the router"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def noop_cluster(log: Path) -> Iterator[int]:
    """A cluster on free ports in a folder of its own; yields its HTTP port."""
    http_port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="hr-bench-") as home:
        env = {**os.environ, "HEADRACE_HOME": home}
        command = [sys.executable, "-m", "headrace"]
        up = [
            *command, "up", "--detach", "--executor", "noop", "--prefill-replicas", "0",
            "--http-port", str(http_port), "--grpc-port", str(grpc_port),
        ]  # fmt: skip
        with log.open("wb") as output:
            subprocess.run(up, env=env, check=True, stdout=output, stderr=subprocess.STDOUT, timeout=180)
        try:
            yield http_port
        finally:
            subprocess.run([*command, "down"], env=env, check=True, capture_output=True, timeout=60)


async def sequential(port: int, num_requests: int, *, timeline: bool) -> tuple[list[float], list[bytes]]:
    """First-token latencies in milliseconds at concurrency 1, and the bodies."""
    connection = await SseConnection.open("127.0.0.1", port)
    request = completion_request("127.0.0.1", port, MODEL, PROMPT, TOKENS_PER_REQUEST, timeline=timeline)
    latencies_ms, bodies = [], []
    for _ in range(num_requests):
        result = await connection.stream(request)
        assert result.completion_tokens == TOKENS_PER_REQUEST, result
        latencies_ms.append((result.first_text_at_s - result.sent_at_s) * 1e3)
        bodies.append(result.body)
    connection.close()
    return latencies_ms, bodies


async def closed_loop(port: int, concurrency: int, duration_s: float) -> tuple[float, float, list[float]]:
    """(requests/s, tokens/s, first-token latencies in ms): every client sends its next when one ends."""
    request = completion_request("127.0.0.1", port, MODEL, PROMPT, TOKENS_PER_REQUEST)
    latencies_ms: list[float] = []
    num_tokens = 0
    stop_at_s = time.perf_counter() + duration_s

    async def client() -> None:
        nonlocal num_tokens
        connection = await SseConnection.open("127.0.0.1", port)
        while time.perf_counter() < stop_at_s:
            result = await connection.stream(request)
            assert result.completion_tokens == TOKENS_PER_REQUEST, result
            latencies_ms.append((result.first_text_at_s - result.sent_at_s) * 1e3)
            num_tokens += result.completion_tokens
        connection.close()

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    elapsed_s = time.perf_counter() - started_s
    return len(latencies_ms) / elapsed_s, num_tokens / elapsed_s, latencies_ms


def timeline_of(body: bytes) -> dict[str, int]:
    for line in body.split(b"\n"):
        if line.startswith(b"data: {") and b'"timeline"' in line:
            stamps: dict[str, int] = json.loads(line[6:])["headrace"]["timeline"]
            return stamps
    raise AssertionError("no chunk carries a timeline")


def stage_table(bodies: list[bytes], first_token_p50_ms: float) -> dict[str, float]:
    """Median microseconds a stage; prints the table. What no stage covers is HTTP in and out."""
    timelines = [timeline_of(body) for body in bodies]
    medians: dict[str, float] = {}
    print("\nwhere the microseconds go (median of one request at concurrency 1)")
    for start, end, what in STAGES:
        spans = [(t[end] - t[start]) / 1e3 for t in timelines if start in t and end in t]
        medians[f"us_{start}_to_{end}"] = statistics.median(spans)
        print(f"  {what:34s} {medians[f'us_{start}_to_{end}']:8.0f} us")
    rest = first_token_p50_ms * 1e3 - sum(medians.values())
    medians["us_http_in_and_out"] = rest
    print(f"  {'HTTP: client, HAProxy, Serve, SSE':34s} {rest:8.0f} us")
    return medians


async def measure(port: int, *, quick: bool) -> tuple[dict[str, float], int]:
    num_requests, duration_s, rounds = (300, 4.0, 2) if quick else (2000, 10.0, 5)
    await sequential(port, 100, timeline=False)
    await closed_loop(port, 32, 2.0)

    latencies_ms, _ = await sequential(port, num_requests, timeline=False)
    p50_ms, p99_ms = percentile(latencies_ms, 0.5), percentile(latencies_ms, 0.99)
    started_s = time.perf_counter()
    await sequential(port, num_requests, timeline=False)
    tokens_per_s_c1 = num_requests * TOKENS_PER_REQUEST / (time.perf_counter() - started_s)
    rates = [await closed_loop(port, 32, duration_s) for _ in range(rounds)]
    requests_per_s = statistics.median(rate for rate, _, _ in rates)
    spread = (max(r for r, _, _ in rates) - min(r for r, _, _ in rates)) / requests_per_s
    c32_ms = [latency for _, _, latencies in rates for latency in latencies]

    c32_p50_ms, c32_p99_ms = percentile(c32_ms, 0.5), percentile(c32_ms, 0.99)
    tokens_per_s_c32 = requests_per_s * TOKENS_PER_REQUEST
    print(f"first token, concurrency 1:   p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms ({num_requests} requests)")
    print(f"first token, concurrency 32:  p50 {c32_p50_ms:.1f} ms, p99 {c32_p99_ms:.1f} ms")
    print(f"requests/s, concurrency 32:   {requests_per_s:.0f} (spread {spread:.0%} over {rounds} rounds)")
    print(f"tokens/s streamed:            {tokens_per_s_c1:.0f} at 1, {tokens_per_s_c32:.0f} at 32")
    _, bodies = await sequential(port, 200, timeline=True)
    figures = {
        "first_token_p50_ms_c1": p50_ms,
        "first_token_p99_ms_c1": p99_ms,
        "first_token_p50_ms_c32": c32_p50_ms,
        "first_token_p99_ms_c32": c32_p99_ms,
        "requests_per_s_c32": requests_per_s,
        "requests_per_s_c32_spread": spread,
        "tokens_per_s_c1": tokens_per_s_c1,
        "tokens_per_s_c32": tokens_per_s_c32,
        **stage_table(bodies, p50_ms),
    }
    return figures, rounds


MODEL = "smollm2-135m-instruct"


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    with tempfile.NamedTemporaryFile(prefix="hr-bench-", suffix=".log") as log:
        try:
            with noop_cluster(Path(log.name)) as port:
                figures, runs = asyncio.run(measure(port, quick=options.quick))
        except subprocess.CalledProcessError:
            sys.exit(f"the cluster did not start:\n{Path(log.name).read_text(errors='replace')}")
    write_figures(options.json, figures, runs)


if __name__ == "__main__":
    main()
