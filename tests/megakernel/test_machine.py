import msgspec
import pytest

from megakernel.cuda_limits import RESERVED_BYTES
from megakernel.kernel_rates import RatesError, usual_rates
from megakernel.machine import Machine, MachineError, load_machine, machine_names
from megakernel.probe import Measured, describe, l2_bytes, probe_cpu, usable_cores, vector_units
from megakernel.weight_formats import WEIGHT_BITS

MEASURED = Measured(worker_bandwidth_gb_s=9.0, bandwidth_gb_s=14.0, sync_us=0.2)
RATES = usual_rates(("avx2",))


def test_every_packaged_machine_loads_under_its_own_name():
    packaged = [name for name in machine_names() if name != "cpu"]
    assert packaged == ["h100", "h100-ada", "h200", "l20", "l4", "rtx4090"]
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
    with pytest.raises(MachineError, match=r"'l21'.*cpu, h100, h100-ada, h200, l20, l4, rtx4090"):
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
        {"attention_macs_per_us": 0.0},
        {"prepared_per_us": -1.0},
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
    calls: list[object] = []

    def measure(threads: int) -> Measured:
        calls.append(threads)
        return MEASURED

    def measure_kernels():
        calls.append("kernels")
        return RATES

    first = probe_cpu(tmp_path, measure, measure_kernels)
    assert probe_cpu(tmp_path, measure, measure_kernels) == first
    assert calls == ["kernels", usable_cores()]
    assert (first.kind, first.num_workers, first.sync_us) == ("cpu", usable_cores(), 0.2)
    assert first.macs_per_us == RATES.macs_per_us
    assert first.attention_macs_per_us == RATES.attention_macs_per_us
    assert (first.prepared_per_us, first.row_group) == (RATES.prepared_per_us, RATES.row_group)


def test_a_broken_cache_is_measured_again(tmp_path):
    first = probe_cpu(tmp_path, lambda _: MEASURED, lambda: RATES)
    (cached,) = tmp_path.rglob("cpu-*.json")
    cached.write_text("{")
    assert probe_cpu(tmp_path, lambda _: MEASURED, lambda: RATES) == first


def test_kernels_that_cannot_be_measured_have_rates_from_a_table_and_that_is_said(tmp_path, capsys):
    def fail():
        raise RatesError("for this test")

    machine = probe_cpu(tmp_path, lambda _: MEASURED, fail)
    usual = usual_rates(machine.vector_units)
    assert machine.macs_per_us == usual.macs_per_us
    assert machine.attention_macs_per_us == usual.attention_macs_per_us
    (cached,) = tmp_path.rglob("cpu-*.json")
    said = capsys.readouterr().err
    assert "rates are from a table" in said
    assert f"remove {cached}. for this test" in said
    assert probe_cpu(tmp_path, lambda _: MEASURED, lambda: RATES) == machine
    assert not capsys.readouterr().err


def test_kernels_are_measured_once_there_is_a_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        first = probe_cpu(tmp_path, lambda _: MEASURED, lambda: RATES)
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho one\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    other = msgspec.structs.replace(RATES, prepared_per_us=7.0)
    assert probe_cpu(tmp_path, lambda _: MEASURED, lambda: other).prepared_per_us == 7.0
    assert first.prepared_per_us == RATES.prepared_per_us


def test_all_workers_together_read_no_slower_than_one():
    noisy = Measured(worker_bandwidth_gb_s=20.0, bandwidth_gb_s=15.0, sync_us=0.2)
    machine = describe(("avx2",), 2, 1 << 20, noisy, RATES)
    assert machine.bandwidth_gb_s >= machine.worker_bandwidth_gb_s
    assert machine.scratch_bytes == 1 << 19
