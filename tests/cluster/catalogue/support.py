"""A small tokenizer, a slow and obvious trie, and uploads cut into chunks."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from cluster.catalogue.compile import Compiled, CompileTarget, compile_upload
from cluster.catalogue.file import Catalogue
from cluster.catalogue.trie_build import NODE_FIELDS
from cluster.catalogue.upload import Format
from cluster.text import Tokenizer

END = 0


@cache
def tokenizer() -> Tokenizer:
    """The end of text is 0; then bytes, and merges. Upper case is folded: texts can have equal tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("s", "h"), ("sh", "o"), ("sho", "e"), ("Ġ", "shoe"), ("r", "e"), ("re", "d"), ("Ġ", "red")]
    texts = ["<|end|>", *alphabet, *(left + right for left, right in merges)]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges)
    )
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return Tokenizer(made.to_str().encode())


def target() -> CompileTarget:
    return CompileTarget(tokenizer=tokenizer(), end_token=END, fingerprint="test-model")


def chunks_of(data: bytes, cuts: Sequence[int] = ()) -> Iterator[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in pairwise(places):
        yield data[start:end]


def compiled(path: Path, data: bytes, upload_format: Format = "jsonl", **options: Any) -> Compiled:
    arguments: dict[str, Any] = {"name": "shop", "version": 1, "target": target()} | options
    return compile_upload(chunks_of(data), path, upload_format=upload_format, **arguments)


def catalogue(folder: Path, data: bytes, upload_format: Format = "jsonl", **options: Any) -> Catalogue:
    compiled(folder / "shop.catalogue", data, upload_format, **options)
    return Catalogue.open(folder / "shop.catalogue")


class SlowNode:
    def __init__(self) -> None:
        self.children: dict[int, SlowNode] = {}
        self.ranks: list[int] = []
        """Of all items below."""
        self.is_leaf = False

    def num_inner(self) -> int:
        return 0 if self.is_leaf else 1 + sum(child.num_inner() for child in self.children.values())

    def height(self) -> int:
        return 0 if self.is_leaf else 1 + max(child.height() for child in self.children.values())


def slow_trie(paths: Sequence[Sequence[int]], end_token: int) -> dict[str, list[int]]:
    """Every field of `Trie`, from its description."""
    root = SlowNode()
    for rank, path in enumerate(paths):
        node = root
        node.ranks.append(rank)
        for token in (*path, end_token):
            node = node.children.setdefault(token, SlowNode())
            node.ranks.append(rank)
        node.is_leaf = True
    upload_rank = sorted(range(len(paths)), key=lambda rank: [*paths[rank], end_token])
    place = {rank: index for index, rank in enumerate(upload_rank)}
    fields: dict[str, list[int]] = {name: [] for name in NODE_FIELDS} | {"upload_rank": upload_rank}
    level: list[tuple[int, SlowNode]] = [(-1, root)]
    numbered = 1
    while level:
        below: list[tuple[int, SlowNode]] = []
        for token, node in level:
            fields["first_child"].append(numbered)
            fields["token"].append(token)
            fields["first_item"].append(min(place[rank] for rank in node.ranks))
            fields["num_items"].append(len(node.ranks))
            fields["leaf_item"].append(place[node.ranks[0]] if node.is_leaf else -1)
            fields["num_inner"].append(node.num_inner())
            fields["height"].append(node.height())
            fields["least_rank"].append(min(node.ranks))
            children = sorted(node.children.items())
            below += children
            numbered += len(children)
        level = below
    fields["first_child"].append(numbered)
    return fields
