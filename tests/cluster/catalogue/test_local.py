"""A worker's catalogues: in place, from its cache, fetched; whole ones only, few open, each opened once."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from cluster.catalogue.file_format import CatalogueFileError, DamagedCatalogueError
from cluster.catalogue.local import LocalCatalogues
from cluster.messages import CatalogueRef
from tests.cluster.catalogue.support import compiled


class Router:
    """Compiled files, some of which a worker cannot see, and what it fetches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.damage = b""

    def ref(self, name: str, *, is_seen: bool = False) -> CatalogueRef:
        path = self.folder / name
        preamble = compiled(path, f"text\nitem of {name}\nshoe\n".encode(), "csv", name=name).preamble
        return CatalogueRef(
            name=name,
            version=1,
            checksum=preamble.checksum,
            num_bytes=preamble.file_bytes,
            path=str(path if is_seen else self.folder / "elsewhere" / name),
        )

    def fetch(self, ref: CatalogueRef, to_path: Path) -> None:
        self.fetched.append(ref.name)
        shutil.copyfile(self.folder / ref.name, to_path)
        if self.damage:
            with to_path.open("r+b") as file:
                file.seek(-1, 2)
                file.write(self.damage)


@pytest.fixture
def router(tmp_path: Path) -> Router:
    (tmp_path / "router").mkdir()
    return Router(tmp_path / "router")


@pytest.fixture
def local(tmp_path: Path, router: Router) -> LocalCatalogues:
    return LocalCatalogues(tmp_path / "cache", router.fetch, max_open=2)


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_a_file_that_is_seen_is_opened_in_place(
    local: LocalCatalogues, router: Router, tmp_path: Path
) -> None:
    ref = router.ref("a", is_seen=True)
    assert str(local.open(ref).path) == ref.path
    assert local.open(ref) is local.open(ref)
    assert router.fetched == []
    assert not (tmp_path / "cache").exists()


def test_another_file_is_fetched_once_and_kept(
    local: LocalCatalogues, router: Router, tmp_path: Path
) -> None:
    ref = router.ref("a")
    assert local.open(ref).find([]) is None
    assert cached(tmp_path) == [f"{ref.checksum}.catalogue"]
    again = LocalCatalogues(tmp_path / "cache", router.fetch)
    assert again.open(ref).checksum == ref.checksum
    assert router.fetched == ["a"]


def test_a_path_with_another_catalogue_is_not_taken(local: LocalCatalogues, router: Router) -> None:
    a, b = router.ref("a", is_seen=True), router.ref("b", is_seen=True)
    wrong = msgspec.structs.replace(a, path=b.path)
    assert local.open(wrong).header.name == "a"
    assert router.fetched == ["a"]


def test_damaged_files_are_passed_over(local: LocalCatalogues, router: Router, tmp_path: Path) -> None:
    ref = router.ref("a", is_seen=True)
    damaged = router.folder / "damaged"
    data = bytearray(Path(ref.path).read_bytes())
    data[-1] ^= 255
    damaged.write_bytes(data)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{ref.checksum}.catalogue").write_bytes(data)
    opened = local.open(msgspec.structs.replace(ref, path=str(damaged)))
    assert router.fetched == ["a"]
    assert {opened.text(0), opened.text(1)} == {"item of a", "shoe"}


def test_a_damaged_fetch_is_refused_and_leaves_nothing(
    local: LocalCatalogues, router: Router, tmp_path: Path
) -> None:
    ref = router.ref("a")
    router.damage = b"\xff"
    with pytest.raises(DamagedCatalogueError, match="hashes to"):
        local.open(ref)
    assert cached(tmp_path) == []
    router.damage = b""
    with pytest.raises(DamagedCatalogueError, match="is another catalogue"):
        local.open(msgspec.structs.replace(ref, checksum="0" * 32))
    assert local.open(ref).num_items == 2


@pytest.mark.parametrize("checksum", ["", "../../etc/passwd", "A" * 32, "0" * 31])
def test_a_checksum_that_is_none_is_refused(local: LocalCatalogues, router: Router, checksum: str) -> None:
    with pytest.raises(CatalogueFileError, match="is no checksum of a catalogue"):
        local.open(msgspec.structs.replace(router.ref("a"), checksum=checksum))


def test_few_are_open_and_an_old_one_comes_back_from_the_cache(
    local: LocalCatalogues, router: Router
) -> None:
    refs = [router.ref(name) for name in "abc"]
    first = local.open(refs[0])
    for ref in refs[1:]:
        local.open(ref)
    assert first.num_items == 2
    assert local.open(refs[0]) is not first
    assert router.fetched == ["a", "b", "c"]


def test_the_tenant_with_the_most_open_loses_its_oldest(router: Router, tmp_path: Path) -> None:
    refs = {name: router.ref(name, is_seen=True) for name in "abcdefg"}
    local = LocalCatalogues(tmp_path / "cache", router.fetch, max_open=3)
    let_go: list[str] = []
    names = {ref.checksum: name for name, ref in refs.items()}
    local.when_let_go(lambda checksum: let_go.append(names[checksum]))

    def are_open() -> str:
        return "".join(name for name, ref in refs.items() if local.find(ref.checksum) is not None)

    local.open(refs["a"], "one")
    for name in "bcd":
        local.open(refs[name], "two")
    assert (are_open(), let_go) == ("acd", ["b"])
    assert local.find(refs["c"].checksum) is not None, "used again: `d` is the older one now"
    local.open(refs["e"], "two")
    assert (are_open(), let_go) == ("ace", ["b", "d"])
    local.open(refs["f"], "three")
    assert (are_open(), let_go) == ("aef", ["b", "d", "c"])
    local.open(refs["g"], "four")
    assert (are_open(), let_go) == ("efg", ["b", "d", "c", "a"]), "of one each, the oldest"


def test_what_is_not_open_is_not_found(local: LocalCatalogues, router: Router) -> None:
    ref = router.ref("a")
    assert local.find(ref.checksum) is None
    assert router.fetched == []
    opened = local.open(ref)
    assert local.find(ref.checksum) is opened


def test_the_cache_is_bounded(router: Router, tmp_path: Path) -> None:
    refs = [router.ref(name) for name in "abc"]
    local = LocalCatalogues(tmp_path / "cache", router.fetch, max_cached_bytes=2 * refs[0].num_bytes)
    for ref in refs:
        local.open(ref)
    assert len(cached(tmp_path)) == 2
    assert f"{refs[2].checksum}.catalogue" in cached(tmp_path)
    tiny = LocalCatalogues(tmp_path / "cache", router.fetch, max_cached_bytes=1)
    assert tiny.open(refs[0]).num_items == 2
    assert cached(tmp_path) == [f"{refs[0].checksum}.catalogue"]


def test_threads_open_a_catalogue_once(router: Router, tmp_path: Path) -> None:
    ref, other = router.ref("a"), router.ref("b")
    may_fetch = threading.Event()

    def fetch(ref: CatalogueRef, to_path: Path) -> None:
        if ref.name == "a":
            assert may_fetch.wait(60)
        router.fetch(ref, to_path)

    local = LocalCatalogues(tmp_path / "cache", fetch)
    with ThreadPoolExecutor(8) as executor:
        opening = [executor.submit(local.open, ref) for _ in range(6)]
        assert executor.submit(local.open, other).result(60).header.name == "b"
        may_fetch.set()
        opened = [future.result(60) for future in opening]
    assert len({id(catalogue) for catalogue in opened}) == 1
    assert sorted(router.fetched) == ["a", "b"]


def test_a_failed_fetch_may_be_tried_again(router: Router, tmp_path: Path) -> None:
    ref, failures = router.ref("a"), [ConnectionError("gone")]

    def fetch(ref: CatalogueRef, to_path: Path) -> None:
        if failures:
            raise failures.pop()
        router.fetch(ref, to_path)

    local = LocalCatalogues(tmp_path / "cache", fetch)
    with pytest.raises(ConnectionError):
        local.open(ref)
    assert local.open(ref).num_items == 2
