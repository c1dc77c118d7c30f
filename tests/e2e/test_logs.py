"""What containers print: kept, in order, followed and searched by the official client."""

import sys
import threading

CHATTY = """
import os
import time
from pathlib import Path

import modal

app = modal.App("chatty")


@app.function(serialized=True, min_containers=4, max_containers=4)
def chat(k, num_lines, pause_s):
    for i in range(num_lines):
        print(f"line {k} {i} é")
        if i % 1000 == 0:
            time.sleep(pause_s)
    return os.environ["MODAL_TASK_ID"]


with app.run(detach=True):
    print("app", app.app_id, flush=True)
    tasks = list(chat.starmap((k, 25_000, 0.1) for k in range(4)))
    assert len(set(tasks)) == 4, tasks
print("all is well")
"""


def _check_lines(output, num_lines):
    seen = [0] * 4
    for line in output.splitlines():
        if line.startswith("line "):
            _, k, i, accent = line.split(" ")
            assert int(i) == seen[int(k)] and accent == "é", f"container {k}: {line!r} after {seen[int(k)]} lines"
            seen[int(k)] += 1
    assert seen == [num_lines] * 4


def test_no_line_of_a_chatty_function_is_lost_though_the_server_is_killed_meanwhile(aeolian, tmp_path):
    (tmp_path / "chatty.py").write_text(CHATTY)
    program = aeolian.start_command(sys.executable, "chatty.py", cwd=tmp_path)
    assert program.stdout is not None
    app_id = next(line for line in program.stdout if line.startswith("app ")).split()[1]
    follower = aeolian.start_command(sys.executable, "-m", "modal", "app", "logs", "-f", app_id, cwd=tmp_path)
    assert follower.stdout is not None
    followed: list[str] = []
    begun = threading.Event()

    def read():
        for line in follower.stdout:
            followed.append(line)
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    aeolian.kill("server")
    output = program.communicate(timeout=200)[0]
    assert "all is well" in output, output
    follower.wait(timeout=100)
    reader.join()
    _check_lines("".join(followed), 25_000)
    _check_lines(aeolian.modal("app", "logs", "-f", app_id), 25_000)


ODD = """
import os
import sys
import time

import modal

app = modal.App("odd")


@app.function()
def odd():
    sys.stdout.write("begun")
    sys.stdout.flush()
    time.sleep(0.05)
    print(" and ended")
    for byte in "☃ é 漢字 🎉\\n".encode():
        os.write(1, bytes([byte]))
        time.sleep(0.001)
    os.write(1, b"\\xff is no utf-8\\n")
    print("x" * 100_000)
    print("on stderr", file=sys.stderr)
    print("no newline at the end", end="")
    sys.stdout.flush()
    time.sleep(0.5)


@app.function()
def other(text):
    print(f"other: {text}")


@app.cls()
class Model:
    size: int = modal.parameter(default=1)

    @modal.method()
    def m(self):
        print(f"model of size {self.size}")


if __name__ == "__main__":
    from datetime import datetime, timedelta, timezone

    app.deploy()
    before = datetime.now(timezone.utc) - timedelta(seconds=2)
    odd.remote()
    call = other.spawn("first")
    call.get()
    other.remote("second")
    Model(size=1).m.remote()
    Model(size=2).m.remote()

    def until(wanted, entries):
        deadline = time.monotonic() + 30
        while (found := [entry.message.rstrip("\\n") for entry in entries()]) != wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        assert found == wanted, (found, wanted)

    until(["other: first", "other: second"], lambda: other.logs.tail())
    until(["other: second"], lambda: other.logs.tail(1))
    until(["other: first"], lambda: call.logs.tail())
    until(["on stderr"], lambda: odd.logs.tail(source="stderr"))
    until(["other: first"], lambda: other.logs.fetch(since=before, search_text="fir"))
    until([], lambda: other.logs.fetch(since=before - timedelta(hours=1), until=before))
    entries = list(call.logs.tail())
    assert entries[0].object_id == call.object_id and entries[0].source == "stdout"
    assert [name[:3] for name in entries[0].context_ids] == ["in-", "ta-"]
    print("ids", other.object_id, call.object_id, odd.object_id)
"""


def test_logs_are_shown_whole_and_can_be_picked_from_also_after_the_app_has_ended(aeolian, tmp_path):
    output = aeolian.python(ODD, tmp_path, name="odd.py")
    function_id, call_id, _ = output.split("ids ")[1].split()
    *printed, _ = aeolian.modal_session(
        ("app logs odd", "begun and ended\n☃ é 漢字 🎉\n\ufffd is no utf-8\n"),
        ("app logs odd --tail 2", "model of size 2"),
        ("app logs odd --since 1h", "other: second"),
        ("app logs odd --since 2h --until 1h", ""),
        ("app logs odd --search second", "other: second\n"),
        ("app logs odd --source stderr", "on stderr\n"),
        (f"app logs odd --function {function_id}", "other: first\nother: second\n"),
        (f"app logs odd --function-call {call_id}", "other: first\n"),
        ("app logs odd --timestamps --show-container-id --show-function-id", f"{function_id} "),
        ("! app logs odd --since tomorrow", "Invalid time format"),
        ("! app logs oddd", "modal app logs odd\n"),
        ("app stop --yes odd", ""),
    )
    whole, tail, since, nothing, search, stderr, of_function, of_call, with_ids, *_ = printed
    assert "x" * 100_000 in whole.replace("\n", "") and "no newline at the end" in whole
    assert tail.splitlines() == ["model of size 1", "model of size 2"]
    assert nothing == "" and search.splitlines() == ["other: second"] and stderr.splitlines() == ["on stderr"]
    assert of_function.splitlines() == ["other: first", "other: second"] and of_call.splitlines() == ["other: first"]
    assert sorted(since.splitlines()) == sorted(whole.splitlines())
    assert with_ids.count("ta-") >= 8
    app_id = aeolian.modal_json("app", "info", "odd")["app_id"]
    assert aeolian.modal("app", "logs", app_id, "--tail", "2").splitlines() == tail.splitlines()
    aeolian.kill("server")
    assert aeolian.modal("app", "logs", app_id, "--tail", "2").splitlines() == tail.splitlines()
