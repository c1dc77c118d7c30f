"""What callers get to see when user code fails."""

import ctypes
import os
import signal
import sys
import threading
import time
import traceback

import modal

app = modal.App("calls-errors")


class Refused(Exception):
    """A user's own exception, with an attribute."""

    def __init__(self, text, code):
        super().__init__(text)
        self.code = code

    def __reduce__(self):
        return Refused, (self.args[0], self.code)


class NotPicklable(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one, other):
        super().__init__(f"{one}-{other}")


@app.function()
def refuses():
    raise Refused("not today", 7)


@app.function()
def has_a_cause():
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError("no such thing") from error


@app.function()
def raises_strange_things(what):
    if what == "not picklable":
        raise NotPicklable(1, 2)
    if what == "holds a lock":
        error = ValueError("it holds a lock")
        error.lock = threading.Lock()
        raise error
    if what == "huge":
        raise ValueError("x" * (3 << 20))
    if what == "base":
        raise BaseException("from below")
    if what == "exit":
        sys.exit(3)


@app.function()
def returns_a_lock():
    return threading.Lock()


@app.function()
def dies(how):
    if how == "exit":
        os._exit(9)
    if how == "quietly":
        os._exit(0)
    if how == "fault":
        ctypes.string_at(0)


@app.function()
def dies_once(name):
    state = modal.Dict.from_name("calls-errors", create_if_missing=True)
    state[name] = attempt = state.get(name, 0) + 1
    if attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt


@app.function()
def says(word):
    print(f"it says {word}")
    time.sleep(0.3)  # output is attributed while it runs
    return modal.current_function_call_id()


def raised_by(function, *args) -> BaseException:
    try:
        result = function.remote(*args)
    except BaseException as error:
        return error
    raise AssertionError(f"it returned {result!r}")


def check_exceptions():
    error = raised_by(refuses)
    assert type(error) is Refused and error.code == 7 and str(error) == "not today"
    trace = "".join(traceback.format_exception(error))
    assert ":/root/calls_errors.py" in trace and "in refuses" in trace, trace
    error = raised_by(has_a_cause)
    assert isinstance(error, ValueError) and isinstance(error.__cause__, KeyError), repr(error.__cause__)
    error = raised_by(raises_strange_things, "not picklable")
    assert isinstance(error, modal.exception.ExecutionError) and "in raises_strange_things" in str(error), error
    error = raised_by(raises_strange_things, "holds a lock")
    assert isinstance(error, modal.exception.SerializationError) and "it holds a lock" in str(error), error
    assert isinstance(raised_by(raises_strange_things, "huge"), ValueError)
    assert str(raised_by(raises_strange_things, "base")) == "from below"
    error = raised_by(raises_strange_things, "exit")
    assert isinstance(error, SystemExit) and error.code == 3
    assert raises_strange_things.remote("") is None
    assert isinstance(raised_by(returns_a_lock), TypeError)


def check_containers_that_die():
    error = raised_by(dies, "exit")
    assert isinstance(error, modal.exception.RemoteError) and "exit code 9" in str(error), error
    assert "exit code 0" in str(raised_by(dies, "quietly"))
    assert "signal 11" in str(raised_by(dies, "fault"))
    assert dies.remote("") is None
    modal.Dict.from_name("calls-errors", create_if_missing=True).clear()
    assert dies_once.remote("a") == 2
    assert dies_once.spawn("b").get() == 2
    assert list(dies_once.map(["c", "d"])) == [2, 2]


def check_logs_of_a_call():
    calls = [says.spawn(word) for word in ("one", "two")]
    for call, word in zip(calls, ("one", "two"), strict=True):
        assert call.get() == call.object_id
        until = time.monotonic() + 20
        while not (lines := [entry.message for entry in call.logs.tail()]) and time.monotonic() < until:
            time.sleep(0.2)
        assert "".join(lines) == f"it says {word}\n", lines


def run():
    with app.run():
        check_exceptions()
        check_containers_that_die()
        check_logs_of_a_call()
    print("all is well")
