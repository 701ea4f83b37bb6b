"""What is pinned of TensorRT-LLM, against its double and against our own calls."""

import ast
import inspect
from pathlib import Path

import pytest

from prefill_workers import check_trtllm
from prefill_workers.export_pieces import ScheduledRequest
from prefill_workers.trtllm_pins import Called, Implemented, Pins, differences, find, load_pins
from tests.tensorrt import hide, use_double

use_double()

from prefill_workers import trtllm_connector, trtllm_engine  # noqa: E402 - they import it

PINS = load_pins()
CONNECTOR = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"
OBJECTS = {
    "self._llm": "tensorrt_llm:LLM",
    "self._output": "tensorrt_llm.llmapi:RequestOutput",
    "output": "tensorrt_llm.llmapi:RequestOutput",
    "llm_args": "tensorrt_llm.llmapi:TorchLlmArgs",
    "request": "tensorrt_llm.bindings.internal.batch_manager:LlmRequest",
    "request.sampling_config": "tensorrt_llm.bindings:SamplingConfig",
    "scheduler_output": f"{CONNECTOR}:SchedulerOutput",
}
"""What is TensorRT-LLM's in our two modules, as it is written there."""


def test_the_double_is_as_pinned() -> None:
    assert list(differences(PINS)) == []


def without(*names):
    def changed(found, monkeypatch):
        signature = inspect.signature(found)
        kept = [one for name, one in signature.parameters.items() if name not in names]
        monkeypatch.setattr(found, "__signature__", signature.replace(parameters=kept), raising=False)

    return changed


def with_one_more(found, monkeypatch):
    signature = inspect.signature(found)
    more = inspect.Parameter("more", inspect.Parameter.KEYWORD_ONLY)
    changed = signature.replace(parameters=[*signature.parameters.values(), more])
    monkeypatch.setattr(found, "__signature__", changed, raising=False)


def abstract_one_more(found, monkeypatch):
    monkeypatch.setattr(found, "__abstractmethods__", found.__abstractmethods__ | {"flush"})


def no_fields(found, monkeypatch):
    monkeypatch.setattr(found, "__dataclass_fields__", {}, raising=False)
    for name in list(vars(found)):
        if not name.startswith("_"):
            monkeypatch.delattr(found, name)


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (
            "tensorrt_llm:LLM.generate_async",
            without("cache_salt"),
            "tensorrt_llm:LLM.generate_async: parameter cache_salt: expected optional, found none",
        ),
        (
            "tensorrt_llm:SamplingParams",
            without("seed"),
            "tensorrt_llm:SamplingParams: parameter seed: expected optional keyword, found none",
        ),
        (
            "tensorrt_llm._utils:mpi_rank",
            with_one_more,
            "tensorrt_llm._utils:mpi_rank: parameter more: expected none, found required keyword",
        ),
        (
            "tensorrt_llm.llmapi:TorchLlmArgs",
            no_fields,
            "tensorrt_llm:LLM: keyword env_overrides: expected as a field of "
            "tensorrt_llm.llmapi:TorchLlmArgs, found none",
        ),
        (
            f"{CONNECTOR}:KvCacheConnectorWorker",
            abstract_one_more,
            f"{CONNECTOR}:KvCacheConnectorWorker: flush: expected none, found an abstract method",
        ),
        (
            f"{CONNECTOR}:KvCacheConnectorScheduler.request_finished",
            without("cache_block_ids"),
            f"{CONNECTOR}:KvCacheConnectorScheduler: request_finished: expected parameters "
            "['request', 'cache_block_ids'], found ['request']",
        ),
        (
            f"{CONNECTOR}:RequestData",
            no_fields,
            f"{CONNECTOR}:RequestData: attribute computed_position: expected, found none",
        ),
        (
            "tensorrt_llm.bindings.internal.batch_manager:LlmRequest",
            no_fields,
            "tensorrt_llm.bindings.internal.batch_manager:LlmRequest: attribute sampling_config: "
            "expected, found none",
        ),
    ],
)
def test_a_difference_is_named(name, change, line, monkeypatch, capsys) -> None:
    change(find(PINS, name), monkeypatch)
    assert line in list(differences(PINS))
    assert check_trtllm.main() == 1
    assert line in capsys.readouterr().out.splitlines()


def test_what_is_not_there_is_named(monkeypatch) -> None:
    monkeypatch.delattr("tensorrt_llm._utils.mpi_disabled")
    (line,) = differences(PINS)
    assert line.startswith("tensorrt_llm._utils:mpi_disabled: expected to be there")


def test_as_pinned_is_well(capsys) -> None:
    assert check_trtllm.main() == 0
    assert "1.2.1: all that is used is as expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "is not installed: use NVIDIA's container of 1.2.1"),
        ("1.2.0", "1.2.0 must not be used: it is older than the mend of corrupted KV"),
        ("9.0.0", "9.0.0 is not known, 1.2.1 is. Install that"),
    ],
)
def test_a_version_that_will_not_do_is_said_with_the_fix(version, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check_trtllm, "installed_version", lambda: version)
    assert check_trtllm.main() == 2
    assert message in capsys.readouterr().err


def test_none_is_found_where_none_is(monkeypatch) -> None:
    hide(monkeypatch)
    assert check_trtllm.installed_version() is None


@pytest.mark.parametrize("module", [trtllm_engine, trtllm_connector])
def test_our_modules_use_only_what_is_pinned(module) -> None:
    assert unpinned(Path(module.__file__).read_text(encoding="utf-8"), PINS) == []


def test_what_is_read_of_a_scheduled_request_is_pinned() -> None:
    assert ScheduledRequest.__annotations__.keys() == set(PINS.read[f"{CONNECTOR}:RequestData"])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import tensorrt_llm", ["line 1: import tensorrt_llm"]),
        ("from tensorrt_llm import SamplingParams, Mapping", ["line 1: tensorrt_llm:Mapping"]),
        (
            "from tensorrt_llm import SamplingParams\nSamplingParams(max_tokens=1, top_k=2)",
            ["line 2: tensorrt_llm:SamplingParams: top_k"],
        ),
        (
            "from tensorrt_llm import LLM as Engine\nEngine(model='', pipeline_parallel_size=2)",
            ["line 2: tensorrt_llm:LLM: pipeline_parallel_size"],
        ),
        ("self._llm.generate([1])", ["line 1: tensorrt_llm:LLM.generate"]),
        (
            "self._llm.generate_async([1], sampling)",
            ["line 1: tensorrt_llm:LLM.generate_async: 2 arguments without a keyword"],
        ),
        ("request.llm_request_type", [f"line 1: {OBJECTS['request']}.llm_request_type"]),
        (
            f"from {CONNECTOR} import KvCacheConnectorWorker as Base\n"
            "class Worker(Base):\n"
            "    def save_kv_layer(self, layer, stream): ...",
            [f"line 2: {CONNECTOR}:KvCacheConnectorWorker: save_kv_layer(layer, stream)"],
        ),
    ],
)
def test_what_is_not_pinned_is_seen(source, found) -> None:
    assert set(found) <= set(unpinned(source, PINS))


def unpinned(source: str, pins: Pins) -> list[str]:
    """Whatever of TensorRT-LLM a module uses that is not pinned."""
    tree = ast.parse(source)
    names, lines = dict[str, str](), list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any("tensorrt_llm" in alias.name for alias in node.names):
            lines.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorrt_llm"):
            before = {old: new for new, old in pins.moved.items()}
            for alias in node.names:
                name = f"{before.get(node.module, node.module)}:{alias.name}"
                names[alias.asname or alias.name] = name
                if name not in pins.called | pins.implemented | pins.read:
                    lines.append(f"line {node.lineno}: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (owner := OBJECTS.get(ast.unparse(node.value))):
            is_pinned = f"{owner}.{node.attr}" in pins.called or node.attr in pins.read.get(owner, ())
            lines += [] if is_pinned else [f"line {node.lineno}: {owner}.{node.attr}"]
        if isinstance(node, ast.Call) and (called := called_name(node, names)) in pins.called:
            lines += [f"line {node.lineno}: {called}: {what}" for what in wrong(node, pins.called[called])]
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                name = names.get(ast.unparse(base), "")
                if name in pins.implemented:
                    lines += [
                        f"line {node.lineno}: {name}: {what}"
                        for what in badly_implemented(node, pins.implemented[name])
                    ]
    return lines


def called_name(call: ast.Call, names: dict[str, str]) -> str | None:
    if isinstance(call.func, ast.Attribute):
        return f"{OBJECTS.get(ast.unparse(call.func.value))}.{call.func.attr}"
    return names.get(ast.unparse(call.func))


def wrong(call: ast.Call, called: Called) -> list[str]:
    allowed = called.parameters.keys() | set(called.further.fields if called.further else ())
    by_place = [name for name, presence in called.parameters.items() if presence == "required"]
    found = [str(keyword.arg) for keyword in call.keywords if keyword.arg not in allowed]
    if len(call.args) > len(by_place):
        found.append(f"{len(call.args)} arguments without a keyword")
    return found


def badly_implemented(node: ast.ClassDef, pinned: Implemented) -> list[str]:
    own = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
    found = []
    for name, parameters in {**pinned.abstract, **pinned.inherited}.items():
        if name in own:
            there = [argument.arg for argument in own[name].args.args[1:]]
            if there != parameters:
                found.append(f"{name}({', '.join(there)})")
        elif name in pinned.abstract:
            found.append(f"{name} is missing")
    for child in ast.walk(node):
        if isinstance(child, ast.Call) and ast.unparse(child.func).startswith("self."):
            name = ast.unparse(child.func).removeprefix("self.")
            if "." not in name and name not in own and name not in pinned.inherited:
                found.append(f"{name} is not inherited")
    return found
