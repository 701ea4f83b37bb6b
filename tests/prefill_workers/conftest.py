from collections.abc import Callable, Iterator

import msgspec
import pytest

from megakernel.build import BuildError, find_compiler
from megakernel.codegen_limits import KvFormat
from megakernel.runtime import Runtime
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import TinyWeights, tiny_weights

RECIPE = Recipe(workers=2, k_tiles={"down": 3, "o": 2}, tile_columns={"gate_up": 64})
BUCKETS = (1, 8, 64, 256)
OpenRuntime = Callable[..., Runtime]
"""Of (weights, num_blocks, block_size_tokens, kv_format); closed when the tests are over."""


@pytest.fixture(scope="session")
def open_runtime(tmp_path_factory) -> Iterator[OpenRuntime]:
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    folder, opened = tmp_path_factory.mktemp("libraries"), list[Runtime]()

    def open_one(
        weights: TinyWeights, num_blocks: int, block_size_tokens: int, kv_format: KvFormat = "float32"
    ) -> Runtime:
        programs = [
            build_program(weights.shape, msgspec.structs.replace(RECIPE, bucket=rows)) for rows in BUCKETS
        ]
        opened.append(
            Runtime.of(
                programs,
                weights,
                num_blocks,
                block_size_tokens,
                kv_format=kv_format,
                library_folder=folder,
                extra_flags=("-O1",),
            )
        )
        return opened[-1]

    yield open_one
    for runtime in opened:
        runtime.close()


@pytest.fixture(scope="session")
def tiny_runtime(open_runtime: OpenRuntime) -> Runtime:
    return open_runtime(tiny_weights(1), 32, 16)
