"""Builds what a replica runs from the resolved configuration and the model: engines, executors, workers.

Runs inside the replica's process; torch is imported here and nowhere above.
"""

from collections.abc import Callable

import msgspec

from cluster.config import HeadraceConfig
from cluster.ids import Epoch
from cluster.kv_layout import KvDtype, KvLayout
from cluster.model_card import ServedModel
from cluster.text import Tokenizer
from decode_workers.executor import StepExecutor
from decode_workers.worker import DecodeWorker
from megakernel.model.load import open_model
from prefill_workers.worker import PrefillWorker

KV_DTYPE: KvDtype = "float32"
"""Of both roles, or their KV could not pass: what the oracle computes in."""


class BuiltPrefill(msgspec.Struct, frozen=True):
    worker: PrefillWorker
    layout: KvLayout


class ModelChangedError(RuntimeError):
    """The replica opened other weights than the router's card describes: the file changed in between."""


def prefill_worker(config: HeadraceConfig, served: ServedModel, host: str) -> BuiltPrefill:
    """Loads the weights: seconds. Raises ModelChangedError, or what opening the model raises."""
    import torch

    from prefill_workers.torch_engine import TorchPrefillEngine

    opened = open_model(config.model.source)
    _check_same(served, opened.fingerprint)
    block_size = config.decode.block_size_tokens
    engine = TorchPrefillEngine(
        opened.weights,
        opened.fingerprint,
        num_blocks=_num_blocks(config.prefill.kv_pool_tokens, block_size),
        block_size_tokens=block_size,
        max_tokens_per_step=config.prefill.max_tokens_per_step,
        num_threads=_resolved(config.prefill.num_threads),
        device=_device(torch.cuda.is_available()),
        dtype=KV_DTYPE,
    )
    worker = PrefillWorker(
        engine,
        vocab_size=served.card.vocab_size,
        max_context_tokens=served.card.max_context_tokens,
        config=config.prefill,
        transfer=config.transfer,
        host=host,
        stall_timeout_s=config.decode.stall_timeout_s,
    )
    return BuiltPrefill(worker, engine.layout)


def decode_worker(
    config: HeadraceConfig, served: ServedModel, host: str, epoch: Callable[[], Epoch]
) -> DecodeWorker:
    """Loads the weights: seconds. Raises ModelChangedError, or what opening the model raises."""
    return DecodeWorker(
        _executor(config, served),
        Tokenizer.of(served),
        served.card,
        config.decode,
        epoch=epoch,
        host=host,
    )


def _executor(config: HeadraceConfig, served: ServedModel) -> StepExecutor:
    num_blocks = _num_blocks(config.decode.kv_pool_tokens, config.decode.block_size_tokens)
    opened = open_model(config.model.source)
    _check_same(served, opened.fingerprint)
    if config.decode.executor == "noop":
        from decode_workers.noop_executor import NoopExecutor

        shape = opened.weights.shape
        layout = KvLayout(
            model_fingerprint=opened.fingerprint,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=KV_DTYPE,
            block_size_tokens=config.decode.block_size_tokens,
        )
        return NoopExecutor(layout, num_blocks, shape.vocab_size, token_id=_plain_token(served))
    import torch

    from decode_workers.torch_executor import TorchExecutor

    return TorchExecutor(
        opened.weights,
        opened.fingerprint,
        num_blocks=num_blocks,
        block_size_tokens=config.decode.block_size_tokens,
        num_threads=_resolved(config.decode.num_threads),
        device=_device(torch.cuda.is_available()),
        dtype=KV_DTYPE,
    )


def _plain_token(served: ServedModel) -> int:
    """One that is text and ends nothing, for an executor that emits it for ever."""
    tokenizer = Tokenizer.of(served)
    token_id: int = tokenizer.encode(" a", allow_special=False)[0]
    assert token_id not in served.card.eos_token_ids
    return token_id


def _check_same(served: ServedModel, fingerprint: str) -> None:
    if fingerprint != served.card.fingerprint:
        raise ModelChangedError(
            f"the weights here have the fingerprint {fingerprint}, the cluster serves "
            f"{served.card.fingerprint}: the model's file changed since the start; restart the cluster"
        )


def _device(has_cuda: bool) -> str:
    return "cuda" if has_cuda else "cpu"


def _num_blocks(pool_tokens: int | None, block_size_tokens: int) -> int:
    return -(-_resolved(pool_tokens) // block_size_tokens)


def _resolved(value: int | None) -> int:
    """`sizing.resolve` has filled it in."""
    assert value is not None, "the configuration was not resolved"
    return value
