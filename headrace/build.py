"""Builds what a replica runs from the resolved configuration and the model: engines, executors, workers.

Runs inside the replica's process; torch is imported here and nowhere above.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from cluster.catalogue.fetch import fetch_catalogue
from cluster.catalogue.local import LocalCatalogues
from cluster.config import DecodeConfig, HeadraceConfig
from cluster.ids import Epoch
from cluster.kv_layout import KvLayout
from cluster.model_card import ServedModel
from cluster.text import Tokenizer
from decode_workers.drafting.history import History
from decode_workers.drafting.phrase_files import PhraseFiles
from decode_workers.drafting.speculator import Speculator
from decode_workers.engine import Drafter
from decode_workers.executor import StepExecutor
from decode_workers.worker import DecodeWorker
from headrace.execution import ExecutionError, kv_format_of
from headrace.gpu import GpuUnusableError, gpu_machine
from megakernel.artifact_folder import Wanted, open_artifact
from megakernel.build import BuildError
from megakernel.compiled import Compiled
from megakernel.cuda_device import CudaError, CudaUnavailableError, ResidencyError
from megakernel.manifest import UnsupportedModelError
from megakernel.model.load import OpenedModel, open_model
from megakernel.runtime import Runtime
from megakernel.schedule_error import ScheduleError
from prefill_workers.engine import PrefillEngine
from prefill_workers.worker import PrefillWorker

_MAX_RUNNING = 64
"""Prompts that TensorRT-LLM computes at once, at most."""
_START_TIMEOUT_S = 60.0
"""For its ranks to load the connector, once the engine says that it has started."""


class BuiltPrefill(msgspec.Struct, frozen=True):
    worker: PrefillWorker
    layout: KvLayout


class ModelChangedError(RuntimeError):
    """The replica opened other weights than the router's card describes: the file changed in between."""


def prefill_worker(
    config: HeadraceConfig, served: ServedModel, host: str, artifact: str | None
) -> BuiltPrefill:
    """Loads the weights: seconds. Raises ModelChangedError, or what opening model or artifact raises."""
    engine = _engine(config, served, artifact)
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
    config: HeadraceConfig,
    served: ServedModel,
    host: str,
    artifact: str | None,
    epoch: Callable[[], Epoch],
    fetched_catalogues: Path,
) -> DecodeWorker:
    """Loads the weights: seconds. `fetched_catalogues` is a folder, made when one is fetched.

    Raises ModelChangedError, ExecutionError where the GPU does not do, or what opening model or artifact
    raises.
    """
    tokenizer = Tokenizer.of(served)
    catalogues = LocalCatalogues(fetched_catalogues, fetch_catalogue, max_open=config.catalogue.max_open)
    return DecodeWorker(
        _executor(config, served, artifact),
        tokenizer,
        served.card,
        config.decode,
        epoch=epoch,
        host=host,
        catalogues=catalogues,
        transfer=config.transfer,
        drafter=_drafter(config.decode, PhraseFiles(catalogues, tokenizer, served.card.vocab_size)),
    )


def _drafter(config: DecodeConfig, phrases: PhraseFiles) -> Drafter | None:
    if config.speculation == "off":
        return None
    return Speculator(History(config.draft_history_nodes, config.draft_history_nodes_per_tenant), phrases)


def _engine(config: HeadraceConfig, served: ServedModel, artifact: str | None) -> PrefillEngine:
    if config.prefill.engine == "tensorrt":
        return _tensorrt_engine(config, served)
    num_blocks = _num_blocks(config.prefill.kv_pool_tokens, config.decode.block_size_tokens)
    if config.prefill.engine == "megakernel":
        from prefill_workers.megakernel_engine import MegaKernelPrefillEngine

        compiled = _compiled(config, served, artifact, _resolved(config.prefill.num_threads))
        return MegaKernelPrefillEngine(
            Runtime(compiled, num_blocks, config.decode.block_size_tokens),
            served.card.fingerprint,
            num_blocks=num_blocks,
            block_size_tokens=config.decode.block_size_tokens,
            max_tokens_per_step=_resolved(config.prefill.max_tokens_per_step),
        )
    import torch

    from prefill_workers.torch_engine import TorchPrefillEngine

    opened = _opened(config, served)
    return TorchPrefillEngine(
        opened.weights,
        opened.fingerprint,
        num_blocks=num_blocks,
        block_size_tokens=config.decode.block_size_tokens,
        max_tokens_per_step=_resolved(config.prefill.max_tokens_per_step),
        num_threads=_resolved(config.prefill.num_threads),
        device=_device(torch.cuda.is_available()),
        kv_dtype=kv_format_of(config),
    )


def _tensorrt_engine(config: HeadraceConfig, served: ServedModel) -> PrefillEngine:
    """Its ranks open the weights; only their shape is read here."""
    from prefill_workers.trtllm_engine import BLOCK_TOKENS, TensorRtLlmSettings, start_engine

    shape = _opened(config, served).weights.shape
    layout = KvLayout(
        model_fingerprint=served.card.fingerprint,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=kv_format_of(config),
        block_size_tokens=BLOCK_TOKENS,
    )
    prefill = config.prefill
    settings = TensorRtLlmSettings(
        model=config.model.source,
        tensor_parallel_size=prefill.tensor_parallel_size,
        max_tokens_per_step=_resolved(prefill.max_tokens_per_step),
        max_context_tokens=served.card.max_context_tokens,
        max_running=_MAX_RUNNING,
        staging_bytes=prefill.staging_mb << 20,
        lease_s=_lease_s(config),
        start_timeout_s=_START_TIMEOUT_S,
        index_block_tokens=config.decode.block_size_tokens,
    )
    return start_engine(settings, layout, _num_blocks(prefill.kv_pool_tokens, BLOCK_TOKENS))


def _lease_s(config: HeadraceConfig) -> float:
    """Longer than a hand-off takes that ends: then blocks are let go by whom it ends."""
    return config.decode.stall_timeout_s + config.decode.handoff_timeout_s + config.transfer.timeout_s


def _executor(config: HeadraceConfig, served: ServedModel, artifact: str | None) -> StepExecutor:
    block_size = config.decode.block_size_tokens
    num_blocks = _num_blocks(config.decode.kv_pool_tokens, block_size)
    if config.decode.executor == "megakernel":
        from decode_workers.megakernel_executor import MegaKernelExecutor

        compiled = _compiled(config, served, artifact, _resolved(config.decode.num_threads))
        return MegaKernelExecutor(compiled, served.card.fingerprint, num_blocks, block_size)
    opened = _opened(config, served)
    if config.decode.executor == "megakernel-cuda":
        return _gpu_executor(opened, num_blocks, block_size)
    if config.decode.executor == "noop":
        from decode_workers.noop_executor import NoopExecutor

        shape = opened.weights.shape
        layout = KvLayout(
            model_fingerprint=opened.fingerprint,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=kv_format_of(config),
            block_size_tokens=block_size,
        )
        return NoopExecutor(layout, num_blocks, shape.vocab_size, token_id=_plain_token(served))
    import torch

    from decode_workers.torch_executor import TorchExecutor

    return TorchExecutor(
        opened.weights,
        opened.fingerprint,
        num_blocks=num_blocks,
        block_size_tokens=block_size,
        num_threads=_resolved(config.decode.num_threads),
        device=_device(torch.cuda.is_available()),
        kv_dtype=kv_format_of(config),
    )


def _gpu_executor(opened: OpenedModel, num_blocks: int, block_size_tokens: int) -> StepExecutor:
    """Its kernels are in the user's cache since the supervisor chose it. Raises ExecutionError."""
    from decode_workers.megakernel_executor import MegaKernelExecutor
    from megakernel.gpu_build import build_for_gpu

    try:
        compiled = build_for_gpu(opened, gpu_machine())
        return MegaKernelExecutor(compiled, opened.fingerprint, num_blocks, block_size_tokens)
    except (
        *(GpuUnusableError, CudaUnavailableError, CudaError, ResidencyError),
        *(BuildError, ScheduleError, UnsupportedModelError),
    ) as error:
        raise ExecutionError(
            f"`decode.executor` is megakernel-cuda, which cannot run on this worker's GPU: {error}"
        ) from error


def _compiled(
    config: HeadraceConfig, served: ServedModel, artifact: str | None, num_threads: int
) -> Compiled:
    """Of the folder that the supervisor found or built. Raises ArtifactError."""
    assert artifact is not None, "the megakernel without an artifact"
    opened = open_artifact(Path(artifact))
    opened.check_for(
        Wanted(fingerprint=served.card.fingerprint, kv_format=kv_format_of(config), num_workers=num_threads)
    )
    return opened.load()


def _opened(config: HeadraceConfig, served: ServedModel) -> OpenedModel:
    opened = open_model(config.model.source)
    if opened.fingerprint != served.card.fingerprint:
        raise ModelChangedError(
            f"the weights here have the fingerprint {opened.fingerprint}, the cluster serves "
            f"{served.card.fingerprint}: the model's file changed since the start; restart the cluster"
        )
    return opened


def _plain_token(served: ServedModel) -> int:
    """One that is text and ends nothing, for an executor that emits it for ever."""
    tokenizer = Tokenizer.of(served)
    token_id: int = tokenizer.encode(" a", allow_special=False)[0]
    assert token_id not in served.card.eos_token_ids
    return token_id


def _device(has_cuda: bool) -> str:
    return "cuda" if has_cuda else "cpu"


def _num_blocks(pool_tokens: int | None, block_size_tokens: int) -> int:
    return -(-_resolved(pool_tokens) // block_size_tokens)


def _resolved(value: int | None) -> int:
    """`sizing.resolve` has filled it in."""
    assert value is not None, "the configuration was not resolved"
    return value
