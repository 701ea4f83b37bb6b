"""What runs prefill and decode here, and what KV is kept as: one decision, before anything starts. Pure."""

import msgspec
from msgspec.structs import replace

from cluster.config import HeadraceConfig
from megakernel.codegen_limits import KvFormat

_BLOCK_GRANULE_TOKENS = 16
"""The megakernel's KV blocks are multiples of it."""


class ExecutionError(ValueError):
    """What the configuration asks for cannot run here; the message says why, and what would help.

    Ends the supervisor; shown by the command line.
    """


class Obstacle(msgspec.Struct, frozen=True):
    """Why the megakernel does not run here."""

    reason: str
    fix: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Of this machine, and of the model on it."""

    has_cuda: bool
    """For PyTorch."""
    obstacle: Obstacle | None
    """To the megakernel on the CPU. None as far as is known: building the artifact may show one."""
    gpu_obstacle: Obstacle | None
    """To the megakernel on a GPU, likewise."""
    tensorrt_obstacle: Obstacle | None
    """To TensorRT-LLM, but for a GPU."""
    nixl_obstacle: Obstacle | None = None


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    config: HeadraceConfig
    """With executor, engine and KV dtype concrete."""
    obstacle: Obstacle | None
    """Why decode's `auto` is PyTorch; None where nobody asked or it is not."""
    prefill_obstacle: Obstacle | None = None
    """Why prefill's `auto` is not TensorRT-LLM, on a machine with a GPU."""

    @property
    def decodes_in_megakernel(self) -> bool:
        """On the CPU."""
        return self.config.decode.executor == "megakernel"

    @property
    def decodes_on_gpu(self) -> bool:
        """In the megakernel."""
        return self.config.decode.executor == "megakernel-cuda"

    @property
    def prefills_in_megakernel(self) -> bool:
        return self.config.prefill.engine == "megakernel" and self.config.prefill.num_replicas > 0


def choose(config: HeadraceConfig, facts: Facts) -> Execution:
    """Raises ExecutionError where what is asked for by name (an executor, an engine, NIXL) cannot run."""
    obstacle = _block_obstacle(config) or facts.obstacle
    gpu_obstacle = _kv_obstacle(config) or facts.gpu_obstacle
    executor, engine = config.decode.executor, config.prefill.engine
    for key, value, wanted, found in (
        ("decode.executor", executor, "megakernel", obstacle),
        ("decode.executor", executor, "megakernel-cuda", gpu_obstacle),
        ("prefill.engine", engine, "megakernel", obstacle),
        ("prefill.engine", engine, "tensorrt", facts.tensorrt_obstacle),
    ):
        if value == wanted and found is not None:
            raise ExecutionError(
                f"`{key}` is {value}, which cannot run here: {found.reason}. Fix: {found.fix}, or "
                f"set `{key}` to auto or torch"
            )
    if config.transfer.transport == "nixl" and facts.nixl_obstacle is not None:
        raise ExecutionError(
            f"`transfer.transport` is nixl, which cannot run here: {facts.nixl_obstacle.reason}. "
            f"Fix: {facts.nixl_obstacle.fix}, or set `transfer.transport` to auto"
        )
    told = None
    if executor == "auto":
        gpu_obstacle = gpu_obstacle or _artifact_obstacle(config)
        if gpu_obstacle is None:
            executor = "megakernel-cuda"
        else:
            told = gpu_obstacle if facts.has_cuda else obstacle
            executor = "megakernel" if told is None else "torch"
    prefill_told = None
    if engine == "auto" and facts.has_cuda and facts.tensorrt_obstacle is None:
        engine = "tensorrt"
    elif engine == "auto":
        engine = "megakernel" if executor == "megakernel" else "torch"
        prefill_told = facts.tensorrt_obstacle if facts.has_cuda else None
    if engine != "tensorrt" and config.prefill.tensor_parallel_size > 1:
        raise ExecutionError(
            f"`prefill.tensor_parallel_size` is {config.prefill.tensor_parallel_size}, and prefill runs in "
            f"{engine}, on one device. Fix: leave it out, or set `prefill.engine` to tensorrt"
        )
    dtype = config.model.kv_dtype
    if dtype == "auto":
        dtype = "float16" if executor in ("megakernel", "megakernel-cuda") else "float32"
    resolved = replace(
        config,
        model=replace(config.model, kv_dtype=dtype),
        decode=replace(config.decode, executor=executor),
        prefill=replace(config.prefill, engine=engine),
    )
    return Execution(config=resolved, obstacle=told, prefill_obstacle=prefill_told)


def kv_format_of(config: HeadraceConfig) -> KvFormat:
    """Of a resolved configuration."""
    assert config.model.kv_dtype != "auto", "the configuration was not resolved"
    return config.model.kv_dtype


def summary(config: HeadraceConfig) -> str:
    """Of a resolved configuration, for a person."""
    engine = config.prefill.engine if config.prefill.num_replicas else "none"
    return f"decode {config.decode.executor}, prefill {engine}, KV {config.model.kv_dtype}"


def _artifact_obstacle(config: HeadraceConfig) -> Obstacle | None:
    if config.model.artifact is None:
        return None
    return Obstacle("`model.artifact` is for a CPU", 'name none, or set `decode.executor` to "megakernel"')


def _kv_obstacle(config: HeadraceConfig) -> Obstacle | None:
    if config.model.kv_dtype != "float32":
        return None
    return Obstacle("its KV is float16 on a GPU", 'set `model.kv_dtype` to "float16"')


def _block_obstacle(config: HeadraceConfig) -> Obstacle | None:
    size = config.decode.block_size_tokens
    if size % _BLOCK_GRANULE_TOKENS == 0:
        return None
    return Obstacle(
        f"KV blocks have {size} tokens, the megakernel's a multiple of {_BLOCK_GRANULE_TOKENS}",
        f"set `decode.block_size_tokens` to {-(-size // _BLOCK_GRANULE_TOKENS) * _BLOCK_GRANULE_TOKENS}",
    )
