"""Emulated CUDA kernels beside the VM: the same step on both, buffer by buffer."""

from collections.abc import Sequence

import msgspec
import numpy as np

from megakernel.artifact import pack_weights
from megakernel.codegen_cuda import GeneratedCuda, generate_cuda
from megakernel.cuda_arguments import EXTRA_COUNTERS, RowFlag, StepArguments
from megakernel.cuda_runtime import turns_of
from megakernel.emulation import Counts, Emulation, Region, build_emulation, device_array, device_copy
from megakernel.graph import STATS_SPANS
from megakernel.machine import Machine, load_machine
from megakernel.model.rope import rope_frequencies
from megakernel.program import Program, Space
from megakernel.vm_state import NO_PARENT, VmKv, VmStep


def toy_gpu(num_workers: int = 3, scratch_bytes: int = 101_376) -> Machine:
    gpu = load_machine("l20")
    return msgspec.structs.replace(gpu, name="toy", num_workers=num_workers, scratch_bytes=scratch_bytes)


class EmulatedModel:
    """Programs of one artifact, their weights and counters in emulated device memory."""

    def __init__(self, programs: list[Program], weights, flags: Sequence[str] = (), edit=None) -> None:
        """`edit` changes the generated source: how tests plant faults."""
        self.programs = {program.bucket: program for program in programs}
        self.generated: GeneratedCuda = generate_cuda(programs, weights.formats)
        source = edit(self.generated.source) if edit else self.generated.source
        self.emulation: Emulation = build_emulation(source, extra_flags=flags)
        self.packed = device_array(self.generated.layout.num_bytes, np.uint8)
        pack_weights(self.generated.layout, weights, self.packed)
        geometry = programs[0].geometry
        self.turns = device_copy(turns_of(rope_frequencies(weights.shape), 0, geometry.max_context_tokens))
        self.counters = device_array(self.generated.num_counters + EXTRA_COUNTERS, np.uint32)
        self.epochs = dict.fromkeys(self.programs, 0)

    def run(self, bucket: int, kv: VmKv, step: VmStep, *, top_k: int = 0, seed: int = 0):
        """Buffers by name, [rows, columns], results, and the run's counts; `kv` changes as the step does."""
        program, geometry = self.programs[bucket], self.programs[bucket].geometry
        rows = step.num_rows
        pool = device_copy(np.stack(kv.layers), np.float16)
        paths = [_path(step, row) for row in range(rows)]
        spans = -(-geometry.vocab_size // STATS_SPANS["cuda"])
        constants = {
            "token_ids": step.token_ids,
            "positions": step.positions,
            "slots": step.slots,
            "context_lengths": step.context_lengths[step.sequences],
            "table_rows": step.sequences,
            "path_starts": np.cumsum([0, *map(len, paths)]),
            "path_slots": np.concatenate(paths),
            "block_tables": step.block_tables,
            "row_flags": np.full(rows, RowFlag.WANTS_REDUCTIONS),
            "needed_spans": np.full(-(-spans // 32), -1),
            "allowed_starts": np.zeros(rows + 1),
            "allowed_token_ids": np.zeros(1),
        }
        arrays = {name: device_copy(np.asarray(values), np.int32) for name, values in constants.items()}
        written = {
            "activations": device_array(self.generated.activation_bytes, np.uint8),
            "logits": device_array((bucket, geometry.vocab_size), np.float32),
            "stats": device_array((bucket, 3 * spans), np.float32),
            "values": device_array((rows, 2 + top_k), np.float32),
            "tokens": device_array((rows, 1 + top_k), np.int32),
            "allowed_logits": device_array(1, np.float32),
        }
        mutable = {"kv": pool, "counters": self.counters, "failure": device_array(8, np.uint32)}
        regions = [Region("weights", self.packed), Region("turns", self.turns)]
        regions += [Region(name, array) for name, array in arrays.items()]
        regions += [Region(name, array, is_writable=True) for name, array in mutable.items()]
        regions += [
            Region(name, array, is_writable=True, is_uninitialised=True) for name, array in written.items()
        ]
        arguments = StepArguments(
            num_slots=kv.num_slots,
            num_rows=rows,
            max_blocks=step.block_tables.shape[1],
            block_size_tokens=kv.block_size,
            top_k=top_k,
            epoch=self.epochs[bucket],
            timeout_ns=10**12,
        )
        for region in regions:
            setattr(arguments, region.name, region.array.ctypes.data)
        counts: Counts = self.emulation.run(
            GeneratedCuda.kernel_name(bucket),
            arguments,
            regions,
            num_blocks=self.generated.num_blocks,
            shared_bytes=self.generated.shared_bytes,
            seed=seed,
        )
        self.epochs[bucket] += 1
        for layer, values in zip(kv.layers, pool, strict=True):
            layer[...] = values
        buffers = self._buffers(program, written["activations"], rows)
        buffers["logits"] = written["logits"][:rows]
        buffers["head_stats"] = written["stats"][:rows]
        return buffers, (written["values"], written["tokens"]), counts

    def _buffers(self, program: Program, activations, rows: int):
        floats = activations.view(np.float32)
        found = {}
        for buffer in program.buffers:
            if buffer.space is Space.ACTIVATION:
                start = self.generated.buffer_offsets[buffer.name] // 4
                size = program.bucket * buffer.columns
                found[buffer.name] = floats[start : start + size].reshape(program.bucket, -1)[:rows]
        return found


def _path(step: VmStep, row: int) -> list[int]:
    path = []
    while row != NO_PARENT:
        path.append(int(step.slots[row]))
        row = int(step.parents[row])
    return path[::-1]
