"""A folder of catalogues: versions, conflicts, what dead processes leave, and several processes."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.catalogue.faults import UploadError
from cluster.catalogue.file import Catalogue
from cluster.catalogue.file_format import read_preamble
from cluster.catalogue.store import (
    CatalogueNameError,
    CatalogueStore,
    ConflictError,
    PutResult,
    UnknownCatalogueError,
)
from tests.cluster.catalogue.support import chunks_of, target


def put(store: CatalogueStore, name: str, *texts: str, **options: Any) -> PutResult:
    data = "\n".join(["text", *texts]).encode()
    return store.put(name, chunks_of(data), upload_format="csv", target=target(), **options)


def files(folder: Path) -> list[str]:
    """Without locks, which go with their holders."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path: Path) -> CatalogueStore:
    return CatalogueStore(tmp_path / "catalogues", fetch_address="router:8001")


def test_what_is_put_is_served(store: CatalogueStore) -> None:
    result = put(store, "shoes", "red shoe", "blue shoe")
    info = store.get("shoes")
    assert result.info == info
    assert (info.ref.name, info.ref.version, info.ref.fetch_address) == ("shoes", 1, "router:8001")
    assert (info.num_items, info.attributes, info.fingerprint) == (2, ("bid",), "test-model")
    path = Path(info.ref.path)
    assert path.stat().st_size == info.ref.num_bytes
    assert read_preamble(path).checksum == info.ref.checksum
    opened = Catalogue.open(path)
    assert (opened.header.name, opened.header.version) == ("shoes", 1)
    assert {opened.text(0), opened.text(1)} == {"red shoe", "blue shoe"}


def test_the_version_before_keeps_its_file_until_the_one_after_next(store: CatalogueStore) -> None:
    refs = [put(store, "shoes", f"shoe {n}").info.ref for n in range(4)]
    assert [ref.version for ref in refs] == [1, 2, 3, 4]
    assert [Path(ref.path).exists() for ref in refs] == [False, False, True, True]
    assert store.get("shoes").ref == refs[-1]
    assert len(files(store.folder)) == 3


def test_a_refused_upload_changes_nothing(store: CatalogueStore) -> None:
    before = put(store, "shoes", "red shoe").info
    with pytest.raises(UploadError):
        put(store, "shoes", "x", "x")
    with pytest.raises(UploadError):
        put(store, "hats", "x", "x")
    assert store.list() == (before,)
    with pytest.raises(UnknownCatalogueError, match="no catalogue `hats`"):
        store.get("hats")
    assert len(files(store.folder)) == 2
    assert put(store, "shoes", "x", "x", "y", skip_bad=True).faults[0].line == 3
    assert store.get("shoes").num_left_out == 1


def test_tenants_do_not_see_each_other(store: CatalogueStore) -> None:
    put(store, "shoes", "a", tenant="one")
    put(store, "shoes", "b", "c", tenant="two/../one")
    put(store, "hats", "b", tenant="one")
    assert [info.ref.name for info in store.list("one")] == ["hats", "shoes"]
    assert store.get("shoes", "two/../one").num_items == 2
    assert store.list("three") == ()
    store.delete("shoes", "one")
    assert [info.ref.name for info in store.list("one")] == ["hats"]
    assert store.get("shoes", "two/../one").num_items == 2


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "A", ".hidden", "-x", "a" * 65, "a\n", "ü", "a\0", "current json"]
)
def test_names_that_could_lead_elsewhere_are_refused(store: CatalogueStore, name: str) -> None:
    for ask in (lambda: put(store, name, "x"), lambda: store.get(name), lambda: store.delete(name)):
        with pytest.raises(CatalogueNameError, match="is no catalogue's name"):
            ask()
    assert files(store.folder) == []


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "shoes-2026.v1_x", "current.json", "a..b"])
def test_other_names_do(store: CatalogueStore, name: str) -> None:
    put(store, name, "x")
    assert [info.ref.name for info in store.list()] == [name]


def test_deleting(store: CatalogueStore) -> None:
    info = put(store, "shoes", "red shoe").info
    opened = Catalogue.open(Path(info.ref.path))
    store.delete("shoes")
    assert opened.text(0) == "red shoe"
    with pytest.raises(UnknownCatalogueError):
        store.get("shoes")
    with pytest.raises(UnknownCatalogueError):
        store.delete("shoes")
    assert store.list() == ()
    assert files(store.folder) == []
    assert put(store, "shoes", "blue shoe").info.ref.version == 1


def test_a_second_put_at_the_same_time_is_a_conflict(store: CatalogueStore) -> None:
    other = CatalogueStore(store.folder, store.fetch_address)
    before = put(store, "shoes", "red shoe").info
    begun, may_end = threading.Event(), threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"text\nblue shoe\n"
        begun.set()
        assert may_end.wait(60)

    thread = threading.Thread(
        target=lambda: store.put("shoes", slow(), upload_format="csv", target=target()), daemon=True
    )
    thread.start()
    assert begun.wait(60)
    for attempt in (
        lambda: put(other, "shoes", "x"),
        lambda: put(store, "shoes", "x"),
        lambda: other.delete("shoes"),
    ):
        with pytest.raises(ConflictError, match="`shoes` is being written or deleted"):
            attempt()
    assert other.get("shoes") == before
    assert put(other, "hats", "x").info.ref.version == 1
    CatalogueStore(store.folder)  # does not sweep what is being written
    may_end.set()
    thread.join(60)
    assert other.get("shoes").ref.version == 2
    assert put(other, "shoes", "x").info.ref.version == 3


WRITER = """
import sys, time
from pathlib import Path
from cluster.catalogue.store import CatalogueStore
from tests.cluster.catalogue.support import target
def chunks():
    yield b"text\\n" + b"".join(b"item %d\\n" % n for n in range(9000))
    print("begun", flush=True)
    sys.stdin.read()
    yield b"last\\n"
store = CatalogueStore(Path(sys.argv[1]))
print(store.put(sys.argv[2], chunks(), upload_format="csv", target=target()).info.ref.version, flush=True)
"""


def writer(store: CatalogueStore, name: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.folder), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_processes_share_a_folder_and_what_a_dead_one_left_goes(store: CatalogueStore) -> None:
    before = put(store, "shoes", "red shoe").info
    process = writer(store, "shoes")
    with pytest.raises(ConflictError):
        put(store, "shoes", "x")
    assert store.get("shoes") == before
    out, _ = process.communicate("go")
    assert out == "2\n"
    assert store.get("shoes").num_items == 9001

    for name in ("shoes", "hats"):
        process = writer(store, name)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
    assert len(files(store.folder)) > 3
    assert [info.ref.name for info in store.list()] == ["shoes"]
    assert put(store, "shoes", "y").info.ref.version == 3
    CatalogueStore(store.folder)
    assert [name for name in files(store.folder) if not name.startswith("v")] == ["current.json"]
    assert len(files(store.folder)) == 3
    assert put(store, "hats", "z").info.ref.version == 1


def test_a_version_that_was_never_switched_to_is_a_leftover(store: CatalogueStore) -> None:
    ref = put(store, "shoes", "red shoe").info.ref
    folder = Path(ref.path).parent
    for leftover in ("v2-0123456789abcdef.catalogue", ".current.json"):
        (folder / leftover).write_bytes(b"half")
    again = CatalogueStore(store.folder, fetch_address=ref.fetch_address)
    assert again.get("shoes").ref == ref
    assert files(folder) == ["current.json", Path(ref.path).name]


def test_a_damaged_entry_is_named_and_spares_the_others(store: CatalogueStore) -> None:
    put(store, "shoes", "red shoe")
    ref = put(store, "hats", "red hat").info.ref
    (Path(ref.path).parent / "current.json").write_bytes(b"{")
    with pytest.raises(OSError, match=r"current\.json cannot be read"):
        store.get("hats")
    assert CatalogueStore(store.folder).get("shoes").num_items == 1
