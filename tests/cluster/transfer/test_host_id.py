import subprocess
import sys
from pathlib import Path

import pytest

from cluster.transfer import host_id as module
from cluster.transfer.host_id import host_id, host_id_of


def test_another_process_of_this_host_has_the_same_id() -> None:
    code = "from cluster.transfer.host_id import host_id; print(host_id())"
    other = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=30)
    assert other.strip() == host_id()


def test_every_fact_counts() -> None:
    ids = {
        host_id_of("boot-a", 1, "host-a"),
        host_id_of("boot-b", 1, "host-a"),
        host_id_of("boot-a", 2, "host-a"),
        host_id_of("boot-a", 1, "host-b"),
    }
    assert len(ids) == 4


def test_where_the_kernel_tells_nothing_no_two_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BOOT_ID", tmp_path / "absent")
    assert host_id.__wrapped__() != host_id.__wrapped__()
