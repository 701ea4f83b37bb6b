import msgspec
import pytest

from megakernel.cuda_limits import RESERVED_BYTES
from megakernel.machine import Machine, MachineError, load_machine, machine_names
from megakernel.probe import Measured, describe, l2_bytes, probe_cpu, usable_cores, vector_units
from megakernel.weight_formats import WEIGHT_BITS

MEASURED = Measured(worker_bandwidth_gb_s=9.0, bandwidth_gb_s=14.0, sync_us=0.2)


def test_every_packaged_machine_loads_under_its_own_name():
    packaged = [name for name in machine_names() if name != "cpu"]
    assert packaged == ["h100", "l20", "l4", "rtx4090"]
    for name in packaged:
        machine = load_machine(name)
        assert machine.name == name
        assert machine.kind == "cuda"
        assert machine.macs_per_us.keys() == WEIGHT_BITS.keys()
        assert machine.reserved_bytes == RESERVED_BYTES


@pytest.mark.parametrize(("name", "workers", "scratch"), [("l20", 92, 101376), ("h100", 132, 232448)])
def test_capacity_of_a_block_is_the_architecture_s(name, workers, scratch):
    machine = load_machine(name)
    assert (machine.num_workers, machine.scratch_bytes) == (workers, scratch)
    assert machine.num_pages == (scratch - 17_408) // machine.page_bytes


def test_pages_are_what_kernels_leave_of_the_scratch_memory():
    machine = msgspec.structs.replace(
        load_machine("l4"), scratch_bytes=10_000, page_bytes=1_000, reserved_bytes=0
    )
    assert machine.num_pages == 10
    assert msgspec.structs.replace(machine, reserved_bytes=1).num_pages == 9
    assert msgspec.structs.replace(machine, reserved_bytes=9_000).num_pages == 1
    with pytest.raises(MachineError, match=r"a page of 1000 bytes exceeds .* 10000 less 9001 reserved"):
        msgspec.structs.replace(machine, reserved_bytes=9_001)


def test_an_unknown_name_is_answered_with_all_known():
    with pytest.raises(MachineError, match=r"'l21'.*cpu, h100, l20, l4, rtx4090"):
        load_machine("l21")


def test_a_path_to_a_file_is_a_machine(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(load_machine("l4"), name="mine")))
    assert load_machine(str(path)).name == "mine"
    with pytest.raises(MachineError, match=r"absent\.json"):
        load_machine(str(tmp_path / "absent.json"))


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"name": "x"}', b"\xff\xfe"])
def test_a_broken_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text)
    with pytest.raises(MachineError, match=r"broken\.json"):
        load_machine(str(path))


def test_unknown_fields_of_a_file_are_refused(tmp_path):
    path = tmp_path / "typo.json"
    fields = msgspec.to_builtins(load_machine("l4")) | {"sync_ns": 3}
    path.write_bytes(msgspec.json.encode(fields))
    with pytest.raises(MachineError, match="sync_ns"):
        load_machine(str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"num_workers": 0},
        {"bandwidth_gb_s": -1.0},
        {"sync_us": -0.1},
        {"page_bytes": 1 << 30},
        {"reserved_bytes": -1},
        {"macs_per_us": {}},
    ],
)
def test_impossible_figures_are_refused(change):
    with pytest.raises(MachineError):
        Machine(**(msgspec.structs.asdict(load_machine("l4")) | change))


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ("fpu sse2", ()),
        ("avx2 fma f16c", ("avx2",)),
        ("avx512f avx512bw avx512vl avx512dq avx512_vnni", ()),
        ("avx2 fma f16c avx512f", ("avx2",)),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni", ("avx2", "avx512", "avx512_vnni")),
    ],
)
def test_vector_units_follow_from_the_flags(flags, units):
    assert vector_units(f"model name\t: x\nflags\t\t: {flags}\nflags\t\t: none\n") == units


def test_l2_is_shared_among_its_cores(tmp_path):
    index = tmp_path / "index2"
    index.mkdir()
    for name, text in {"level": "2\n", "size": "2048K\n", "shared_cpu_list": "0-2,7\n"}.items():
        (index / name).write_text(text)
    assert l2_bytes(tmp_path) == 512 * 1024
    assert l2_bytes(tmp_path / "absent") == 256 * 1024


def test_a_probed_machine_is_measured_once(tmp_path):
    calls: list[int] = []

    def measure(threads: int) -> Measured:
        calls.append(threads)
        return MEASURED

    first = probe_cpu(tmp_path, measure)
    assert probe_cpu(tmp_path, measure) == first
    assert calls == [usable_cores()]
    assert (first.kind, first.num_workers, first.sync_us) == ("cpu", usable_cores(), 0.2)


def test_a_broken_cache_is_measured_again(tmp_path):
    first = probe_cpu(tmp_path, lambda _: MEASURED)
    (cached,) = tmp_path.rglob("cpu-*.json")
    cached.write_text("{")
    assert probe_cpu(tmp_path, lambda _: MEASURED) == first


def test_all_workers_together_read_no_slower_than_one():
    noisy = Measured(worker_bandwidth_gb_s=20.0, bandwidth_gb_s=15.0, sync_us=0.2)
    machine = describe(("avx2",), 2, 1 << 20, noisy)
    assert machine.bandwidth_gb_s >= machine.worker_bandwidth_gb_s
    assert machine.scratch_bytes == 1 << 19
