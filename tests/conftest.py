"""One cache folder for all tests: what a session compiles is shared by its clusters, and gone after it. And
figures that tests report, printed at the session's end."""

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

_FIGURE = "figure"


@pytest.fixture
def record_figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A line for the session's end."""
    return lambda figure: request.node.user_properties.append((_FIGURE, figure))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Of all test processes: a test's properties come with its report."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    properties = {each for report in reports for each in getattr(report, "user_properties", ())}
    if figures := [str(value) for name, value in properties if name == _FIGURE]:
        terminalreporter.section("figures")
        for figure in sorted(figures):
            terminalreporter.write_line(figure)


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
