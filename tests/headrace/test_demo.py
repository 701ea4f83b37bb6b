"""`headrace demo` against a router over HTTP with a scripted decode worker, and what it draws."""

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from typer.testing import CliRunner

from headrace.catalogue_client import Upload
from headrace.chat import Reply
from headrace.cli import app
from headrace.demo import NUM_QUESTIONS, best_items, questions
from headrace.demo_command import next_steps
from headrace.demo_screen import BAR_CELLS, Found, FoundItem, Totals, WordWrap, Written, bar
from tests.interruptible import INTERRUPTIBLE
from tests.router.conftest import MODEL

USAGE, INTERRUPTED = 2, 130
GOLDEN = Path(__file__).parents[1] / "golden" / "demo" / "plain.txt"
MASKS = (
    (r"http://127\.0\.0\.1:\d+", "http://HOST"),
    (r"-?\b\d[\d,.]*(?= (ms|s|MB|tokens/s|nodes)\b)", "N"),
    (r"^ {8}(?![#0-9 ]).*(?=\n +40 tokens)", "        TEXT"),
)
"""What differs between runs and machines, or with the rig's tokenizer."""


def masked(output):
    for pattern, shown in MASKS:
        output = re.sub(pattern, shown, output, flags=re.MULTILINE)
    return output


@pytest.fixture
async def cluster(make_cluster, served):
    """Its tokenizer knows few words: items and briefs have many tokens."""
    card = msgspec.structs.replace(served.card, max_context_tokens=2048)
    return await make_cluster(model=msgspec.structs.replace(served, card=card))


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NO_COLOR", raising=False)

    async def run(url, *words, **options):
        words = ("demo", "--items", "30", "--url", url, *words)
        return await asyncio.to_thread(lambda: CliRunner().invoke(app, words, **options))

    return run


async def catalogues(cluster):
    return [one["name"] for one in (await cluster.http.get("/v1/catalogues")).json()["data"]]


async def test_what_it_shows_and_asks(run, cluster, serve):
    result = await run(await serve(cluster), "--seed", "3", "--plain", env={"FORCE_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert masked(result.stdout) == GOLDEN.read_text()
    assert result.stderr == ""
    assert await catalogues(cluster) == []
    asked = [one for one in cluster.decode.seen.generates if one.HasField("targeting")]
    assert len(asked) == NUM_QUESTIONS
    assert {(one.targeting.k, one.targeting.scoring) for one in asked} == {(5, "catalogue")}
    first, *creatives = [one for one in cluster.decode.seen.generates if not one.HasField("targeting")]
    assert first.sampling.max_tokens == 1
    assert {(one.sampling.max_tokens, one.sampling.temperature) for one in creatives} == {(40, 0)}
    assert len({tuple(one.prompt_token_ids) for one in creatives}) == len(creatives) == 5, (
        "the worker finds the same items each time"
    )


async def test_in_a_terminal_there_are_colours_and_bars(run, cluster, serve):
    result = await run(await serve(cluster), "--keep", env={"FORCE_COLOR": "1", "COLUMNS": "60"})
    assert result.exit_code == 0, result.output
    assert "\x1b[" in result.stdout
    assert "█" in result.stdout
    (name,) = await catalogues(cluster)
    assert f"headrace catalogue delete {name}" in result.stdout
    texts = re.findall(r"\x1b\[3m(.*?)\x1b\[0m", result.stdout, flags=re.DOTALL)
    assert texts
    assert max(len(line) for text in texts for line in text.splitlines()) < 60


async def test_ctrl_c_ends_it_and_the_catalogue(cluster, serve, tmp_path):
    cluster.decode.behaviour.step_delay_s = 0.05
    process = await asyncio.create_subprocess_exec(
        *(*INTERRUPTIBLE, "demo", "--items", "30", "--url", await serve(cluster)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async for line in process.stdout:
        if b" 2/10" in line:
            assert len(await catalogues(cluster)) == 1
            process.send_signal(signal.SIGINT)
            break
    else:
        pytest.fail(f"it ended before the second question: {(await process.communicate())[1].decode()}")
    _, errors = await process.communicate()
    assert (process.returncode, errors.decode().strip()) == (INTERRUPTED, "stopped")
    assert await catalogues(cluster) == []


async def test_a_model_without_a_chat_template_is_refused_before_anything_is_sent(
    run, make_cluster, served, serve
):
    card = msgspec.structs.replace(served.card, chat_template=None)
    cluster = await make_cluster(model=msgspec.structs.replace(served, card=card))
    result = await run(await serve(cluster))
    assert result.exit_code == 1
    assert "no chat template" in result.stderr
    assert "headrace up --model" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not cluster.decode.seen.generates


async def test_a_worker_that_fails_ends_it_with_its_words_and_no_catalogue(run, cluster, serve):
    cluster.decode.behaviour.forgets_items = True
    result = await run(await serve(cluster))
    assert result.exit_code == 1
    assert "without its items" in result.stderr
    assert await catalogues(cluster) == []


async def test_a_cluster_that_is_not_there_is_said(run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    result = await run(url)
    assert result.exit_code == 1
    assert url in result.stderr
    assert "`headrace up`" in result.stderr


async def test_what_is_no_cluster_is_said(run):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        result = await run(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert result.exit_code == 1
    assert "lists no model" in result.stderr


async def test_no_place_for_the_items_is_said(run, cluster, serve, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    result = await run(await serve(cluster))
    assert result.exit_code == 1
    assert "set TMPDIR" in result.stderr


async def test_options_that_exclude_each_other(run, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("")
    result = await run("http://127.0.0.1:1", "--config", str(config))
    assert (result.exit_code, "--config" in result.stderr) == (USAGE, True)


def test_a_cluster_that_cannot_start_is_said_and_leaves_nothing(tmp_path):
    config, home = tmp_path / "config.toml", tmp_path / "home"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config.write_text(f"[router]\nhost = '127.0.0.1'\nhttp_port = {port}\n")
        command = (sys.executable, "-m", "headrace", "demo", "--config", str(config))
        environment = {**os.environ, "HEADRACE_HOME": str(home)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == USAGE
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr
    assert not home.exists()


def test_questions_differ_and_depend_on_the_seed():
    assert len(set(questions(0))) == NUM_QUESTIONS
    assert questions(0) == questions(0) != questions(1)


def found(*texts, ms=1.0, decoding="parallel"):
    items = tuple(FoundItem(text, -1.0) for text in texts)
    return Found(brief="b", items=items, decoding=decoding, steps=1, rows=1, ms=ms)


def test_no_item_is_written_for_twice():
    assert best_items([found("a", "b"), found("a", "b"), found("a", "b"), found(), found("c")]) == [
        "a",
        "b",
        "c",
    ]


@given(st.floats(0, 1), st.booleans())
def test_bars_have_one_width_and_grow(share, plain):
    drawn = bar(share, plain=plain)
    assert cell_len(drawn) == BAR_CELLS
    assert (drawn.strip() == "") == (share == 0)
    assert bar(1, plain=plain).strip() == bar(1, plain=plain)
    assert len(bar(share / 2, plain=plain).strip()) <= len(drawn.strip())


@given(
    st.lists(st.text(st.sampled_from("ab \n\t\u3000東"), max_size=9)),
    st.one_of(st.none(), st.integers(1, 30)),
)
def test_streamed_text_keeps_its_words_in_lines_that_fit(pieces, width):
    wrap = WordWrap(width)
    shown = "".join(wrap.push(piece) for piece in pieces) + wrap.flush()
    assert shown.split() == "".join(pieces).split()
    lines = [line.strip() for line in shown.split("\n")]
    if width is None:
        assert len(lines) == 1
    else:
        assert all(cell_len(line) <= width or " " not in line for line in lines)
        for line, following in pairwise(lines):
            assert cell_len(line) + 1 + cell_len(following.split()[0]) > width, "a line is filled"


def reply(**changes):
    given = {
        "text": "x", "finish_reason": "stop", "completion_tokens": 40, "prompt_tokens": 5, "cached_tokens": 0,
        "ttft_s": 0.1, "duration_s": 0.5,
    }  # fmt: skip
    return Reply(**given | changes)


UPLOAD = Upload(
    name="n",
    version=1,
    items=1000,
    nodes=1,
    bytes=1,
    num_faults=0,
    faults=[],
    timings_ms={"a": 500, "b": 1000},
)


def test_the_summary_has_medians_and_rates():
    answers = (found(ms=3.0), found(ms=1.0), found(ms=20.0, decoding="stepwise"))
    written = (Written("a", reply()), Written("b", reply(completion_tokens=20)))
    assert Totals(upload=UPLOAD, found=answers, written=written).lines() == [
        ("catalogue", "1,000 items in 1.5 s"),
        ("targeting", "p50 3.0 ms, slowest 20.0 ms; 2 parallel, 1 stepwise"),
        ("creatives", "60 tokens, 60.0 tokens/s; first token p50 100 ms"),
    ]
    assert len(Totals(upload=UPLOAD, found=(), written=()).lines()) == 1


def test_drafts_are_shown_where_the_server_tells_of_them():
    written = (Written("a", reply(accepted_tokens=6, rejected_tokens=2)), Written("b", reply()))
    (line,) = [
        figures
        for name, figures in Totals(upload=UPLOAD, found=(), written=written).lines()
        if name == "drafts"
    ]
    assert line == "6 of 8 drafted tokens accepted"


@pytest.mark.parametrize("kept", [None, "demo-1"])
@pytest.mark.parametrize("is_own", [False, True])
def test_next_steps_fit_how_it_ended(kept, is_own):
    steps = next_steps("http://127.0.0.1:9999", MODEL, kept=kept, is_own=is_own)
    (curl,) = [shlex.split(step) for step in steps if step.startswith("curl")]
    assert json.loads(curl[-1])["catalogue"] == (kept or "ads")
    assert curl[1].startswith("http://127.0.0.1:8000/" if is_own and not kept else "http://127.0.0.1:9999/")
    assert ("headrace up --detach" in steps) == (is_own and not kept)
    assert ("headrace down" in steps) == bool(is_own and kept)
    assert any("docs/targeting.md" in step for step in steps)
