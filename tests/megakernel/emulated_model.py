"""Emulated CUDA kernels of one artifact, and what a step of theirs leaves in memory."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from megakernel.artifact import pack_weights
from megakernel.codegen_cuda import GeneratedCuda, generate_cuda
from megakernel.cuda_activations import StoredActivations, rounded_values
from megakernel.cuda_arguments import EXTRA_COUNTERS, StepArguments
from megakernel.cuda_rows import Limits, StepAsk, read_rows
from megakernel.cuda_runtime import turns_of
from megakernel.emulation import (
    STORE,
    Counts,
    Emulation,
    Journal,
    Region,
    build_emulation,
    device_array,
    device_copy,
)
from megakernel.machine import Machine, load_machine
from megakernel.model.rope import rope_frequencies
from megakernel.program import Program, Space
from megakernel.step import Rows
from megakernel.vm_state import VmKv

MOST_STORES = 1 << 20
WRITTEN = ("activations", "logits", "stats", "values", "tokens", "allowed_logits")
"""Regions that hold nothing before a step. Where it writes nothing they stay as they were made."""


def toy_gpu(num_workers: int = 3, scratch_bytes: int = 101_376) -> Machine:
    gpu = load_machine("l20")
    return msgspec.structs.replace(gpu, name="toy", num_workers=num_workers, scratch_bytes=scratch_bytes)


class EmulatedStep(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a step left. NaN and -1 where it wrote nothing."""

    asked: StepAsk
    regions: Mapping[str, np.ndarray]
    """Of WRITTEN, and `kv`: [layers, slots, columns]."""
    buffers: Mapping[str, np.ndarray]
    """Between ops and of the head, by name, [rows, columns]."""
    offsets: Mapping[str, int]
    """Of buffers between ops, into the activations."""
    activations: StoredActivations
    counts: Counts
    journal: Journal

    @property
    def values(self) -> np.ndarray:
        """[rows, 2 + top_k]"""
        return self.regions["values"]

    @property
    def tokens(self) -> np.ndarray:
        """[rows, 1 + top_k]"""
        return self.regions["tokens"]

    @property
    def bits(self) -> bytes:
        """All of it."""
        between = (self.buffers[name] for name in sorted(self.buffers))
        return b"".join(array.tobytes() for array in (*self.regions.values(), *between))


class EmulatedModel:
    """Programs of one artifact, their weights and counters in emulated device memory."""

    def __init__(self, programs: list[Program], weights, flags: Sequence[str] = (), edit=None) -> None:
        """`edit` changes the generated source: how tests plant faults."""
        self.programs = {program.bucket: program for program in programs}
        self.generated: GeneratedCuda = generate_cuda(programs, weights.formats)
        self.activations = dict(zip(self.programs, self.generated.activations, strict=True))
        source = edit(self.generated.source) if edit else self.generated.source
        self.emulation: Emulation = build_emulation(source, extra_flags=flags)
        self.packed = device_array(self.generated.layout.num_bytes, np.uint8)
        pack_weights(self.generated.layout, weights, self.packed)
        geometry = programs[0].geometry
        self.turns = device_copy(turns_of(rope_frequencies(weights.shape), 0, geometry.max_context_tokens))
        self.counters = device_array(self.generated.num_counters + EXTRA_COUNTERS, np.uint32)
        self.epochs = dict.fromkeys(self.programs, 0)

    def run(
        self, bucket: int, kv: VmKv, rows: Rows, *, seed: int = 0, has_journal: bool = False
    ) -> EmulatedStep:
        """One step; `kv` stays as it is. Raises EmulationError and StepError."""
        program = self.programs[bucket]
        asked = read_rows(rows, self._limits(program, kv))
        tables = {name: getattr(asked.tables, name) for name in asked.tables.__struct_fields__}
        constants = {name: device_copy(at_least_one(table)) for name, table in tables.items()}
        written = self._written(program, asked, rows)
        mutable = {
            "kv": device_copy(np.stack(kv.layers), np.float16),
            "counters": self.counters,
            "failure": device_array(8, np.uint32),
        }
        constants |= {"weights": self.packed, "turns": self.turns}
        regions = [Region(name, array) for name, array in constants.items()]
        regions += [Region(name, array, is_writable=True) for name, array in mutable.items()]
        regions += [
            Region(name, array, is_writable=True, is_uninitialised=True) for name, array in written.items()
        ]
        arguments = StepArguments(
            num_slots=kv.num_slots,
            num_rows=len(rows.token_ids),
            max_blocks=asked.max_blocks,
            block_size_tokens=kv.block_size,
            top_k=rows.top_k,
            epoch=self.epochs[bucket],
            timeout_ns=10**12,
        )
        for region in regions:
            setattr(arguments, region.name, region.array.ctypes.data)
        journal = np.zeros(MOST_STORES if has_journal else 0, STORE)
        counts = self.emulation.run(
            GeneratedCuda.kernel_name(bucket),
            arguments,
            regions,
            num_blocks=self.generated.num_blocks,
            shared_bytes=self.generated.shared_bytes,
            seed=seed,
            journal=journal if has_journal else None,
        )
        assert not has_journal or counts.stores <= MOST_STORES
        buffers = self._buffers(program, written, len(rows.token_ids))
        self.epochs[bucket] += 1
        return EmulatedStep(
            asked=asked,
            regions={**written, "kv": mutable["kv"]},
            buffers=buffers,
            offsets=self.generated.buffer_offsets,
            activations=self.activations[bucket],
            counts=counts,
            journal=journal[: counts.stores],
        )

    def _limits(self, program: Program, kv: VmKv) -> Limits:
        return Limits(
            max_rows=program.bucket,
            vocab_size=program.geometry.vocab_size,
            max_context_tokens=program.geometry.max_context_tokens,
            block_size_tokens=kv.block_size,
            num_blocks=kv.num_slots // kv.block_size,
            stats_span=program.stats_span,
        )

    def _written(self, program: Program, asked: StepAsk, rows: Rows) -> dict[str, np.ndarray]:
        """WRITTEN, as poison that no step would leave: NaN and -1."""
        num_rows, vocab_size = len(rows.token_ids), program.geometry.vocab_size
        sizes = {
            "activations": ((self.generated.activation_bytes // 4,), np.float32),
            "logits": ((num_rows, vocab_size), np.float32),
            "stats": ((num_rows, 3 * -(-vocab_size // program.stats_span)), np.float32),
            "values": ((num_rows, 2 + rows.top_k), np.float32),
            "tokens": ((num_rows, 1 + rows.top_k), np.int32),
            "allowed_logits": ((max(1, asked.num_allowed),), np.float32),
        }
        made = {name: device_array(*size) for name, size in sizes.items()}
        for array in made.values():
            array.view(np.uint8)[...] = 0xFF
        return made

    def _buffers(
        self, program: Program, written: Mapping[str, np.ndarray], rows: int
    ) -> dict[str, np.ndarray]:
        found = {"logits": written["logits"], "head_stats": written["stats"]}
        activations = self.activations[program.bucket]
        for buffer in program.buffers:
            if (format := activations.format_of(program, buffer.name)) is not None:
                start = self.generated.buffer_offsets[buffer.name] // 2
                halves = written["activations"].view(np.uint16)
                own = halves[start : start + rows * buffer.columns].reshape(rows, -1)
                found[buffer.name] = rounded_values(format, own)
            elif buffer.space is Space.ACTIVATION:
                start = self.generated.buffer_offsets[buffer.name] // 4
                own = written["activations"][start : start + program.bucket * buffer.columns]
                found[buffer.name] = own.reshape(program.bucket, -1)[:rows]
        return found


def at_least_one(table: np.ndarray) -> np.ndarray:
    """A region has to be somewhere, even of what nobody reads."""
    return table if table.size else np.zeros(1, table.dtype)
