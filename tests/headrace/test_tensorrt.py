import sys

from headrace.tensorrt import tensorrt_obstacle
from tests.tensorrt import DOUBLE


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(DOUBLE)])
    monkeypatch.delitem(sys.modules, "tensorrt_llm", raising=False)
    assert "not installed" in tensorrt_obstacle(str(tmp_path)).reason
    monkeypatch.syspath_prepend(str(DOUBLE))
    assert tensorrt_obstacle(str(tmp_path)) is None
    assert "smollm2-135m-instruct" in tensorrt_obstacle("smollm2-135m-instruct").reason
