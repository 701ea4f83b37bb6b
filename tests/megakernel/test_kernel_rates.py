"""Rates of the CPU's kernels: the measuring program, what it prints, and the table in its place."""

from pathlib import Path

import pytest

from megakernel.build import BuildError, find_compiler
from megakernel.kernel_rates import RatesError, measured_rates, rates_of, usual_rates

FORMATS = ("Q4_0", "Q4_1", "Q8_0", "BF16", "F16", "F32")
PRINTED = {"attention": 45678.9, "prepared": 2789.1} | {
    name: figure
    for format, many, one in zip(
        FORMATS, (6e5, 5e5, 4e5, 3e5, 2e5, 1e5), (3e5, 3e5, 1e5, 1e5, 1e5, 1e5), strict=True
    )
    for name, figure in ((format, many), (f"{format}/one", one))
}


def text_of(figures: dict[str, float]) -> str:
    return "".join(f"{name} {figure:.1f}\n" for name, figure in figures.items())


def test_what_the_program_prints_is_read():
    rates = rates_of(text_of(PRINTED))
    assert rates.macs_per_us == {name: PRINTED[name] for name in FORMATS}
    assert (rates.attention_macs_per_us, rates.prepared_per_us) == (45700.0, 2790.0)
    assert rates.row_group == 2  # the median of 2, 1.67, 4, 3, 2 and 1


@pytest.mark.parametrize("fast", [0.1, 100.0])
def test_a_row_group_is_one_that_kernels_have(fast):
    figures = PRINTED | {f"{name}/one": PRINTED[name] / fast for name in FORMATS}
    assert rates_of(text_of(figures)).row_group == (1 if fast < 1 else 8)


@pytest.mark.parametrize(
    "text", ["", "Q4_0\n", text_of(PRINTED | {"attention": 0.0}), text_of(PRINTED)[:-20], "a b c"]
)
def test_anything_else_is_refused(text):
    with pytest.raises((ValueError, KeyError)):
        rates_of(text)


@pytest.mark.parametrize(
    ("units", "quicker_than"),
    [
        (("avx2", "avx512", "avx512_vnni"), ("avx2", "avx512")),
        (("avx2", "avx512"), ("avx2",)),
        (("avx2",), ()),
    ],
)
def test_the_table_knows_every_format_and_that_more_units_are_quicker(units, quicker_than):
    rates, fewer = usual_rates(units), usual_rates(quicker_than)
    assert tuple(rates.macs_per_us) == FORMATS
    assert all(rate >= fewer.macs_per_us[name] for name, rate in rates.macs_per_us.items())
    assert rates.attention_macs_per_us >= fewer.attention_macs_per_us


def test_the_kernels_here_run_at_rates_of_this_world():
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    rates = measured_rates()
    assert tuple(rates.macs_per_us) == FORMATS
    assert all(50 < rate < 1e7 for rate in (*rates.macs_per_us.values(), rates.attention_macs_per_us))
    assert 10 < rates.prepared_per_us < 1e6
    assert 1 <= rates.row_group <= 8


def test_a_compiler_that_fails_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = tmp_path / "c++"
    bad.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo bad 1.0 && exit 0\necho this one is broken >&2\nexit 1\n"
    )
    bad.chmod(0o755)
    monkeypatch.setenv("CXX", str(bad))
    with pytest.raises(RatesError, match="this one is broken"):
        measured_rates()


@pytest.mark.parametrize("program", ["false", "echo Q4_0 nonsense", "sleep 5"])
def test_a_program_that_fails_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
):
    """A compiler whose programs do so."""
    (tmp_path / "program").write_text(f"#!/bin/sh\nexec {program}\n")
    (tmp_path / "program").chmod(0o755)
    fake = tmp_path / "c++"
    fake.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo fake 1.0 && exit 0\nfor last; do :; done\n"
        f"cp -p {tmp_path / 'program'} $last\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setattr("megakernel.kernel_rates._RUN_S", 0.5)
    with pytest.raises(RatesError):
        measured_rates()
