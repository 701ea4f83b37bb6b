"""Catalogues as phrases: opened beside the engine, few at once, none for long where they cannot be had."""

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cluster.catalogue.fetch import FetchError
from cluster.catalogue.local import LocalCatalogues
from cluster.messages import CatalogueRef, Condition, TargetingParams
from decode_workers.drafting.phrase_files import MAX_OPENING, RETRY_S, PhraseFiles
from decode_workers.drafting.phrases import PhraseText
from decode_workers.targeting.item_chooser import ItemChooser
from tests.decode_workers.catalogue_files import compiled_ref
from tests.decode_workers.support import TOKENIZER, VOCAB_SIZE


class Elsewhere:
    """Files that a worker does not see: a fetch waits until it may, and fails where it must."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_broken = False
        self.fetched: list[str] = []
        self.now_s = 0.0
        self.local = LocalCatalogues(folder / "cache", self._fetch, max_open=3)
        self.files = PhraseFiles(self.local, TOKENIZER, VOCAB_SIZE, lambda: self.now_s)

    def ref(self, name: str) -> CatalogueRef:
        ref = compiled_ref(self.folder, name, [f"{name} is here", f"{name} is there"])
        return msgspec.structs.replace(ref, path=str(self.folder / "elsewhere" / name))

    def _fetch(self, ref: CatalogueRef, to_path: Path) -> None:
        self.fetched.append(ref.name)
        assert self.may_go_on.wait(60)
        if self.is_broken:
            raise FetchError("nobody has it")
        shutil.copyfile(self.folder / ref.name, to_path)

    def want(self, ref: CatalogueRef, tenant: str = "") -> None:
        self.files.want(ref, tenant)

    def settle(self) -> None:
        """Until nothing is being opened."""
        self.may_go_on.set()
        for thread in threading.enumerate():
            if thread.name == "phrases":
                thread.join(60)
        assert self.files._opening == {}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Elsewhere:
    return Elsewhere(tmp_path)


def test_phrases_are_there_once_their_file_is(elsewhere: Elsewhere) -> None:
    ref = elsewhere.ref("shop")
    elsewhere.may_go_on.clear()
    elsewhere.want(ref)
    assert elsewhere.files.find(ref) is None, "on its way"
    elsewhere.want(ref, "another tenant")
    elsewhere.settle()
    assert elsewhere.fetched == ["shop"]
    phrases = elsewhere.files.find(ref)
    assert phrases is not None
    said = TOKENIZER.encode("so the shop is ", allow_special=False)
    (place,) = PhraseText().find(phrases, elsewhere.files.bare_words, said)
    following = {guess.token_id: guess.share for guess in place.guesses()}
    assert following == {TOKENIZER.encode(letter, allow_special=False)[0]: 0.5 for letter in "ht"}
    elsewhere.want(ref)
    elsewhere.settle()
    assert elsewhere.fetched == ["shop"]


def test_what_cannot_be_had_is_asked_for_again_after_a_while(elsewhere: Elsewhere) -> None:
    ref = elsewhere.ref("shop")
    elsewhere.is_broken = True
    for now_s, tries in ((0.0, 1), (RETRY_S - 0.1, 1), (RETRY_S, 2), (RETRY_S + 0.1, 2)):
        elsewhere.now_s = now_s
        elsewhere.want(ref)
        elsewhere.settle()
        assert len(elsewhere.fetched) == tries
        assert elsewhere.files.find(ref) is None
    elsewhere.is_broken = False
    elsewhere.want(elsewhere.ref("bar"))
    elsewhere.settle()
    assert elsewhere.fetched[2:] == ["bar"], "others are not waited for"
    elsewhere.now_s = 3 * RETRY_S
    elsewhere.want(ref)
    elsewhere.settle()
    assert elsewhere.files.find(ref) is not None


def test_few_are_opened_at_once_and_one_of_a_tenant(elsewhere: Elsewhere) -> None:
    refs = [elsewhere.ref(name) for name in "abcdefgh"]
    elsewhere.may_go_on.clear()
    for ref in refs[:2]:
        elsewhere.want(ref, "one")
    for at, ref in enumerate(refs[2:]):
        elsewhere.want(ref, f"other {at}")
    assert len(elsewhere.files._opening) == MAX_OPENING
    elsewhere.settle()
    assert sorted(elsewhere.fetched) == ["a", "c", "d", "e"]
    elsewhere.want(refs[1], "one")
    elsewhere.settle()
    assert elsewhere.files.find(refs[1]) is not None


def test_a_damaged_file_and_a_defect_are_no_phrases(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, other = elsewhere.ref("shop"), elsewhere.ref("bar")
    file = elsewhere.folder / "shop"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    elsewhere.want(damaged)
    elsewhere.settle()
    assert elsewhere.files.find(damaged) is None
    with monkeypatch.context() as defect:
        defect.setattr(LocalCatalogues, "open", lambda *_: 1 // 0)
        elsewhere.want(other)
        elsewhere.settle()
    assert elsewhere.files.find(other) is None

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    elsewhere.now_s = RETRY_S
    elsewhere.want(other)
    elsewhere.settle()
    assert elsewhere.files.find(other) is None


def test_a_catalogue_of_a_larger_vocabulary_is_not_drafted_from(elsewhere: Elsewhere) -> None:
    ref = elsewhere.ref("shop")
    smaller = PhraseFiles(elsewhere.local, TOKENIZER, VOCAB_SIZE - 1)
    elsewhere.want(ref)
    elsewhere.settle()
    assert elsewhere.files.find(ref) is not None
    assert smaller.find(ref) is None


def mapped(folder: Path) -> set[str]:
    """The catalogues' files that this process has open."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {
        line.split(maxsplit=5)[5]
        for line in lines
        if line.endswith(tuple("abcdefgh")) and str(folder) in line
    }


@pytest.mark.parametrize("seed", range(3))
def test_phrases_and_targeting_together_have_few_open(tmp_path: Path, seed: int) -> None:
    """Whatever is asked for in whatever order, with and without filters, by two tenants."""
    refs = [compiled_ref(tmp_path, name, [f"{name}{letter}" for letter in "xyz"]) for name in "abcdefgh"]
    local = LocalCatalogues(tmp_path / "cache", lambda *_: None, max_open=3)
    chooser, files = ItemChooser(local), PhraseFiles(local, TOKENIZER, VOCAB_SIZE)
    dice = random.Random(seed)
    filters = ((), (Condition(attribute="bid", at_least=0.5),))
    asked: list[Callable[[CatalogueRef, str], object]] = [
        lambda ref, tenant: chooser.choose(
            TargetingParams(catalogue=ref, k=1, where=dice.choice(filters)), tenant
        ),
        lambda ref, tenant: files.want(ref, tenant),
        lambda ref, _: files.find(ref),
    ]
    for _ in range(60):
        at = dice.randrange(len(refs))
        dice.choice(asked)(refs[at], "one" if at < 5 else "two")
        for thread in threading.enumerate():
            if thread.name == "phrases":
                thread.join(60)
        assert len(mapped(tmp_path)) <= 3
    assert mapped(tmp_path)


def test_choices_are_kept_as_long_as_their_catalogue_is_open(tmp_path: Path) -> None:
    refs = [compiled_ref(tmp_path, name, [name]) for name in "ab"]
    local = LocalCatalogues(tmp_path / "cache", lambda *_: None, max_open=1)
    chooser = ItemChooser(local)
    first = chooser.choose(TargetingParams(catalogue=refs[0], k=1))
    assert chooser.choose(TargetingParams(catalogue=refs[0], k=1)) is first
    local.open(refs[1])
    again = chooser.choose(TargetingParams(catalogue=refs[0], k=1))
    assert again is not first
    assert again.catalogue is local.find(refs[0].checksum)
