"""Calls that are made by one program and looked at by others, later."""

import json
import os
import signal
import sys
import time

import modal
from modal.exception import NotFoundError, RemoteError

app = modal.App("calls-later")


@app.function()
def square(x):
    return x * x


@app.function()
def fails():
    raise ValueError("as before")


@app.function()
def calls_others(n):
    return sum(square.map(range(n)))


@app.function(max_containers=1)
def takes_long(seconds):
    time.sleep(seconds)
    return seconds


@app.function()
def counts(name, seconds):
    runs = modal.Dict.from_name("calls-later", create_if_missing=True)
    runs[name] = runs.get(name, 0) + 1
    time.sleep(seconds)
    return runs[name]


def function(name) -> modal.Function:
    return modal.Function.from_name("calls-later", name)


def begin():
    """Prints the ids of some calls, finished and unfinished."""
    modal.Dict.from_name("calls-later", create_if_missing=True).clear()
    calls = {
        "square": function("square").spawn(7),
        "map": function("square").experimental_spawn_map(range(60)),
        "fails": function("fails").spawn(),
        "calls_others": function("calls_others").spawn(4),
    }
    for name in ("square", "map", "calls_others"):
        calls[name].get()
    list(calls["map"].iter())
    calls["slow"] = function("takes_long").spawn(3)
    calls["queued"] = function("takes_long").spawn(1)
    calls["cancelled"] = function("takes_long").spawn(2)
    print(json.dumps({name: call.object_id for name, call in calls.items()}))


def look(ids):
    """What another program sees of them."""
    calls = {name: modal.FunctionCall.from_id(call_id) for name, call_id in ids.items()}
    assert calls["square"].get(timeout=0) == 49
    assert calls["square"].num_inputs() == 1
    assert calls["map"].num_inputs() == 60
    assert list(calls["map"].iter(start=10, end=13)) == [100, 121, 144]
    assert calls["map"].get(index=59) == 59 * 59
    assert modal.FunctionCall.gather(calls["square"], calls["calls_others"]) == [49, 14]
    try:
        calls["fails"].get()
    except ValueError as error:
        assert str(error) == "as before"
    else:
        raise AssertionError("it did not raise")
    [root] = calls["calls_others"].get_call_graph()
    assert [node.function_name for node in root.children] == ["square"] * 4
    try:
        modal.FunctionCall.from_id("fc-" + "0" * 22).get(timeout=0)
    except NotFoundError as error:
        assert "never made" in str(error)
    else:
        raise AssertionError("a call that was never made has a result")


def finish(ids):
    """Those that were unfinished come to their end."""
    calls = {name: modal.FunctionCall.from_id(call_id) for name, call_id in ids.items()}
    calls["cancelled"].cancel()
    try:
        calls["cancelled"].get()
    except RemoteError as error:
        assert "was cancelled" in str(error)
    else:
        raise AssertionError("it was not cancelled")
    assert calls["slow"].get() == 3
    assert calls["queued"].get() == 1


def map_until_interrupted():
    """A local program that is interrupted in the middle of a map."""

    def interrupt(number):
        if number == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return number

    with app.run():
        try:
            for number, _ in enumerate(takes_long.map([0.05] * 400)):
                interrupt(number)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            sys.exit(130)
    print("not interrupted")
