"""What is wrong with a file is found before anything in it is used."""

import os
import random
from pathlib import Path

import pytest

from cluster.catalogue.file import Catalogue
from cluster.catalogue.file_format import (
    FORMAT_VERSION,
    CatalogueFileError,
    DamagedCatalogueError,
    NotACatalogueError,
    read_preamble,
)
from cluster.catalogue.sample import sample_csv
from tests.cluster.catalogue.support import compiled


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "shop"
    report = compiled(path, b"".join(sample_csv(200)), "csv")
    assert read_preamble(path) == report.preamble
    assert path.stat().st_size == report.preamble.file_bytes
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy"
    path.write_bytes(whole.read_bytes())
    return path


def test_every_change_of_a_byte_is_found(whole: Path, copy: Path) -> None:
    """All of preamble and header, and a sample of the rest."""
    data = bytearray(whole.read_bytes())
    header_end = 64 + read_preamble(whole).header_bytes
    rng = random.Random(2)
    places = [
        *range(64),
        *range(64, header_end, 7),
        *rng.sample(range(header_end, len(data)), 400),
        len(data) - 1,
    ]
    descriptor = os.open(copy, os.O_WRONLY)
    for place in places:
        os.pwrite(descriptor, bytes([data[place] ^ rng.randint(1, 255)]), place)
        with pytest.raises(CatalogueFileError):
            Catalogue.open(copy)
        os.pwrite(descriptor, data[place : place + 1], place)
    os.close(descriptor)
    assert Catalogue.open(copy).num_items == 200


def test_a_change_in_what_is_described_never_gets_through_unverified(whole: Path, copy: Path) -> None:
    """Without the checksum, too, a header that cannot be is refused by its type of error alone."""
    data = bytearray(whole.read_bytes())
    rng = random.Random(4)
    for place in range(64, 64 + read_preamble(whole).header_bytes, 3):
        changed = bytearray(data)
        changed[place] = rng.randrange(256)
        copy.write_bytes(changed)
        try:
            Catalogue.open(copy, verify=False)
        except CatalogueFileError:
            continue


@pytest.mark.parametrize("kept_bytes", [0, 5, 63, 64, 100, 5000, -1])
def test_a_cut_file_is_refused(whole: Path, copy: Path, kept_bytes: int) -> None:
    copy.write_bytes(whole.read_bytes()[:kept_bytes])
    with pytest.raises(CatalogueFileError, match=f"{copy}.*(is cut|its preamble says|does not begin with)"):
        Catalogue.open(copy)


def test_a_longer_file_is_refused(whole: Path, copy: Path) -> None:
    copy.write_bytes(whole.read_bytes() + b"\0")
    with pytest.raises(DamagedCatalogueError, match="its preamble says"):
        Catalogue.open(copy)


def test_other_files_and_versions_are_named(whole: Path, copy: Path) -> None:
    copy.write_bytes(b"GGUF" + bytes(1000))
    with pytest.raises(NotACatalogueError, match="is no compiled catalogue"):
        Catalogue.open(copy)
    data = bytearray(whole.read_bytes())
    data[8] = FORMAT_VERSION + 1
    copy.write_bytes(data)
    with pytest.raises(NotACatalogueError, match="has version 2 of the format, this program reads 1"):
        Catalogue.open(copy)
    with pytest.raises(FileNotFoundError):
        Catalogue.open(copy.with_name("missing"))


def test_damage_is_named(whole: Path, copy: Path) -> None:
    data = bytearray(whole.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    with pytest.raises(DamagedCatalogueError, match=r"hashes to [0-9a-f]{32}, its preamble says"):
        Catalogue.open(copy)
    assert Catalogue.open(copy, verify=False).num_items == 200


def test_an_open_catalogue_outlives_its_file(copy: Path) -> None:
    catalogue = Catalogue.open(copy)
    expected = [catalogue.text(index) for index in range(5)]
    trie = catalogue.trie
    copy.unlink()
    assert [catalogue.text(index) for index in range(5)] == expected
    del catalogue
    assert trie.num_items[0] == 200
    with pytest.raises(ValueError, match="read-only"):
        trie.token[0] = 1
