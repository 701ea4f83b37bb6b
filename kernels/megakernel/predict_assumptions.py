"""What a prediction takes for granted, in words: nothing here has been checked against the machine."""

from collections.abc import Iterator, Mapping

from megakernel.graph import DEFAULT_SPLIT_TOKENS
from megakernel.machine import PROBED, Machine
from megakernel.predict import Question
from megakernel.weight_formats import WEIGHT_BITS
from megakernel.work import CACHE_SPEEDUP, macs_per_us

LABEL = "assumption: "


def assumptions_of(question: Question, stored: Mapping[str, str]) -> tuple[str, ...]:
    """One a line, each with LABEL first. `stored` are the formats that were asked for, before packing."""
    lines = (*_machine_lines(question.machine, _used_formats(question)), *_step_lines(question, stored))
    return tuple(f"{LABEL}{line}" for line in lines)


def _machine_lines(machine: Machine, formats: tuple[str, ...]) -> Iterator[str]:
    origin = "as probed here" if machine.name == PROBED else "as its description says, not measured"
    yield (
        f"bandwidth: {machine.bandwidth_gb_s:g} GB/s of all {machine.num_workers} workers, "
        f"{machine.worker_bandwidth_gb_s:g} of one, {origin}; active loads share it equally"
    )
    yield f"load latency: {machine.load_latency_us:g} us, after a load's last byte"
    yield f"sync cost: {machine.sync_us:g} us, from a counter's last arrival to a waiter's next instruction"
    yield f"instruction cost: {machine.instruction_us:g} us each, whatever it does"
    rates = ", ".join(f"{name} {macs_per_us(machine, name):,.0f}" for name in formats)
    yield (
        f"mma rate: {rates} multiply-accumulates a us a worker, unpacking weights included; rows are paid "
        f"for in groups of {machine.row_group}"
    )
    attention = machine.attention_macs_per_us or macs_per_us(machine, "F16")
    yield (f"attention rate: {attention:,.0f} multiply-accumulates a us a worker; softmax is free")
    if machine.kind == "cuda":
        yield (
            "attention loads: after its waits, rows and splits in turn, each with one load latency; "
            f"splits of {DEFAULT_SPLIT_TOKENS} tokens are merged in two more"
        )
    norms = " and norms" if machine.prepared_per_us is None else ""
    yield (
        f"activations: read from a shared cache, {CACHE_SPEEDUP:g} times as fast as one worker reads memory; "
        f"epilogues{norms} are free"
    )


def _step_lines(question: Question, stored: Mapping[str, str]) -> Iterator[str]:
    packed = question.formats
    sizes = ", ".join(f"{name} {WEIGHT_BITS[name]:g}" for name in _used_formats(question))
    yield f"weights: {_by_format(packed)}; {sizes} bits a weight, with scales and without padding"
    if changed := {name for name in packed if packed[name] != stored[name]}:
        was = ", ".join(sorted({stored[name] for name in changed}))
        now = ", ".join(sorted({packed[name] for name in changed}))
        yield f"packing: {was} matrices are packed as {now}, and count as that"
    yield "KV: float16, each row a context of its own, of which its own token is the last"
    yield "head: logits of every row, over the whole vocabulary"
    yield "bucket: each batch has a program of exactly its rows"
    yield "clocks: no other work on the machine, no change of frequency"
    yield "host: no time; neither the launch, nor sampling, nor what is copied in and out"
    if question.search_s:
        yield (
            f"schedule: searched, up to {question.search_s:g} s a batch, judged at "
            f"{question.schedule_context} tokens of one context that rows share; how far it gets depends on "
            "this computer"
        )
    else:
        yield "schedule: list-scheduled, not searched"


def _used_formats(question: Question) -> tuple[str, ...]:
    return tuple(sorted(set(_matrix_formats(question.formats).values())))


def _by_format(formats: Mapping[str, str]) -> str:
    """Such as `Q4_1 (down, gate, ...), Q8_0 (embed)`."""
    parts: dict[str, set[str]] = {}
    for name, format in _matrix_formats(formats).items():
        parts.setdefault(format, set()).add(name.rpartition(".")[2])
    return ", ".join(f"{format} ({', '.join(sorted(names))})" for format, names in sorted(parts.items()))


def _matrix_formats(formats: Mapping[str, str]) -> dict[str, str]:
    return {name: format for name, format in formats.items() if not name.endswith(("norm", "bias"))}
