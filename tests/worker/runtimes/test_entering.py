"""Commands in a running container, on each runtime of this host."""

import asyncio
import os
import signal

import pytest

from aeolian.domain.errors import FailedPrecondition
from aeolian.domain.execs import Command, TerminalSize
from aeolian.worker.runtimes.entering import NOT_STARTED, EnteredCommand


@pytest.fixture
async def container(place):
    started = await place.start(
        "sh", "-c", "echo secret > /tmp/inside; echo $$ > /tmp/pid; echo ready; exec sleep 600", env={"OWN": "1"}
    )
    assert await started.line() == "ready"
    return started


async def output_of(descriptor: int) -> bytes:
    def read() -> bytes:
        os.set_blocking(descriptor, True)
        found = b""
        try:
            while chunk := os.read(descriptor, 1 << 16):
                found += chunk
        except OSError:  # of a terminal that is over
            pass
        return found

    return await asyncio.to_thread(read)


async def ended(entered: EnteredCommand) -> tuple[int, str, str]:
    stdout = await output_of(entered.stdout)
    stderr = await output_of(entered.stderr) if entered.stderr != -1 else b""
    code = await asyncio.wait_for(entered.wait(), 20)
    entered.close()
    return code, stdout.decode(), stderr.decode()


async def run(container, *argv: str, **command) -> tuple[int, str, str]:
    return await ended(await container.running.exec(Command(argv, **command)))


async def test_a_command_sees_what_the_container_sees(container):
    command = "cat /tmp/inside /etc/small; pwd; echo $OWN $FROM_IMAGE $MORE; echo problem >&2; exit 3"
    code, stdout, stderr = await run(container, "sh", "-c", command, env={"MORE": "yes"})
    assert (code, stderr) == (3, "problem\n")
    assert stdout.splitlines() == ["secret", "of the top layer", "/root", "1 yes yes"]


async def test_it_has_the_rights_of_the_containers_own_process_and_no_more(container):
    script = "while read name value; do case $name in Cap*|NoNewPrivs:|Seccomp:|Uid:) echo $name $value;; esac; done"
    _, own, _ = await run(container, "sh", "-c", f"{script} < /proc/self/status")
    _, mains, _ = await run(container, "sh", "-c", f"{script} < /proc/$(cat /tmp/pid)/status")
    assert own and own == mains


async def test_it_works_where_it_is_told_to(container):
    assert await run(container, "sh", "-c", "pwd", cwd="/tmp") == (0, "/tmp\n", "")


async def test_input_arrives_and_its_end(container):
    entered = await container.running.exec(Command(("cat",)))
    os.write(entered.stdin, b"from outside\n")
    entered.close_stdin()
    assert await ended(entered) == (0, "from outside\n", "")


async def test_a_command_that_is_not_there_says_so(container):
    code, stdout, stderr = await run(container, "no-such-command")
    assert (code, stdout) == (NOT_STARTED, "")
    assert "no-such-command" in stderr


async def test_a_command_that_is_not_there_says_so_where_it_has_a_terminal_too(container):
    try:
        entered = await container.running.exec(Command(("no-such-command",), terminal=TerminalSize()))
    except FailedPrecondition as error:
        assert "no-such-command" in error.message
    else:
        assert await entered.wait() == NOT_STARTED
        complaint = entered.complaint
        assert "no-such-command" in complaint + (await ended(entered))[1]


async def test_a_terminal_is_one_of_the_container_with_the_size_that_was_asked_for(container):
    script = "import os; print(os.isatty(0), os.isatty(2), os.get_terminal_size()); print('got', input())"
    entered = await container.running.exec(Command(("python3", "-c", script), terminal=TerminalSize(33, 99)))
    os.write(entered.stdin, b"typed\n")
    code, stdout, _ = await ended(entered)
    assert code == 0, stdout
    assert "True True os.terminal_size(columns=99, lines=33)" in stdout and "got typed" in stdout


async def test_an_interrupt_that_is_typed_reaches_what_runs_in_the_foreground(container):
    script = "import time\ntry: print('ready'); time.sleep(600)\nexcept KeyboardInterrupt: print('interrupted')"
    entered = await container.running.exec(Command(("python3", "-u", "-c", script), terminal=TerminalSize()))
    assert await asyncio.to_thread(_line, entered.stdout) == b"ready\r\n"
    os.write(entered.stdin, b"\x03")
    code, stdout, _ = await ended(entered)
    assert (code, "interrupted" in stdout) == (0, True)


async def test_a_signal_shows_in_the_exit_status(container):
    assert (await run(container, "sh", "-c", "kill -TERM $$"))[0] == 128 + signal.SIGTERM


async def test_kill_ends_a_command_with_its_children_but_not_the_container(container):
    entered = await container.running.exec(Command(("sh", "-c", "sleep 600 & echo started; wait")))
    assert await asyncio.to_thread(_line, entered.stdout) == b"started\n"
    entered.kill()
    code, _, _ = await ended(entered)  # its pipes are closed only when the last of them is dead
    assert code == 128 + signal.SIGKILL
    assert (await run(container, "sh", "-c", "echo alive"))[1] == "alive\n"


async def test_commands_end_with_their_container(container):
    entered = await container.running.exec(Command(("sh", "-c", "echo started; exec sleep 600")))
    assert await asyncio.to_thread(_line, entered.stdout) == b"started\n"
    container.running.kill()
    await container.ended()
    code, _, _ = await ended(entered)
    assert code != 0


def _line(descriptor: int) -> bytes:
    os.set_blocking(descriptor, True)
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line
