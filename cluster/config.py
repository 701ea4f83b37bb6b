"""One configuration for a whole cluster: composed, frozen, strict.

Read from TOML; every key has a default that serves the packaged model on one machine. An unknown key
is an error that names the nearest valid one; a value out of range is an error that names the range.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
PositiveSeconds = Annotated[float, Meta(gt=0)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what would be right."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections."""


class ModelConfig(Section, frozen=True, kw_only=True):
    source: str = "smollm2-135m-instruct"
    """The packaged model's name, a GGUF file, a Hugging Face folder, or a hub id."""
    name: str | None = None
    """What users send as `model`; None: taken from the source."""
    max_context_tokens: Positive | None = None
    """None: what the model was trained for."""
    artifact: str | None = None
    """A folder that `headrace compile --out` made, for this model and CPU. None: of the user's cache, built
    where there is none yet."""
    kv_dtype: Literal["auto", "float16", "float32"] = "auto"
    """What KV is kept and handed over as, by both roles. `auto`: float16 where the megakernel decodes, else
    float32."""


class RouterConfig(Section, frozen=True, kw_only=True):
    host: str = "0.0.0.0"  # noqa: S104 - the ingress binds all interfaces in any case
    http_port: Port = 8000
    grpc_port: Port = 8001
    num_replicas: Positive = 1
    max_inflight_requests: Positive = 1024
    """A replica answers 429 with Retry-After beyond this many."""
    max_body_bytes: Positive = 4 * 1024 * 1024
    default_max_tokens: Positive = 256
    recovery_timeout_s: PositiveSeconds = 60.0
    """A sequence that lost its decode worker waits this long, within its deadline, for one to go on with."""
    request_timeout_s: PositiveSeconds = 600.0
    """A request without a deadline of its own ends here."""


class PrefillConfig(Section, frozen=True, kw_only=True):
    engine: Literal["auto", "megakernel", "tensorrt", "torch"] = "auto"
    """`tensorrt` is TensorRT-LLM. `auto`: that where it is installed, there is a GPU, and the model is a
    Hugging Face folder; else the megakernel where it decodes on the CPU too, else PyTorch."""
    num_replicas: Annotated[int, Meta(ge=0)] = 1
    num_threads: Positive | None = None
    """None: all cores of the machine."""
    kv_pool_tokens: Positive | None = None
    """None: chosen from the model and the memory at hand."""
    max_tokens_per_step: Positive | None = None
    """None: what suits the engine, 8192 for TensorRT-LLM where memory for KV is enough, 256 for others."""
    max_queued_requests: Positive = 256
    tensor_parallel_size: Positive = 1
    """GPUs of one TensorRT-LLM engine; other engines have one."""
    staging_mb: Positive = 256
    """Host memory that TensorRT-LLM's KV passes through, pinned: as much as hand-offs under way hold."""


class DecodeConfig(Section, frozen=True, kw_only=True):
    executor: Literal["auto", "megakernel", "megakernel-cuda", "torch", "noop"] = "auto"
    """`megakernel` is the CPU's, `megakernel-cuda` a GPU's. `auto`: a GPU's where there are one that it knows
    and the tools to compile for it, else PyTorch on a GPU, else the CPU's where it can be compiled for it,
    else PyTorch. `noop` computes nothing and emits fixed tokens: it measures everything else."""
    num_replicas: Positive = 1
    num_threads: Positive | None = None
    kv_pool_tokens: Positive | None = None
    block_size_tokens: Annotated[int, Meta(ge=1, le=256)] = 16
    max_running_sequences: Positive = 64
    max_queued_requests: Positive = 1024
    max_rows_per_step: Annotated[int, Meta(ge=1, le=64)] = 64
    max_steps_per_launch: Annotated[int, Meta(ge=1, le=64)] = 8
    """Steps that a GPU may run without the host in between, while all sequences are greedy and none waits
    to join; 1: none. None either unless `speculation` is off."""
    speculation: Literal["auto", "off"] = "auto"
    """`auto`: drafts of what a request's own text, its campaign's earlier outputs and the phrases that it
    names suggest, where they are expected to pay. Tokens are the same either way."""
    draft_history_nodes: Annotated[int, Meta(ge=1024, le=100_000_000)] = 262_144
    """Of earlier outputs, about 130 bytes each; the least recently used go first."""
    draft_history_nodes_per_tenant: Annotated[int, Meta(ge=1024, le=100_000_000)] = 65_536
    handoff_timeout_s: PositiveSeconds = 30.0
    """A reservation whose hand-off shows no progress this long is reported failed."""
    stall_timeout_s: PositiveSeconds = 30.0
    """No step for this long with work queued is unhealthy."""


class PlacementConfig(Section, frozen=True, kw_only=True):
    redis_url: str | None = None
    """None: a redis-server of our own, on a Unix socket, gone with the cluster."""
    lease_ttl_s: PositiveSeconds = 3.0
    session_ttl_s: PositiveSeconds = 900.0
    block_ttl_s: PositiveSeconds = 900.0
    lookup_timeout_s: PositiveSeconds = 0.002
    prefill_hop: Literal["auto", "never", "always"] = "auto"
    """`auto`: where predicted to be faster. A request's `x-headrace-prefill-hop` header overrides it."""


class TransferConfig(Section, frozen=True, kw_only=True):
    transport: Literal["auto", "nixl", "grpc"] = "auto"
    """`auto`: shared memory within a host, NIXL between hosts where both ends have it and an RDMA device,
    gRPC bytes elsewhere. `nixl`: NIXL over whatever there is, within a host too; bytes where that fails."""
    nixl_mb: Positive = 256
    """Host memory of each worker that NIXL reads and writes: as much as hand-offs under way hold."""
    chunk_bytes: Annotated[int, Meta(ge=4096, le=3 * 1024 * 1024)] = 1024 * 1024
    timeout_s: PositiveSeconds = 30.0


class CatalogueConfig(Section, frozen=True, kw_only=True):
    folder: str | None = None
    """Where routers keep compiled catalogues. None: in the cluster's own folder, gone with the cluster."""
    max_items: Annotated[int, Meta(ge=1, le=5_000_000)] = 5_000_000
    """Of one catalogue."""
    max_upload_bytes: Positive = 2 * 1024 * 1024 * 1024
    max_catalogues: Positive = 1000
    """Of all API keys together."""
    max_open: Positive = 16
    """A worker keeps this many catalogues open, for targeting and as phrases together, and as many filtered
    choices of them. One more, and the tenant that has the most loses the one it used longest ago."""
    fetch_host: str | None = None
    """What workers on other machines call a router by. None: the host it listens on, this machine's own where
    that is all interfaces."""


class HeadraceConfig(Section, frozen=True, kw_only=True):
    model: ModelConfig = ModelConfig()
    router: RouterConfig = RouterConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    placement: PlacementConfig = PlacementConfig()
    transfer: TransferConfig = TransferConfig()
    catalogue: CatalogueConfig = CatalogueConfig()


def _check_keys(data: dict[str, Any], section: type[Section], path: str) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(section)}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise ConfigError(
                f"unknown key `{path}{key}`: did you mean `{path}{near[0]}`? "
                f"Valid here: {', '.join(sorted(fields))}"
            )
        kind = fields[key].type
        if isinstance(kind, type) and issubclass(kind, Section):
            if not isinstance(value, dict):
                raise ConfigError(f"`{path}{key}` is a section, write it as [{path}{key}]")
            _check_keys(value, kind, f"{path}{key}.")


def config_from_mapping(data: dict[str, Any]) -> HeadraceConfig:
    """Raises ConfigError; handled by the command line."""
    _check_keys(data, HeadraceConfig, "")
    try:
        return msgspec.convert(data, HeadraceConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("$.", "")) from None


def load_config(path: Path | None) -> HeadraceConfig:
    """Raises ConfigError; handled by the command line."""
    if path is None:
        return HeadraceConfig()
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return config_from_mapping(data)
