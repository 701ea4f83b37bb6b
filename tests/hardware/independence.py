"""Rows do not depend on one another: a row's logits and KV have the same bits alone, in company, in any
bucket."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu_builds import BuildMissingError
from benchmarks.gpu_memory import View, device_view, kv_pool, opened, settle
from benchmarks.gpu_models import GpuModel
from benchmarks.gpu_steps import Group, Pool, chain, groups_of, num_blocks_of, rows_of, slot_of
from megakernel.cuda_compiled import CompiledCuda
from megakernel.cuda_device import Driver
from megakernel.cuda_runtime import CudaRuntime
from tests.hardware.part import PartResult, Setting

SHAPE_NAME = "qwen3-1.7b"
FORMATS, FORMATS_QUICK = ("Q4_0", "Q8_0", "BF16"), ("Q4_0",)
BUCKETS, BUCKETS_QUICK = (16, 1, 2, 4, 8), (16, 1)
"""The first one's rows in company are what all others are compared with."""
CHAIN_CONTEXT, CHAIN_LENGTH = 126, 4
"""Over the end of an attention split."""
CONTEXTS = (700, 1, 127, 128, 129, 15, 16, 17, 300, 511, 512, 2)


def models(*, is_quick: bool, search_s: float) -> list[GpuModel]:
    """All layers: the same cubins that decode is measured with."""
    return [
        GpuModel(shape_name=SHAPE_NAME, format=format, bucket=bucket, search_s=search_s)
        for format in (FORMATS_QUICK if is_quick else FORMATS)
        for bucket in (BUCKETS_QUICK if is_quick else BUCKETS)
    ]


def run(setting: Setting) -> PartResult:
    problems: list[str] = []
    left_out: list[str] = []
    compared = 0
    for format in FORMATS_QUICK if setting.is_quick else FORMATS:
        built: list[CompiledCuda] = []
        for model in models(is_quick=setting.is_quick, search_s=setting.search_s):
            if model.format != format:
                continue
            try:
                built.append(setting.compiled(model))
            except BuildMissingError as error:
                left_out.append(str(error))
                problems += [str(error)] if error.is_final else []
        if len(built) < 2 or setting.left_s <= 0:
            left_out.append(f"{format}: {len(built)} buckets, {max(0.0, setting.left_s):.0f} s left")
            continue
        found = check_format(built)
        buckets = ", ".join(str(compiled.buckets[-1]) for compiled in built)
        print(f"  {format}: {found.num_compared} rows compared in buckets {buckets}", flush=True)
        compared += found.num_compared
        problems += [f"{format}: {problem}" for problem in found.problems]
    if not compared:
        problems.append("nothing was compared")
    return PartResult(
        problems=tuple(problems), left_out=tuple(left_out), figures={"rows_compared": float(compared)}
    )


class Comparison:
    """Bits of each sequence's rows, as the first step that had them gave them."""

    def __init__(self) -> None:
        self.bits: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.num_compared = 0
        self.problems: list[str] = []

    def add(self, sequence: int, logits: torch.Tensor, kv: torch.Tensor, how: str) -> None:
        """[rows, vocab] and [layers, rows, K or V, KV heads, head_dim]."""
        if sequence not in self.bits:
            self.bits[sequence] = (logits, kv)
            return
        self.num_compared += len(logits)
        for name, found, expected in zip(("logits", "KV"), (logits, kv), self.bits[sequence], strict=True):
            if not torch.equal(found, expected):
                off = int((found != expected).sum())
                self.problems.append(f"sequence {sequence} {how}: {off} of its {name} are others")


def sequences_of(num_rows: int, vocab_size: int, pool: Pool) -> list[Group]:
    """A chain, and single rows."""
    lengths = [(CHAIN_CONTEXT, chain(CHAIN_LENGTH))] if num_rows > CHAIN_LENGTH else []
    singles = num_rows - CHAIN_LENGTH * len(lengths)
    return groups_of([*lengths, *((context, chain(1)) for context in CONTEXTS[:singles])], pool, vocab_size)


def check_format(
    built: Sequence[CompiledCuda], *, drivers: Sequence[Driver] | None = None, view: View = device_view
) -> Comparison:
    """`built`: one model by bucket, the largest first. Weights and pools are the same in each."""
    largest = built[0]
    sizes = [(CHAIN_CONTEXT, CHAIN_LENGTH), *((context, 1) for context in CONTEXTS)]
    num_blocks = sum(num_blocks_of(context, rows) for context, rows in sizes)
    sequences = sequences_of(largest.buckets[-1], largest.shape.vocab_size, Pool(num_blocks))
    comparison = Comparison()
    for index, compiled in enumerate(built):
        driver = drivers[index] if drivers is not None else None
        with opened(compiled, num_blocks, driver=driver, view=view) as runtime:
            bucket = compiled.buckets[-1]
            for numbers in companies(sequences, bucket):
                groups = [sequences[number] for number in numbers]
                results = _step(runtime, groups, view)
                for number, (logits, kv) in zip(numbers, results, strict=True):
                    comparison.add(number, logits, kv, f"with {len(numbers) - 1} others in bucket {bucket}")
            if len(sequences[0].tokens) > 1:
                comparison.add(0, *_row_by_row(runtime, sequences[0], view), f"row by row in bucket {bucket}")
    return comparison


def companies(sequences: Sequence[Group], bucket: int) -> Iterator[list[int]]:
    """Numbers of sequences that share a step: as many as the bucket holds, in two orders, then each alone."""
    every = list(range(len(sequences)))
    for order in (every, every[::-1]):
        company: list[int] = []
        for number in order:
            rows = len(sequences[number].tokens)
            if sum(len(sequences[one].tokens) for one in company) + rows > bucket:
                if company:
                    yield company
                company = []
            if rows <= bucket:
                company.append(number)
        if company:
            yield company
    yield from ([number] for number in every if len(sequences[number].tokens) <= bucket)


def _step(runtime: CudaRuntime, groups: list[Group], view: View) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By group, logits and KV of its rows; the pool is then as it was."""
    rows = rows_of(groups, needs_best=False)
    pool = kv_pool(runtime, view)
    slots = torch.from_numpy(rows.slots).long().to(pool.device)
    with _restored(pool, slots):
        logits = torch.from_numpy(runtime.step(rows).logits)
        kv = pool[:, slots].cpu()
    ends = rows.sequence_starts.tolist()
    return [(logits[first:end], kv[:, first:end]) for first, end in itertools.pairwise(ends)]


def _row_by_row(runtime: CudaRuntime, group: Group, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """The chain's rows, each after those before it have been committed."""
    pool = kv_pool(runtime, view)
    places = [slot_of(group, group.context + row) for row in range(len(group.tokens))]
    slots = torch.tensor(places, device=pool.device)
    found = []
    with _restored(pool, slots):
        for row, token in enumerate(group.tokens):
            alone = Group(context=group.context + row, tokens=(token,), parents=chain(1), blocks=group.blocks)
            found.append(torch.from_numpy(runtime.step(rows_of([alone], needs_best=False)).logits))
        kv = pool[:, slots].cpu()
    return torch.cat(found), kv


@contextlib.contextmanager
def _restored(pool: torch.Tensor, slots: torch.Tensor) -> Iterator[None]:
    before = pool[:, slots].clone()
    settle()
    yield
    pool[:, slots] = before
    settle()
