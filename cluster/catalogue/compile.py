"""Items to one compiled file: read and tokenize -> drop equals -> sort into a trie -> write.

Memory is bounded by a few numbers an item; `benchmarks/catalogue_compile.py` measures it, and the time.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.catalogue.faults import Fault, Faults, UploadError
from cluster.catalogue.file import BID
from cluster.catalogue.file_format import (
    CatalogueHeader,
    Preamble,
    Section,
    in_memory,
    joined,
    string_offsets,
    write_file,
)
from cluster.catalogue.item_spool import ItemSpool
from cluster.catalogue.spool import AnyArray, ArraySpool, BlobSpool
from cluster.catalogue.trie_build import BuiltTrie, EqualPathsError, build_trie
from cluster.catalogue.upload import Format, Item, parse_upload
from cluster.messages import Record
from cluster.text import Tokenizer

BATCH_ITEMS = 4096
BATCH_TEXT_CHARS = 1 << 20

Progress = Callable[[str, int, int | None], None]
"""Phase (`read`, `sort`, `write`), how much of it is done, of how much where that is known: items read, items
sorted, bytes written. What it raises ends the compilation."""


class CompileTarget(Record, frozen=True, kw_only=True):
    """What a catalogue is compiled for; all of it is in the file."""

    tokenizer: Tokenizer
    end_token: int
    """That follows each item's text: the model's end of text or of turn."""
    fingerprint: str
    """Of the tokenizer or model; workers compare it with their own."""


class Compiled(Record, frozen=True, kw_only=True):
    header: CatalogueHeader
    preamble: Preamble
    num_faults: int
    """Items that were left out, with `skip_bad`."""
    faults: tuple[Fault, ...]
    """Those of the first lines."""


def compile_upload(
    chunks: Iterable[bytes],
    path: Path,
    *,
    upload_format: Format,
    name: str,
    version: int,
    target: CompileTarget,
    content_length: int | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Compiled:
    """Onto `path` itself, synced; work files lie in a folder beside it, gone at the end.

    Raises UploadError with the faults where there are any, with `skip_bad` only for what leaves no catalogue;
    and OSError, as for a full disk.
    """
    faults = Faults()
    items = parse_upload(chunks, upload_format, faults, content_length=content_length)
    with tempfile.TemporaryDirectory(prefix=".work-", dir=path.parent) as folder:
        spool = ItemSpool(
            Path(folder),
            target.tokenizer,
            target.end_token,
            faults,
            are_attributes_typed=upload_format == "jsonl",
        )
        try:
            rows, built = _sorted(spool, items, faults, skip_bad, progress or _silent)
            try:
                header = _header(spool, rows, built, name, version, target)
                return _written(path, spool, rows, built, header, faults, progress or _silent)
            finally:
                for nodes in built.nodes.values():
                    nodes.close()
        finally:
            spool.close()


def _silent(phase: str, done: int, total: int | None) -> None:
    pass


def _sorted(
    spool: ItemSpool, items: Iterable[Item], faults: Faults, skip_bad: bool, progress: Progress
) -> tuple[AnyArray, BuiltTrie]:
    """Which rows are kept, and their trie."""
    _read(spool, items, progress)
    keep = np.ones(spool.count, np.bool_)
    spool.drop_equal_ids(keep)
    lengths = spool.path_lengths.read()
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    del lengths
    while len(rows := np.flatnonzero(keep)):
        try:
            built = build_trie(
                spool.tokens.mapped(),
                starts[rows],
                end_token=spool.end_token,
                vocab_size=spool.vocab_size,
                folder=spool.folder,
                progress=lambda done, total: progress("sort", done, total),
            )
        except EqualPathsError as equal:
            spool.note_equal_texts(rows[equal.earlier], rows[equal.later])
            keep[rows[equal.later]] = False
            if skip_bad:
                continue
            break
        if faults.count and not skip_bad:
            for nodes in built.nodes.values():
                nodes.close()
            break
        return rows, built
    if faults.count:
        what = "nothing is left" if skip_bad else "nothing was kept; `skip_bad` keeps the rest"
        raise UploadError(f"{faults.count} items are not as they should be, {what}", faults)
    raise UploadError("the upload has no items", faults)


def _read(spool: ItemSpool, items: Iterable[Item], progress: Progress) -> None:
    """A batch is tokenized while the next one is read."""
    with ThreadPoolExecutor(1, "catalogue-tokens") as executor:
        pending: tuple[list[Item], Future[list[list[int]]]] | None = None
        for batch in _batches(items):
            encoding = executor.submit(spool.encode, batch)
            if pending is not None:
                spool.extend(pending[0], pending[1].result())
                progress("read", spool.count, None)
            pending = (batch, encoding)
        if pending is not None:
            spool.extend(pending[0], pending[1].result())
            progress("read", spool.count, None)
    spool.finish()


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch, chars = list[Item](), 0
    for item in items:
        batch.append(item)
        chars += len(item.text)
        if len(batch) == BATCH_ITEMS or chars > BATCH_TEXT_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _header(
    spool: ItemSpool, rows: AnyArray, built: BuiltTrie, name: str, version: int, target: CompileTarget
) -> CatalogueHeader:
    return CatalogueHeader(
        name=name,
        version=version,
        fingerprint=target.fingerprint,
        end_token=target.end_token,
        vocab_size=spool.vocab_size,
        num_items=len(rows),
        num_nodes=built.num_nodes,
        num_path_tokens=int(spool.path_lengths.read()[rows].sum()),
        columns=(),
        arrays={},
    )


def _written(
    path: Path,
    spool: ItemSpool,
    rows: AnyArray,
    built: BuiltTrie,
    header: CatalogueHeader,
    faults: Faults,
    progress: Progress,
) -> Compiled:
    sections = {f"trie.{field}": _spooled(nodes) for field, nodes in built.nodes.items()}
    sections["upload_rank"] = in_memory(built.upload_rank)
    sections["root_child"] = in_memory(_root_child(built, spool.vocab_size))
    in_order = rows[built.upload_rank]
    sections[BID] = in_memory(spool.bids.read()[in_order])
    sections |= _strings("texts", spool.kept(spool.texts, rows)) | _strings(
        "ids", spool.kept(spool.ids, rows)
    )
    columns = []
    for index, attribute in enumerate(spool.attributes.values()):
        column, values, distinct = attribute.compiled(spool.lines)
        columns.append(column)
        with ArraySpool(spool.folder, f"column.{index}", values.dtype) as ordered:
            ordered.extend(values[in_order])
            sections[f"column.{index}"] = _spooled(ordered)
        if column.kind == "text":
            offsets, data = joined(distinct)
            sections[f"column.{index}.offsets"] = in_memory(offsets)
            sections[f"column.{index}.bytes"] = in_memory(data)
    header = msgspec.structs.replace(header, columns=tuple(columns))
    preamble = write_file(path, header, sections, lambda done, total: progress("write", done, total))
    return Compiled(header=header, preamble=preamble, num_faults=faults.count, faults=faults.listed())


def _spooled(spool: ArraySpool) -> Section:
    spool.flush()
    return Section(dtype=spool.dtype.newbyteorder("<").str, count=spool.count, source=spool.read)


def _strings(name: str, blobs: BlobSpool) -> dict[str, Section]:
    offsets = string_offsets(blobs.lengths())
    return {f"{name}.offsets": in_memory(offsets), f"{name}.bytes": _spooled(blobs.data)}


def _root_child(built: BuiltTrie, vocab_size: int) -> npt.NDArray[np.int32]:
    begin, end = built.nodes["first_child"].read(0, 2).tolist()
    children = np.full(vocab_size, -1, np.int32)
    children[built.nodes["token"].read(begin, end - begin)] = np.arange(begin, end, dtype=np.int32)
    return children
