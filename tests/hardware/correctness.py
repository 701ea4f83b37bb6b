"""Layers of real models on the GPU, beside float64: logits, KV and reductions, in every format.

Weights are random bytes, dequantized for the reference from the device's own packed memory; contexts are
random KV. Whole steps are compared with a reference that rounds nothing and with one that rounds where the
kernels do, loosely; and each kind of op with what it must make of what the kernels handed it, tightly.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.gpu_builds import BuildMissingError
from benchmarks.gpu_memory import View, device_view, kv_pool, opened, settle
from benchmarks.gpu_models import GpuModel
from benchmarks.gpu_steps import Group, Pool, chain, groups_of, key_slots, num_blocks_of, rows_of
from megakernel.cuda_runtime import CudaRuntime
from megakernel.step import Rows, StepOutput
from tests.hardware.dequantize import tensors
from tests.hardware.part import PartResult, Setting
from tests.hardware.reference import Gap, StepBuffers, Tensors, gap, op_gaps, reference_step

SHAPE_NAMES = ("qwen3-1.7b", "llama-3.2-1b", "qwen2.5-1.5b")
FORMATS = ("Q4_0", "W4G128", "Q8_0", "W8G128", "BF16")
NUM_LAYERS = 2
CONTEXTS = (1, 127, 128, 129, 700)
TREE, WIDE_TREE = (-1, 0, 0, 1), (-1, -1, 0, 1)
TOP_K = 8

STEP_BOUND = 2.0**-6
"""Of a whole step beside both references, over the largest logit (or key, or value). An activation that is
rounded to bfloat16 is off by up to 2^-9 of itself; a logit sums thousands of such errors of either sign, and
so is off by about that share of the logits' own spread, once for each of the nine products on the way through
two layers: their root sum square is 3 * 2^-9. The largest of a million such errors is five times the typical
one, and the largest logit four to five times the spread: 2^-7 of it at most, and as much again to spare.
Rounding likewise helps little over several ops: an activation that is off by a little is rounded the other
way at times, by 2^-8 of itself, and those that are make others so."""
OP_BOUND = 2.0**-10
"""Of a single op, over the largest of its results. Sums in float32 are off in the seventh digit: of thousands
of activations a few lie so near the middle between two bfloat16 that they are rounded the other way. One such
moves a result by 2^-8 of itself over the square root of thousands of terms, 2^-13. Of keys and values one
rounding to float16, 2^-11 of a number, is in it."""
MLP_BOUND = 2.0**-7
"""That of the MLP's activations, which are stored in bfloat16: half a step of the largest is 2^-8 of it."""
LOG_SUM_BOUND = 1e-5
"""Relative, beside the log-sum-exp of the same logits in float64."""


class Case(msgspec.Struct, frozen=True):
    name: str
    sequences: tuple[tuple[int, tuple[int, ...]], ...]
    """(context, parents) of each."""

    @property
    def num_rows(self) -> int:
        return sum(len(parents) for _, parents in self.sequences)


def cases_of(bucket: int) -> list[Case]:
    """Single rows; and where the bucket holds them, 16 sequences at once, and trees and chains."""
    cases = [Case(f"one row after {context}", ((context, chain(1)),)) for context in CONTEXTS]
    if bucket >= 16:
        many = tuple((CONTEXTS[row % len(CONTEXTS)] + row // len(CONTEXTS), chain(1)) for row in range(16))
        mixed = ((1, TREE), (127, chain(3)), (128, chain(1)), (129, WIDE_TREE), (700, chain(4)))
        cases += [Case("16 rows", many), Case("trees and chains", mixed)]
    return cases


def num_blocks_for(cases: list[Case]) -> int:
    """That one case's sequences need, and some that none has."""
    most = max(
        sum(num_blocks_of(context, len(parents)) for context, parents in case.sequences) for case in cases
    )
    return most + 8


def models(*, is_quick: bool, search_s: float) -> list[GpuModel]:
    """All rows of a bucket go the same way, so that one of 16 also shows single rows: it comes first."""
    shapes = SHAPE_NAMES[:1] if is_quick else SHAPE_NAMES
    wanted = [(name, bucket) for bucket in (16, 1) for name in shapes]
    return [
        GpuModel(shape_name=name, format=format, bucket=bucket, num_layers=NUM_LAYERS, search_s=search_s)
        for name, bucket in wanted
        for format in FORMATS
    ]


def run(setting: Setting) -> PartResult:
    return check_models(setting, models(is_quick=setting.is_quick, search_s=setting.search_s))


def check_models(setting: Setting, wanted: Sequence[GpuModel]) -> PartResult:
    """Each in turn, as far as time goes."""
    problems: list[str] = []
    left_out: list[str] = []
    figures: dict[str, float] = {}
    for model in wanted:
        try:
            compiled = setting.compiled(model)
        except BuildMissingError as error:
            left_out.append(str(error))
            problems += [str(error)] if error.is_final else []
            continue
        if setting.left_s <= 0:
            left_out.append(f"{model.name}: no time left")
            continue
        cases = cases_of(model.bucket)
        with opened(compiled, num_blocks_for(cases)) as runtime:
            found = check_model(runtime, cases)
        worst = found.worst
        said = ", ".join(f"{name} {each.largest:.1e}" for name, each in worst.items())
        print(f"  {model.name}, off by at most: {said}", flush=True)
        figures |= {f"{name.replace(' ', '_')}_{model.name}": each.largest for name, each in worst.items()}
        problems += [f"{model.name}, {problem}" for problem in found.problems]
        setting.keep(PartResult(problems=tuple(problems), left_out=tuple(left_out), figures=figures))
    if not figures:
        problems.append("nothing was checked")
    return PartResult(problems=tuple(problems), left_out=tuple(left_out), figures=figures)


class ModelCheck(msgspec.Struct, frozen=True, kw_only=True):
    gaps: dict[str, dict[str, Gap]]
    """By case, by what is compared."""
    problems: list[str]

    @property
    def worst(self) -> dict[str, Gap]:
        names = next(iter(self.gaps.values()))
        return {
            name: max((gaps[name] for gaps in self.gaps.values()), key=lambda each: each.largest)
            for name in names
        }


def check_model(runtime: CudaRuntime, cases: list[Case], view: View = device_view) -> ModelCheck:
    """Every case on KV of its own choosing; the pool is left as random as it was."""
    compiled = runtime.compiled
    packed = view(runtime.weights_address, compiled.layout.num_bytes)
    weights = tensors(packed, compiled.layout, compiled.shape)
    checked = ModelCheck(gaps={}, problems=[])
    for number, case in enumerate(cases):
        pool = Pool(runtime.num_blocks, seed=number)
        groups = groups_of(case.sequences, pool, compiled.shape.vocab_size, seed=number)
        gaps, problems = check_step(runtime, weights, groups, view)
        checked.gaps[case.name] = gaps
        checked.problems.extend(f"{case.name}: {problem}" for problem in problems)
    return checked


def check_step(
    runtime: CudaRuntime, weights: Tensors, groups: list[Group], view: View = device_view
) -> tuple[dict[str, Gap], list[str]]:
    """Gaps by what is compared, and what is wrong."""
    pool = kv_pool(runtime, view)
    before = pool.clone()
    settle()
    rows = rows_of(groups, top_k=min(TOP_K, runtime.shape.vocab_size), needs_log_sums=True)
    output = runtime.step(rows)
    found = _buffers_of(runtime, rows, output, pool.device)
    slots = key_slots(groups)
    exact, rounded = (
        reference_step(runtime.shape, weights, rows, slots, before, is_rounded=is_rounded)
        for is_rounded in (False, True)
    )
    steps = {
        "logits": gap(found.logits, exact.logits),
        "logits beside like rounding": gap(found.logits, rounded.logits),
        "KV": gap(found.kv, exact.kv),
        "KV beside like rounding": gap(found.kv, rounded.kv),
    }
    ops = op_gaps(runtime.shape, weights, rows, slots, before, found)
    problems = [
        *_beyond(steps, STEP_BOUND),
        *_beyond({name: each for name, each in ops.items() if name != "MLP"}, OP_BOUND),
        *_beyond({"MLP": ops["MLP"]}, max(OP_BOUND, MLP_BOUND)),
        *wrong_reductions(output, rows.top_k, pool.device),
    ]
    own = torch.from_numpy(rows.slots).long().to(pool.device)
    if not torch.equal(pool[:, own].double(), found.kv):
        problems.append("read_kv does not give what lies in the pool")
    after = pool.clone()
    after[:, own] = before[:, own]
    if not torch.equal(after.view(torch.int16), before.view(torch.int16)):
        problems.append("KV was written in slots of no row")
    return steps | ops, problems


def _beyond(gaps: dict[str, Gap], bound: float) -> list[str]:
    return [
        f"{name} off by {each.largest:.2e} of the largest, more than {bound:.2e}"
        for name, each in gaps.items()
        if not each.largest <= bound
    ]


def wrong_reductions(output: StepOutput, top_k: int, device: torch.device | str = "cpu") -> list[str]:
    """Beside the step's own logits, of which they are, bit for bit but for the log-sum-exp."""
    logits = torch.from_numpy(output.logits).to(device)
    found = output.reductions

    def given(values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    problems = []
    maxima, tokens = logits.max(dim=1)
    if not torch.equal(given(found.maxima), maxima):
        problems.append("the maximum is not that of the logits")
    first = (logits == maxima[:, None]).int().argmax(dim=1)
    if not torch.equal(given(found.token_ids).long(), first):
        problems.append(f"the best tokens are {found.token_ids.tolist()}, not {tokens.tolist()}")
    order = torch.sort(logits, dim=1, descending=True, stable=True)
    if not torch.equal(given(found.top_token_ids).long(), order.indices[:, :top_k]):
        problems.append("the top tokens are not those of the logits")
    if not torch.equal(given(found.top_logits), order.values[:, :top_k]):
        problems.append("the top tokens' logits are not theirs")
    sums = torch.logsumexp(logits.double(), dim=1)
    off = float(((given(found.log_sums).double() - sums) / sums).abs().max())
    if not off <= LOG_SUM_BOUND:
        problems.append(f"log-sum-exp is off by {off:.1e} of itself")
    return problems


def _buffers_of(runtime: CudaRuntime, rows: Rows, output: StepOutput, device: torch.device) -> StepBuffers:
    num_rows = len(rows.token_ids)
    bucket = next(bucket for bucket in runtime.compiled.buckets if bucket >= num_rows)

    def buffer(name: str) -> torch.Tensor:
        return torch.from_numpy(runtime.buffer(name, bucket)[:num_rows]).to(device).double()

    return StepBuffers(
        hidden=buffer("hidden"),
        queries=buffer("queries"),
        mlp=buffer("mlp"),
        logits=torch.from_numpy(output.logits).to(device).double(),
        kv=_read_kv(runtime, rows).to(device).double(),
    )


def _read_kv(runtime: CudaRuntime, rows: Rows) -> torch.Tensor:
    """[layers, rows, K or V, KV heads, head_dim] float16"""
    shape = runtime.shape
    layers = []
    for layer in range(shape.num_layers):
        wire = torch.frombuffer(bytearray(runtime.read_kv(layer, rows.slots)), dtype=torch.float16)
        layers.append(wire.view(2, len(rows.slots), shape.num_kv_heads, shape.head_dim).transpose(0, 1))
    return torch.stack(layers)
