"""Traces: which spans an input becomes, how they hang together, and which calls are traced."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from aeolian.control.metrics import FunctionName
from aeolian.control.traces import ContainerStart, Traces, span_id_of, spans_of
from aeolian.domain.containers import HookTiming
from aeolian.domain.telemetry import FinishedInput

NAME = FunctionName("shop", "price")
DONE = FinishedInput("ap-1", "fu-1", "fc-1", 0, "ta-1", "success", 0, "", "fc-1", 100.0, 100.5, 102.5, 102.6)
START = ContainerStart(100.01, 100.45, (HookTiming("image", 0.1), HookTiming("user code", 0.3)))


def by_name(spans) -> dict:
    return {span.name: span for span in spans}


def test_a_call_is_told_from_its_request_to_its_stored_output():
    spans = by_name(spans_of(DONE, None, NAME))
    root = spans["call shop.price"]
    assert (root.began_at, root.ended_at, root.parent_id, root.error) == (100.0, 102.6, 0, "")
    assert [(n, s.began_at, s.ended_at) for n, s in spans.items() if n != root.name] == [
        ("queued", 100.0, 100.5),
        ("run", 100.5, 102.5),
        ("store output", 102.5, 102.6),
    ]
    assert all(span.parent_id == root.span_id for span in spans.values() if span is not root)
    assert len({span.trace_id for span in spans.values()}) == 1


def test_the_start_of_a_container_is_told_to_whom_it_kept_waiting():
    spans = by_name(spans_of(DONE, START, NAME))
    start = spans["container start"]
    assert (start.began_at, start.ended_at) == (100.01, 100.45)
    assert spans["image"].parent_id == spans["user code"].parent_id == start.span_id
    assert round(spans["image"].began_at, 6) == 100.05
    assert round(spans["user code"].ended_at, 6) == 100.45
    before = START._replace(began_at=98.0, ended_at=99.0)
    assert "container start" not in by_name(spans_of(DONE, before, NAME))


def test_what_an_input_calls_hangs_below_it_in_the_same_trace():
    parent = spans_of(DONE, None, NAME)[0]
    child = spans_of(DONE._replace(call_id="fc-2", parent_input_id="in-1:0"), None, NAME)[0]
    assert child.trace_id == parent.trace_id
    assert child.parent_id == parent.span_id == span_id_of("in-1:0")


def test_an_input_that_fails_says_how():
    spans = by_name(spans_of(DONE._replace(status="timeout"), None, NAME))
    assert spans["call shop.price"].error == spans["run"].error == "timeout"
    assert spans["queued"].error == ""


def test_an_input_that_never_ran_was_only_called():
    spans = spans_of(DONE._replace(status="terminated", started_at=0.0), None, NAME)
    assert [span.name for span in spans] == ["call shop.price"]


@given(st.lists(st.floats(0, 1e9), min_size=4, max_size=4))
def test_no_span_ends_before_it_begins(times):
    created_at, started_at, finished_at, stored_at = times
    done = DONE._replace(created_at=created_at, started_at=started_at, finished_at=finished_at, stored_at=stored_at)
    spans = spans_of(done, None, NAME)
    assert all(span.began_at <= span.ended_at for span in spans[1:])
    assert len({span.span_id for span in spans}) == len(spans)


def test_the_first_input_of_a_container_alone_shows_its_start():
    exported: list = []
    traces = Traces(SimpleNamespace(export=exported.extend), lambda app_id, function_id: NAME)
    traces.container_started(SimpleNamespace(task_id="ta-1", enqueued_at=100.01, started_at=100.45, hooks=START.hooks))
    traces.input_finished(DONE)
    traces.input_finished(DONE._replace(idx=1))
    assert [span.name for span in exported].count("container start") == 1


def test_a_share_of_the_calls_is_traced_each_with_all_that_it_makes():
    exported: list = []
    traces = Traces(SimpleNamespace(export=exported.extend), lambda app_id, function_id: NAME, sample=0.25)
    for number in range(400):
        traces.input_finished(DONE._replace(root_call_id=f"fc-{number}", call_id=f"fc-{number}"))
        traces.input_finished(
            DONE._replace(root_call_id=f"fc-{number}", call_id=f"fc-child-{number}", parent_input_id=f"in-{number}:0")
        )
    roots = [span for span in exported if span.name.startswith("call ") and not span.parent_id]
    children = [span for span in exported if span.name.startswith("call ") and span.parent_id]
    assert 50 < len(roots) < 150
    assert {span.trace_id for span in roots} == {span.trace_id for span in children}
