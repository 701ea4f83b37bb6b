"""`headrace catalogue` and `headrace target` against a router over HTTP."""

import asyncio

import pytest
from typer.testing import CliRunner

from headrace.cli import app
from tests.router.catalogue_support import ITEMS, jsonl, store
from tests.router.conftest import MODEL

USAGE = 2


@pytest.fixture
async def run(cluster, serve, monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    url = await serve(cluster)

    async def run(*arguments, **options):
        words = (*arguments, "--url", url)
        return await asyncio.to_thread(lambda: CliRunner().invoke(app, words, **options))

    return run


async def test_put_list_target_delete(run, cluster, tmp_path):
    assert "headrace catalogue put" in (await run("catalogue", "list")).output
    path = tmp_path / "Our Ads.jsonl"
    path.write_bytes(jsonl(ITEMS))
    done = await run("catalogue", "put", str(path))
    assert done.exit_code == 0, done.output
    assert "our-ads version 1: 4 items" in done.output
    listed = await run("catalogue", "list")
    assert "our-ads" in listed.output
    assert "kind" in listed.output
    words = ("target", "--model", MODEL, "--catalogue", "our-ads", "--filter", "kind=stone", "the mill")
    found = await run(*words)
    assert found.exit_code == 0, found.output
    assert "mill water" in found.output
    assert "headrace channel" in found.output
    assert "mill wheel" not in found.output
    assert "note: 2 of 20 items" in found.stderr
    assert (await run("catalogue", "delete", "our-ads")).output.strip() == "deleted our-ads"
    gone = await run("catalogue", "delete", "our-ads")
    assert gone.exit_code == 1
    assert "does not exist" in gone.stderr


async def test_wrong_lines_are_shown_by_number(run, tmp_path):
    path = tmp_path / "ads.csv"
    path.write_text("text,price\nmill wheel,1\nmill,2,3\n")
    refused = await run("catalogue", "put", str(path))
    assert refused.exit_code == 1
    assert "line 3: 3 fields" in refused.stderr
    kept = await run("catalogue", "put", str(path), "--skip-bad", "--name", "few")
    assert kept.exit_code == 0
    assert "line 3: 3 fields" in kept.stderr
    assert "few version 1: 1 items, 1 lines left out" in kept.output


async def test_filters_as_words(run, cluster, served):
    store(cluster, served)
    wanted = (
        "--filter",
        "kind=wood",
        "--filter",
        "kind = stone",
        "--filter",
        "price>=5",
        "--filter",
        "price<=30",
    )
    words = (
        "target",
        "--model",
        MODEL,
        "--catalogue",
        "ads",
        "-k",
        "3",
        "--deadline-ms",
        "9000",
        *wanted,
        "x",
    )
    assert (await run(*words)).exit_code == 0
    (generate,) = cluster.decode.seen.generates
    kind, price = generate.targeting.where
    assert list(kind.any_of.values) == ["wood", "stone"]
    assert (price.at_least, price.at_most) == (5, 30)
    assert generate.targeting.k == 3
    for words in (
        ("price>=x",),
        ("price",),
        ("price=1", "--filter", "price>=1"),
        ("price<=1", "--filter", "price=1"),
    ):
        bad = await run("target", "--model", MODEL, "--catalogue", "ads", "x", "--filter", *words)
        assert bad.exit_code == USAGE
        assert len(bad.stderr.splitlines()) == 1


async def test_what_is_missing_is_said(run, tmp_path):
    no_model = await run("target", "--catalogue", "ads", "x")
    assert (no_model.exit_code, "--model" in no_model.stderr) == (USAGE, True)
    no_catalogue = await run("target", "--model", MODEL, "x")
    assert (no_catalogue.exit_code, "--catalogue" in no_catalogue.stderr) == (USAGE, True)
    unknown = await run("target", "--model", MODEL, "--catalogue", "ads", input="the mill")
    assert (unknown.exit_code, "there is none yet" in unknown.stderr) == (1, True)
    no_file = await run("catalogue", "put", str(tmp_path / "none.csv"))
    assert no_file.exit_code == USAGE
