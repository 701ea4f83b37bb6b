from collections.abc import Iterator

import pytest

from tests.cluster.transfer.loopback import memfds


@pytest.fixture(autouse=True)
def no_memory_file_left() -> Iterator[None]:
    yield
    assert memfds() == []
