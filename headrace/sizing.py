"""Fills in what the configuration leaves to the machine: threads, KV pools, the context. Pure."""

import msgspec
from msgspec.structs import replace

from cluster.config import HeadraceConfig, PrefillConfig

_KV_MEMORY_SHARE = 0.25
"""Of the memory available at start, for the KV pools of one role, all its replicas together."""
_POOL_TOKENS = 16384
_CONTEXTS_IN_POOL = 2
"""With room for one full context only, nothing could start before it ends."""
_FEWEST_CONTEXT_TOKENS = 128
_STEP_TOKENS = 256
_TENSORRT_STEP_TOKENS = 8192
"""TensorRT-LLM's own default."""


class SizingError(ValueError):
    """The machine is too small for the model; the message says what would help. Ends the supervisor."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    num_cores: int
    available_memory_bytes: int


def gpus_per_worker(num_gpus: float, config: HeadraceConfig) -> float:
    """A whole one each where there are enough, else equal shares, in thousandths; every rank of a
    tensor-parallel engine counts as a worker. Raises SizingError where such a rank would have to share."""
    num_workers = (
        config.decode.num_replicas + config.prefill.num_replicas * config.prefill.tensor_parallel_size
    )
    if num_gpus >= num_workers:
        return 1.0
    if num_gpus and config.prefill.tensor_parallel_size > 1:
        raise SizingError(
            f"decode and prefill workers with `prefill.tensor_parallel_size` "
            f"{config.prefill.tensor_parallel_size} need {num_workers} GPUs, and there are {num_gpus:g}; "
            "lower it, or the numbers of replicas"
        )
    return int(1000 * num_gpus / num_workers) / 1000


def resolve(
    config: HeadraceConfig, *, machine: Machine, bytes_per_token: int, trained_context_tokens: int
) -> HeadraceConfig:
    """The same configuration with every None of it that depends on the machine made concrete; its engines
    are chosen (`execution`).

    A context that nobody chose is what the model was trained for, or less where a pool could not hold it.
    Raises SizingError.
    """
    affordable = {
        role: int(machine.available_memory_bytes * _KV_MEMORY_SHARE) // (bytes_per_token * max(1, replicas))
        for role, replicas in (
            ("prefill", config.prefill.num_replicas),
            ("decode", config.decode.num_replicas),
        )
    }
    pools = {"prefill": config.prefill.kv_pool_tokens, "decode": config.decode.kv_pool_tokens}
    limits = [pools[role] or affordable[role] for role in ("prefill", "decode")]
    context = config.model.max_context_tokens or min(trained_context_tokens, *limits)
    if context < min(_FEWEST_CONTEXT_TOKENS, trained_context_tokens):
        raise SizingError(
            f"{machine.available_memory_bytes >> 20} MiB of available memory hold KV for only {context} "
            f"tokens of {bytes_per_token} bytes: free some, or serve fewer replicas or a smaller model"
        )
    wanted = max(_POOL_TOKENS, _CONTEXTS_IN_POOL * context)
    sizes = {role: pools[role] or max(context, min(wanted, affordable[role])) for role in pools}
    return replace(
        config,
        model=replace(config.model, max_context_tokens=context),
        prefill=replace(
            config.prefill,
            kv_pool_tokens=sizes["prefill"],
            num_threads=config.prefill.num_threads or machine.num_cores,
            max_tokens_per_step=_step_tokens(config.prefill, min(sizes["prefill"], context), bytes_per_token),
        ),
        decode=replace(
            config.decode,
            kv_pool_tokens=sizes["decode"],
            num_threads=config.decode.num_threads or machine.num_cores,
        ),
    )


def _step_tokens(prefill: PrefillConfig, longest_tokens: int, bytes_per_token: int) -> int:
    """A worker measures a step of so many: they must fit into TensorRT-LLM's staging memory too.

    Raises SizingError where they were chosen and do not.
    """
    chosen = prefill.max_tokens_per_step
    if prefill.engine != "tensorrt":
        return chosen or _STEP_TOKENS
    staged_tokens = (prefill.staging_mb << 20) // bytes_per_token
    if chosen is None:
        return max(1, min(_TENSORRT_STEP_TOKENS, longest_tokens, staged_tokens))
    if min(chosen, longest_tokens) > staged_tokens:
        raise SizingError(
            f"`prefill.staging_mb` {prefill.staging_mb} holds KV of {staged_tokens} tokens, and "
            f"`prefill.max_tokens_per_step` is {chosen}: raise the one, or lower the other"
        )
    return chosen
