from cluster.config import config_from_mapping
from headrace.run_folder import RunFolder
from headrace.state_report import StateReport


def test_progress_is_beside_the_phase_and_phases_are_timed(tmp_path):
    folder = RunFolder(tmp_path / "home")
    folder.create()
    report = StateReport(folder, config_from_mapping({"model": {"name": "m"}, "router": {"http_port": 1234}}))
    with report.phase("ray"):
        report.show_progress("compiling", 0.25)
        state = folder.state()
    assert (state.phase, state.model, state.http_port) == ("ray", "m", 1234)
    assert (state.progress.what, state.progress.fraction) == ("compiling", 0.25)
    report.show_progress("compiling", 0.26)  # too soon to be worth a write
    assert folder.state().progress.fraction == 0.25
    report.redis_url = "unix:///redis"
    report.write("deploy")
    state = folder.state()
    assert (state.phase, state.redis_url) == ("deploy", "unix:///redis")
    assert list(state.phase_seconds) == ["ray"]
    folder.remove()
