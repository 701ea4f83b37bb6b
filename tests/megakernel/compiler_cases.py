"""Models, machines and plans that the compiler's tests share: small enough to read what comes out."""

import msgspec

from megakernel.machine import Machine, load_machine
from megakernel.model.shape import ModelShape
from megakernel.plan import OpPlan, Plan


def small_shape(**changes: object) -> ModelShape:
    """A Qwen3 layer with biases on top: every optional part of the family at once."""
    shape = ModelShape(
        architecture="qwen3",
        num_layers=1,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=700,
        max_context_tokens=256,
        rope_theta=1e5,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        has_qkv_bias=True,
        has_qk_norm=True,
        has_tied_head=True,
    )
    return msgspec.structs.replace(shape, **changes)


def small_machine(num_workers: int = 3) -> Machine:
    """With a GPU's figures, planned as a CPU is: tiles may be as small as tests like."""
    return msgspec.structs.replace(
        load_machine("l4"), num_workers=num_workers, name="small", kind="cpu", reserved_bytes=0
    )


def cuda_machine(num_workers: int = 3) -> Machine:
    """A GPU of few SMs."""
    return msgspec.structs.replace(load_machine("l4"), num_workers=num_workers, name="small-gpu")


def cpu_machine(num_workers: int = 2, scratch_bytes: int = 1 << 20) -> Machine:
    """A desktop's cores, without a probe."""
    return Machine(
        name="some-cpu",
        kind="cpu",
        num_workers=num_workers,
        scratch_bytes=scratch_bytes,
        page_bytes=1024,
        bandwidth_gb_s=20.0,
        worker_bandwidth_gb_s=14.0,
        load_latency_us=0.1,
        sync_us=0.2,
        macs_per_us={"Q4_1": 195e3, "Q8_0": 195e3, "F16": 49e3, "BF16": 49e3, "F32": 49e3},
        instruction_us=0.05,
        row_group=4,
        computes_while_loading=True,
    )


def small_plan(**changes: OpPlan) -> Plan:
    ops = {
        "embed": OpPlan(tile_columns=32),
        "qkv": OpPlan(tile_columns=48),
        "attention": OpPlan(tile_columns=1),
        "o": OpPlan(tile_columns=32),
        "gate_up": OpPlan(tile_columns=64),
        "down": OpPlan(tile_columns=32, num_k_tiles=2),
        "head": OpPlan(tile_columns=256),
    }
    return Plan(ops=ops | changes)
