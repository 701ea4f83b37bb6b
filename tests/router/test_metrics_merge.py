from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import DecodeMetrics, RouterMetrics, exposition
from router.metrics_merge import ExpositionMerger, with_labels

ONE = "# HELP a_total A\n# TYPE a_total counter\na_total 1.0\n"
TWO = '# HELP a_total A\n# TYPE a_total counter\na_total{x="}"} 2.0\n# HELP b B\n# TYPE b gauge\nb 3.0\n'


def test_each_family_is_announced_once_and_holds_every_workers_samples():
    merger = ExpositionMerger()
    merger.add(ONE, {"worker": "w1"})
    merger.add(TWO, {"worker": 'w"2\\'})
    text = merger.text()
    assert text.count("# TYPE a_total") == text.count("# HELP a_total") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert [(s.labels["worker"], s.value) for s in families["a"].samples] == [("w1", 1.0), ('w"2\\', 2.0)]
    assert families["a"].samples[1].labels["x"] == "}"


def test_real_expositions_merge_into_one_that_parses():
    merger = ExpositionMerger()
    router, decode = RouterMetrics(), DecodeMetrics()
    router.ttft.observe(0.01)
    decode.step_seconds.observe(0.01)
    decode.handoffs.labels("committed").inc()
    merger.add(exposition(router.registry))
    for worker in ("d1", "d2"):
        merger.add(exposition(decode.registry), {"worker": worker, "role": "decode"})
    families = {family.name: family for family in text_string_to_metric_families(merger.text())}
    workers = {s.labels.get("worker") for s in families["headrace_decode_step_seconds"].samples}
    assert workers == {"d1", "d2"}
    assert all("worker" not in s.labels for s in families["headrace_time_to_first_token_seconds"].samples)


def test_labels_go_in_front_of_what_is_there():
    assert with_labels("a 1", 'w="x"') == 'a{w="x"} 1'
    assert with_labels("a{} 1", 'w="x"') == 'a{w="x"} 1'
    assert with_labels('a{b="c d"} 1', 'w="x"') == 'a{w="x",b="c d"} 1'
    assert with_labels("a 1", "") == "a 1"


def test_nothing_merges_to_nothing():
    assert ExpositionMerger().text() == ""
