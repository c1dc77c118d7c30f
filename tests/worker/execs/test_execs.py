"""Commands of a worker, run on this host by the program that enters containers of the `process` runtime."""

import asyncio
import sys
from pathlib import Path

import pytest

from aeolian.domain.errors import AeolianError, InvalidArgument, NotFound, Unavailable
from aeolian.domain.execs import AskStdin, AwaitExec, Command, Done, ReadExec, StartExec, TerminalSize, WriteExec
from aeolian.worker.execs import exec as exec_module
from aeolian.worker.execs.execs import Execs
from aeolian.worker.runtimes import enter
from aeolian.worker.runtimes.entering import EnteredCommand, Entry

TASK = "ta-1"
WAIT_S = 20.0


class SomeContainer:
    """Its commands see this host as it is."""

    def __init__(self) -> None:
        self.num_commands = 0

    async def exec(self, command: Command) -> EnteredCommand:
        self.num_commands += 1
        process = {"env": ["PATH=/usr/bin:/bin"], "cwd": "/", "namespaces": []}
        return await EnteredCommand.start(Entry((sys.executable, "-I", enter.__file__, "exec"), "0", process), command)


class Commands:
    def __init__(self, execs: Execs):
        self.execs = execs
        self.container = SomeContainer()

    async def ask(self, request):
        return await self.execs.answer(TASK, self.container, request)

    async def start(self, script: str, exec_id: str = "x", terminal: TerminalSize | None = None, **options) -> None:
        command = Command(("sh", "-c", script), terminal=terminal)
        assert await self.ask(StartExec(exec_id, command, **options)) == Done()

    async def output(self, fd: int = 1, exec_id: str = "x") -> bytes:
        found, is_over = b"", False
        while not is_over:
            data, is_over = await self.some(fd, len(found), exec_id)
            found += data
        return found

    async def some(self, fd: int = 1, offset: int = 0, exec_id: str = "x") -> tuple[bytes, bool]:
        answer = await self.ask(ReadExec(exec_id, fd, offset, WAIT_S))
        return answer.data, answer.is_over

    async def write(self, offset: int, data: bytes, *, is_last: bool = False, wait_s: float = WAIT_S):
        return await self.ask(WriteExec("x", offset, data, is_last, wait_s))

    async def ended(self, exec_id: str = "x", wait_s: float = WAIT_S) -> int | None:
        return (await self.ask(AwaitExec(exec_id, wait_s))).exit_code


@pytest.fixture
async def commands(tmp_path: Path):
    execs = Execs(tmp_path / "execs")
    await execs.open()
    yield Commands(execs)
    await execs.close()


async def test_output_and_exit_code_of_a_command_are_kept_for_whoever_asks(commands):
    await commands.start("echo out; echo err >&2; exit 4")
    assert await commands.output(1) == b"out\n"
    assert await commands.output(2) == b"err\n"
    assert await commands.ended() == 4
    assert await commands.some(offset=2) == (b"t\n", False), "from any byte, as often as one likes"
    assert await commands.some(offset=4) == (b"", True)


async def test_a_start_that_is_repeated_starts_nothing(commands):
    await asyncio.gather(*(commands.start("echo once") for _ in range(3)))
    await commands.ended()
    await commands.start("echo twice")
    assert await commands.output() == b"once\n"
    assert commands.container.num_commands == 1


async def test_input_is_taken_once_however_often_it_is_sent(commands):
    await commands.start("cat")
    assert (await commands.write(0, b"one ")).num_bytes == 4
    assert (await commands.write(0, b"one two ")).num_bytes == 8
    with pytest.raises(InvalidArgument, match="cannot follow byte 8"):
        await commands.write(9, b"gap")
    assert not (await commands.ask(AskStdin("x"))).is_closed
    assert (await commands.write(8, b"three", is_last=True)).is_closed
    assert await commands.output() == b"one two three"
    assert (await commands.write(13, b"late")).is_closed, "what comes too late is no error"


async def test_input_that_is_not_read_does_not_hold_its_sender_for_ever(commands):
    await commands.start("sleep 600")
    data = bytes(4 << 20)
    taken = (await commands.write(0, data, wait_s=0.05)).num_bytes
    assert 0 < taken < len(data)
    assert (await commands.write(0, data, wait_s=0)).num_bytes == taken


async def test_much_output_arrives_whole_though_nobody_reads_for_a_while(commands):
    await commands.start("head -c 3000000 /dev/zero; echo end")
    assert await commands.ended(wait_s=WAIT_S) == 0
    assert len(await commands.output()) == 3_000_004


async def test_the_end_is_told_when_its_readers_have_everything(commands):
    """The client's commands leave when they hear of it, whatever they have not written yet."""
    await commands.start("head -c 1000000 /dev/zero")
    data, _ = await commands.some()
    waiting = asyncio.create_task(commands.ended())
    offset = len(data)
    while offset < 1_000_000:
        data, _ = await commands.some(offset=offset)
        offset += len(data)
        assert not waiting.done()
    assert await commands.some(offset=offset) == (b"", True)
    assert await waiting == 0


async def test_the_end_is_told_though_its_reader_has_left(commands, monkeypatch):
    monkeypatch.setattr(exec_module, "READER_SILENT_S", 0.1)
    await commands.start("head -c 1000000 /dev/zero")
    await commands.some()
    assert await commands.ended() == 0


async def test_output_goes_where_it_is_wanted(commands):
    await commands.start("echo out; echo err >&2", "none", keeps_stdout=False, keeps_stderr=False)
    assert await commands.output(1, "none") == await commands.output(2, "none") == b""
    await commands.start("echo out; echo err >&2", "joined", joins_stderr=True)
    assert sorted((await commands.output(1, "joined")).split()) == [b"err", b"out"]
    assert await commands.output(2, "joined") == b""


async def test_a_terminal_echoes_has_a_size_and_ends_its_input_by_a_character(commands):
    await commands.start("stty size; cat; echo bye", terminal=TerminalSize(10, 40))
    await commands.write(0, b"hello\n", is_last=True)
    output = await commands.output()
    assert b"10 40\r\n" in output and output.count(b"hello") == 2 and output.endswith(b"bye\r\n")
    assert await commands.output(2) == b""
    assert await commands.ended() == 0


async def test_a_command_is_killed_when_its_time_is_over(commands):
    await commands.start("echo begun; sleep 600", timeout_s=0.3)
    assert await commands.output() == b"begun\n"
    assert await commands.ended() == 128 + 9


async def test_a_terminal_that_its_user_has_left_is_ended(commands):
    await commands.start("sleep 600", terminal=TerminalSize(), unattended_s=0.2)
    assert await commands.ended() == 128 + 9


async def test_what_a_command_leaves_behind_does_not_keep_its_output_open(commands, monkeypatch):
    monkeypatch.setattr(exec_module, "DRAIN_S", 0.1)
    await commands.start("echo done; (setsid sleep 3 &)")
    assert await commands.output() == b"done\n"
    assert await commands.ended() == 0


async def test_commands_end_with_their_container_and_can_be_read_still(commands):
    await commands.start("echo here; sleep 600")
    assert await commands.some() == (b"here\n", False)
    commands.execs.container_ended(TASK)
    assert await commands.output() == b"here\n"
    assert await commands.ended() == 128 + 9


async def test_what_is_not_there_is_said(commands):
    with pytest.raises(NotFound, match="no command 'y'"):
        await commands.ended("y")
    with pytest.raises(Unavailable, match="not running"):
        await commands.execs.answer(TASK, None, StartExec("y", Command(("true",))))
    with pytest.raises(InvalidArgument, match="1 to 200 characters"):
        await commands.ask(StartExec("y" * 201, Command(("true",))))
    await commands.start("true")
    with pytest.raises(InvalidArgument, match="no output 3"):
        await commands.some(3)


async def test_a_start_that_fails_is_told_to_everybody_who_asked_for_it(commands):
    class Broken:
        async def exec(self, command):
            raise RuntimeError("broken")

    request = StartExec("x", Command(("true",)))
    asked = [commands.execs.answer(TASK, Broken(), request) for _ in range(2)]
    for answer in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(answer, AeolianError) and "broken" in answer.message
    assert await commands.ended() == -9
