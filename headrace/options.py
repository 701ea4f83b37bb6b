"""Options that several commands share, and the configuration that they and a file make."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cluster.config import ConfigError, HeadraceConfig, config_from_mapping, load_config
from headrace.terminal import EXIT_USAGE, fail

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file; the options below override it.", metavar="FILE")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Packaged model, .gguf file, Hugging Face folder, or hub id.")
]
HttpPortOption = Annotated[int | None, typer.Option("--http-port", help="0: any free port.")]
GrpcPortOption = Annotated[int | None, typer.Option("--grpc-port", help="0: any free port.")]
RedisOption = Annotated[
    str | None, typer.Option("--redis-url", help="A Redis of yours, in place of the embedded one.")
]


def configuration(path: Path | None, overrides: dict[tuple[str, str], Any]) -> HeadraceConfig:
    """The file's configuration with the given options over it; ends the command where either is bad."""
    try:
        sections: dict[str, dict[str, Any]] = msgspec.to_builtins(load_config(path))
        for (section, key), value in overrides.items():
            if value is not None:
                sections[section][key] = value
        config = config_from_mapping(sections)
    except ConfigError as error:
        fail(str(error), EXIT_USAGE)
    # The workers run in other folders.
    model = config.model
    source = Path(model.source).expanduser()
    if source.exists():
        model = msgspec.structs.replace(model, source=str(source.absolute()))
    if model.artifact is not None:
        model = msgspec.structs.replace(model, artifact=str(Path(model.artifact).expanduser().absolute()))
    return msgspec.structs.replace(config, model=model)
