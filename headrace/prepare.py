"""Before anything is deployed: the model opened, what runs it decided, compiled and sized."""

import logging
from typing import IO

import msgspec
import psutil

from cluster.config import HeadraceConfig
from cluster.kv_layout import BYTES_PER_ELEMENT
from cluster.model_card import ServedModel
from headrace.artifacts import Artifacts, executable
from headrace.execution import kv_format_of
from headrace.host import num_cores
from headrace.served_model import served_model
from headrace.sizing import Machine, resolve
from megakernel.artifact import Progress
from megakernel.model.load import open_model

_log = logging.getLogger("headrace")


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    served: ServedModel
    config: HeadraceConfig
    """Resolved: nothing in it is None or `auto` that depends on the machine or the model."""
    kv_bytes_per_token: int
    artifacts: Artifacts
    note: str
    """Why decode is PyTorch where nobody asked for that, and what would change it; else empty."""
    holds: tuple[IO[bytes], ...]
    """Kept open as long as replicas may load the artifacts."""


def prepare(config: HeadraceConfig, progress: Progress | None = None) -> Prepared:
    """Raises ModelFormatError, SizingError, ExecutionError, ArtifactError, and whatever `progress` raises."""
    opened = open_model(config.model.source)
    shape = opened.weights.shape
    made = executable(config, opened, progress)
    execution = made.execution
    element_bytes = BYTES_PER_ELEMENT[kv_format_of(execution.config)]
    kv_bytes_per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * element_bytes
    resolved = resolve(
        execution.config,
        machine=Machine(num_cores=num_cores(), available_memory_bytes=psutil.virtual_memory().available),
        bytes_per_token=kv_bytes_per_token,
        trained_context_tokens=shape.max_context_tokens,
    )
    note = ""
    if obstacle := execution.obstacle:
        note = f"decode runs in PyTorch, not in the megakernel: {obstacle.reason}. Fix: {obstacle.fix}"
        _log.warning("%s", note)
    if obstacle := execution.prefill_obstacle:
        engine = resolved.prefill.engine
        _log.info(
            "prefill runs in %s, not in TensorRT-LLM: %s. Fix: %s", engine, obstacle.reason, obstacle.fix
        )
    model = resolved.model
    return Prepared(
        served=served_model(model.source, model.name, model.max_context_tokens),
        config=resolved,
        kv_bytes_per_token=kv_bytes_per_token,
        artifacts=made.artifacts,
        note=note,
        holds=made.holds,
    )
