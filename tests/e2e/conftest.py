"""One cluster for all tests that can share one; `LocalCluster` for those that need their own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.text import Tokenizer
from headrace.served_model import served_model
from tests.e2e.local_cluster import MODEL, LocalCluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """The packaged model on one prefill and one decode worker, up for the whole session."""
    cluster = LocalCluster.at(tmp_path_factory.mktemp("cluster") / "home")
    cluster.up()
    yield cluster
    cluster.down()
    cluster.assert_nothing_left()


@pytest.fixture
def restarted_cluster(cluster: LocalCluster) -> Callable[[], LocalCluster]:
    """Ends the shared cluster and starts it anew, at the same addresses."""

    def restart() -> LocalCluster:
        cluster.down()
        cluster.up()
        return cluster

    return restart


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.of(served_model(MODEL))


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Not started; whatever the test leaves running is ended."""
    cluster = LocalCluster.at(tmp_path / "home")
    yield cluster
    cluster.down()
