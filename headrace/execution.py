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
    obstacle: Obstacle | None
    """None as far as is known: building the artifact may show one."""


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    config: HeadraceConfig
    """With executor, engine and KV dtype concrete."""
    obstacle: Obstacle | None
    """Why `auto` is PyTorch; None where nobody asked or it is not."""

    @property
    def decodes_in_megakernel(self) -> bool:
        return self.config.decode.executor == "megakernel"

    @property
    def prefills_in_megakernel(self) -> bool:
        return self.config.prefill.engine == "megakernel" and self.config.prefill.num_replicas > 0


def choose(config: HeadraceConfig, facts: Facts) -> Execution:
    """Raises ExecutionError where the megakernel is asked for by name and cannot be."""
    obstacle = _block_obstacle(config) or facts.obstacle
    executor, engine = config.decode.executor, config.prefill.engine
    for key, value in (("decode.executor", executor), ("prefill.engine", engine)):
        if value == "megakernel" and obstacle is not None:
            raise ExecutionError(
                f"`{key}` is megakernel, which cannot run here: {obstacle.reason}. Fix: {obstacle.fix}, or "
                f"set `{key}` to auto or torch"
            )
    told = None
    if executor == "auto":
        told = obstacle or (_CUDA if facts.has_cuda else None)
        executor = "torch" if told else "megakernel"
    if engine == "auto":
        engine = "megakernel" if executor == "megakernel" else "torch"
    dtype = config.model.kv_dtype
    if dtype == "auto":
        dtype = "float16" if executor == "megakernel" else "float32"
    resolved = replace(
        config,
        model=replace(config.model, kv_dtype=dtype),
        decode=replace(config.decode, executor=executor),
        prefill=replace(config.prefill, engine=engine),
    )
    return Execution(config=resolved, obstacle=told)


def kv_format_of(config: HeadraceConfig) -> KvFormat:
    """Of a resolved configuration."""
    assert config.model.kv_dtype != "auto", "the configuration was not resolved"
    return config.model.kv_dtype


def summary(config: HeadraceConfig) -> str:
    """Of a resolved configuration, for a person."""
    engine = config.prefill.engine if config.prefill.num_replicas else "none"
    return f"decode {config.decode.executor}, prefill {engine}, KV {config.model.kv_dtype}"


_CUDA = Obstacle(
    "there is a CUDA device, which PyTorch runs on; the megakernel is for CPUs so far",
    'none needed; `decode.executor = "megakernel"` takes the CPU all the same',
)


def _block_obstacle(config: HeadraceConfig) -> Obstacle | None:
    size = config.decode.block_size_tokens
    if size % _BLOCK_GRANULE_TOKENS == 0:
        return None
    return Obstacle(
        f"KV blocks have {size} tokens, the megakernel's a multiple of {_BLOCK_GRANULE_TOKENS}",
        f"set `decode.block_size_tokens` to {-(-size // _BLOCK_GRANULE_TOKENS) * _BLOCK_GRANULE_TOKENS}",
    )
