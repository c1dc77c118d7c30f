"""Requests about commands, over the link between server and worker."""

from types import SimpleNamespace

import pytest
from some_server import SomeRuntime, SomeServer, an_agent, start_of
from test_execs import SomeContainer

from aeolian.domain.containers import ContainerState, VolumeMountSpec
from aeolian.domain.execs import AwaitExec, Command, Done, Ended, Output, ReadExec, ReloadVolumes, StartExec
from aeolian.domain.link import ContainerAnswer, ContainerChanged, ContainerRequest, Hello

ECHO = StartExec("x", Command(("echo", "hello")))


class Asked:
    def __init__(self, server: SomeServer, runtime: SomeRuntime, agent):
        self.server, self.runtime, self.agent = server, runtime, agent
        self._num_asked = 0

    async def ask(self, request, task_id: str = "ta-1"):
        self._num_asked += 1
        self.server.send(ContainerRequest(task_id, str(self._num_asked), request))
        answered = await self.server.heard(ContainerAnswer, self._num_asked)
        assert answered.request_id == str(self._num_asked)
        return answered.answer

    async def start(self, **spec):
        self.server.send(start_of(**spec))
        container = await self.runtime.started.get()
        container.exec = SomeContainer().exec
        return container


@pytest.fixture
async def asked(tmp_path):
    server, runtime = SomeServer(tmp_path / "worker.sock"), SomeRuntime()
    await server.start()
    server.acknowledge_all()
    agent = an_agent(tmp_path, runtime)
    await agent.open()
    await server.heard(Hello)
    yield Asked(server, runtime, agent)
    await agent.close(0)
    await server.stop()


async def test_a_command_is_run_read_and_kept_beyond_the_end_of_its_container(asked):
    container = await asked.start()
    assert await asked.ask(ECHO) == Done()
    assert await asked.ask(ReadExec("x", 1, 0, 20.0)) == Output(b"hello\n", False)
    assert await asked.ask(ReadExec("x", 1, 6, 20.0)) == Output(b"", True)
    assert await asked.ask(AwaitExec("x", 20.0)) == Ended(0)
    container.end()
    while asked.server.of(ContainerChanged)[-1].state != ContainerState.EXITED:
        await asked.server.heard(ContainerChanged, len(asked.server.of(ContainerChanged)) + 1)
    assert await asked.ask(AwaitExec("x", 0.0)) == Ended(0)
    assert (await asked.ask(StartExec("y", ECHO.command))).kind == "Unavailable"


async def test_errors_go_back_by_the_name_of_their_type(asked):
    assert (await asked.ask(ECHO)).kind == "Unavailable"
    assert (await asked.ask(AwaitExec("x", 0.0))).kind == "NotFound"
    assert (await asked.ask(ReloadVolumes())).kind == "FailedPrecondition"


async def test_all_volumes_of_a_container_are_reloaded(asked):
    reloaded = []

    async def reload(request, task_id):
        reloaded.append((request.volume_id, task_id))

    asked.agent.use_volumes(SimpleNamespace(VolumeReload=reload))
    await asked.start(volumes=(VolumeMountSpec("vo-1", "/a"), VolumeMountSpec("vo-2", "/b")))
    assert await asked.ask(ReloadVolumes()) == Done()
    assert reloaded == [("vo-1", "ta-1"), ("vo-2", "ta-1")]
