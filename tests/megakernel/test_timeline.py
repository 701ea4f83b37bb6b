"""Timelines: what workers did adds up, the trace is one that viewers take, the picture shows every worker."""

import json
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.bubbles import Cause, bubble_totals, bubbles, idle_times, idle_us, shown_bubble, shown_totals
from megakernel.chrome_trace import chrome_trace
from megakernel.cost import simulate
from megakernel.machine import load_machine
from megakernel.pipeline import compile_program
from megakernel.program import Program
from megakernel.shapes import SHAPES
from megakernel.timeline import (
    Timeline,
    Times,
    busy_us,
    bytes_read,
    measured_timeline,
    predicted_timeline,
    role_totals,
    timeline_of,
)
from megakernel.timeline_panel import tick_step_us
from megakernel.timeline_svg import lane_height_for, layer_window, schedule_svg, timeline_svg
from tests.megakernel.compiler_cases import cpu_machine, small_shape

SVG = "{http://www.w3.org/2000/svg}"


def compiled(workers: int = 2, **changes: object) -> tuple[Program, object]:
    machine = cpu_machine(workers)
    return compile_program(small_shape(num_layers=3, **changes), "f", machine, 2), machine


def random_timeline(program: Program, numbers: list[float]) -> Timeline:
    """Waits and work of any lengths, zero among them."""
    lanes, at = [], 0
    for worker in program.workers:
        now, lane = numbers[at % len(numbers)], []
        for _ in worker:
            steps = [numbers[(at + k) % len(numbers)] for k in range(4)]
            at += 4
            reached = now + steps[0]
            ready = reached + steps[1]
            started = ready + steps[2]
            now = started + steps[3]
            lane.append(Times(reached, ready, started, now))
        lanes.append(lane)
    return timeline_of(program, lanes, lambda _: 1000.0)


PROGRAM, MACHINE = compiled(3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 50), min_size=5, max_size=40))
def test_busy_and_idle_times_are_all_of_every_worker_s_time(numbers):
    timeline = random_timeline(PROGRAM, numbers)
    idle = idle_us(timeline)
    assert busy_us(timeline) + sum(idle.values()) == pytest.approx(timeline.total_us, abs=1e-6)
    assert sum(totals.busy_us for totals in role_totals(timeline)) == pytest.approx(busy_us(timeline))
    for worker in range(3):
        mine = [found for found in idle_times(timeline) if found.worker == worker]
        assert all(a.end_us <= b.start_us + 1e-9 for a, b in pairwise(mine))
    found = bubbles(timeline)
    assert [bubble.us for bubble in found] == sorted((bubble.us for bubble in found), reverse=True)
    assert sum(group.us for group in bubble_totals(timeline)) == pytest.approx(
        sum(us for cause, us in idle.items() if cause is not Cause.LOAD)
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 50), min_size=5, max_size=40))
def test_a_chrome_trace_has_no_overlap_in_a_lane_and_every_instruction(numbers):
    timeline = random_timeline(PROGRAM, numbers)
    events = json.loads(chrome_trace(timeline, "a title"))["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    lanes = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            lanes[event["tid"]].append(event)
    assert set(lanes) == {0, 1, 2}
    for worker, lane in lanes.items():
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(lane))
        done = [event for event in lane if event["cat"] != "waiting"]
        assert len(done) == len(PROGRAM.workers[worker])
        assert sum(event["dur"] for event in lane) <= timeline.makespan_us + 1e-6
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {"worker 0", "worker 1", "worker 2"}
    busy = [event["args"]["workers"] for event in events if event["name"] == "busy workers"]
    assert all(0 <= workers <= 3 for workers in busy)
    assert busy[-1] == 0


def test_a_trace_s_slices_say_what_their_instruction_is():
    timeline = predicted_timeline(PROGRAM, MACHINE)
    events = json.loads(chrome_trace(timeline, "t"))["traceEvents"]
    down = next(event for event in events if event["name"] == "layers.1.down")
    assert down["cat"] == "down"
    assert down["args"]["opcode"] == "LINEAR"
    assert down["args"]["columns"][0] == 0
    assert down["args"]["K"] == [0, 96]
    assert down["args"]["bytes"] > 0
    assert down["args"]["GB/s"] > 0
    waiting = next(event for event in events if event["name"] == "waiting")
    assert " reaches " in waiting["args"]["counters"][0]


def test_a_prediction_s_timeline_is_the_simulation():
    trace = simulate(PROGRAM, MACHINE)
    timeline = predicted_timeline(PROGRAM, MACHINE)
    assert timeline.makespan_us == trace.makespan_us
    idle = idle_us(timeline)
    assert idle[Cause.BARRIER] == pytest.approx(trace.stalls.barrier_us)
    assert idle[Cause.END] == pytest.approx(trace.stalls.idle_us)
    assert idle[Cause.GAP] == idle[Cause.BEGIN] == 0


def test_on_a_gpu_waits_for_weights_are_told_from_bubbles():
    machine = msgspec.structs.replace(load_machine("l20"), num_workers=5)
    program = compile_program(small_shape(num_layers=2), "f", machine, 1)
    trace = simulate(program, machine)
    timeline = predicted_timeline(program, machine)
    assert idle_us(timeline)[Cause.LOAD] == pytest.approx(trace.stalls.load_us)
    assert busy_us(timeline) == pytest.approx(trace.stalls.busy_us)
    assert Cause.LOAD not in {bubble.cause for bubble in bubbles(timeline)}


def test_stamps_begin_at_the_first_worker_s_first_instruction():
    program, machine = compiled(2)
    lanes = []
    for worker, sequence in enumerate(program.workers):
        start = 5_000_000 + 2_000 * worker
        lanes.append([(at, at + 100, at + 250) for at in range(start, start + 300 * len(sequence), 300)])
    timeline = measured_timeline(program, lanes, bytes_read(program, machine))
    first = timeline.lanes[1][0]
    assert (first.reached_us, first.started_us, first.ended_us) == pytest.approx((2.0, 2.1, 2.25))
    begin = next(bubble for bubble in bubbles(timeline) if bubble.cause is Cause.BEGIN)
    assert (begin.worker, begin.us) == (1, 2.0)
    assert shown_bubble(begin).startswith("worker 1 has not begun, 2.0 us before embed [")
    group = next(group for group in bubble_totals(timeline) if group.cause is Cause.BEGIN)
    assert shown_totals(group, timeline).startswith("1 late beginnings before embed, 2.0 us in all")


def lanes_of(svg: str) -> list[set[str]]:
    """The workers of each panel, in order."""
    root = ElementTree.fromstring(svg)
    panels: list[set[str]] = []
    for element in root.iter(f"{SVG}rect"):
        worker = element.get("data-worker")
        if worker is not None:
            if worker == "0":
                panels.append(set())
            panels[-1].add(worker)
    return panels


@pytest.mark.parametrize("workers", [1, 2, 9, 92])
def test_a_picture_has_a_lane_for_every_worker_and_its_bubbles(workers):
    program, machine = compiled(workers)
    svg = schedule_svg(program, machine)
    every = {str(worker) for worker in range(workers)}
    assert lanes_of(svg) == [every, every]
    root = ElementTree.fromstring(svg)
    classes = {element.get("class") for element in root.iter()}
    assert {"role-qkv", "role-head", "idle lane"} <= classes
    text = "".join(root.itertext())
    assert "Predicted step of 2 rows at 512 tokens of context on some-cpu" in text
    assert "in bubbles" in text
    if workers > 1:
        assert "waiting" in classes
        assert "waits for other workers" in text
    assert "prefers-color-scheme:dark" in svg


def test_a_picture_stays_within_its_height_whatever_the_workers():
    assert [lane_height_for(workers) for workers in (1, 2, 16, 92, 132)] == [
        26.0,
        26.0,
        26.0,
        pytest.approx(480 / 92),
        pytest.approx(480 / 132),
    ]


def test_the_magnified_layer_is_the_one_in_the_middle():
    timeline = predicted_timeline(PROGRAM, MACHINE)
    layer, start_us, end_us = layer_window(timeline)
    assert layer == 1
    assert 0 < start_us < end_us < timeline.makespan_us


def test_a_title_is_escaped():
    ElementTree.fromstring(timeline_svg(predicted_timeline(PROGRAM, MACHINE), "<a> & b"))


@given(st.floats(0.01, 1e6))
def test_there_are_some_ticks_but_not_many(span_us):
    ticks = span_us / tick_step_us(span_us)
    assert 4 <= ticks <= 12 + 1e-9


@pytest.mark.slow
def test_a_whole_model_on_a_whole_gpu_is_drawn():
    machine = load_machine("l20")
    svg = schedule_svg(compile_program(SHAPES["smollm2-135m"], "f", machine, 1), machine)
    assert len(svg) < 8_000_000
    assert [len(panel) for panel in lanes_of(svg)] == [92, 92]
