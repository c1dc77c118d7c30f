"""RPCs of a container on their way through the worker: with whose identity, and across a server that starts again."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from aeolian.worker import rpc
from aeolian.worker.link import CHANNEL_OPTIONS, TASK_KEY, TOKEN_KEY
from aeolian.worker.rpc import ContainerServer, ContainerService

UNARY = "/modal.client.ModalClient/DictGet"
STREAM = "/modal.client.ModalClient/DictContents"
KEY = (("x-idempotency-key", "once"),)


class Upstream(grpc.GenericRpcHandler):
    """The server, as far as the worker's channel sees it."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata: list[dict] = []
        self.hold = asyncio.Event()
        """Calls wait for it after their first reply."""
        self.hold.set()
        self.reached = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()

    async def kill(self) -> None:
        assert self._server is not None
        await self._server.stop(0)
        self.path.unlink(missing_ok=True)
        self.reached.clear()

    def service(self, details: grpc.HandlerCallDetails):
        async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            self._note(context)
            await self.hold.wait()
            return b"answer to " + request

        async def stream(request: bytes, context: grpc.aio.ServicerContext) -> None:
            self._note(context)
            if request == b"at once":
                await context.write(b"1")
            await self.hold.wait()
            await context.write(b"2")

        if details.method == STREAM:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)

    def _note(self, context: grpc.aio.ServicerContext) -> None:
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.reached.set()


class Passing:
    """A container's channel to its worker, and the server behind."""

    def __init__(self, container: grpc.aio.Channel, server: Upstream):
        self.container, self.server = container, server

    async def unary(self, metadata=(), request: bytes = b"it") -> bytes:
        return await self.container.unary_unary(UNARY)(request, metadata=metadata)

    async def stream(self, request: bytes) -> list[bytes]:
        return [reply async for reply in self.container.unary_stream(STREAM)(request)]


@pytest.fixture
async def passing() -> AsyncIterator[Passing]:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    server = Upstream(folder / "grpc.sock")
    await server.start()
    upstream = grpc.aio.insecure_channel(f"unix:{server.path}", options=CHANNEL_OPTIONS)

    async def own(request: bytes, key: str) -> bytes:
        raise ZeroDivisionError

    service = ContainerService("ta-1", "secret", upstream, {"DictLen": own})
    worker = ContainerServer(str(folder / "worker.sock"), service)
    await worker.start()
    async with grpc.aio.insecure_channel(f"unix:{folder / 'worker.sock'}") as container:
        yield Passing(container, server)
    await worker.stop()
    await upstream.close()
    await server.kill()
    shutil.rmtree(folder)


async def test_the_worker_says_who_a_container_is_whatever_it_says_itself(passing):
    forged = ((TASK_KEY, "ta-2"), (TOKEN_KEY, "guessed"), ("x-modal-token-id", "ak-1"), *KEY)
    assert await passing.unary(forged) == b"answer to it"
    [metadata] = passing.server.metadata
    assert (metadata[TASK_KEY], metadata[TOKEN_KEY]) == ("ta-1", "secret")
    assert metadata["x-idempotency-key"] == "once" and "x-modal-token-id" not in metadata


async def test_a_repeatable_rpc_rides_out_a_server_that_is_killed_in_the_middle(passing):
    passing.server.hold.clear()
    asked = asyncio.ensure_future(passing.unary(KEY))
    await passing.server.reached.wait()
    await passing.server.kill()
    await asyncio.sleep(0.05)
    passing.server.hold.set()
    await passing.server.start()
    assert await asked == b"answer to it"
    assert [metadata["x-idempotency-key"] for metadata in passing.server.metadata] == ["once", "once"]


async def test_an_rpc_that_may_not_be_repeated_is_not(passing):
    passing.server.hold.clear()
    asked = asyncio.ensure_future(passing.unary())
    await passing.server.reached.wait()
    await passing.server.kill()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await asked
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    await passing.server.start()
    assert len(passing.server.metadata) == 1


async def test_a_stream_that_has_not_begun_rides_out_a_killed_server(passing):
    passing.server.hold.clear()
    asked = asyncio.ensure_future(passing.stream(b"later"))
    await passing.server.reached.wait()
    await passing.server.kill()
    passing.server.hold.set()
    await passing.server.start()
    assert await asked == [b"2"]


async def test_a_stream_that_has_begun_breaks_off_so_that_the_container_goes_on_where_it_was(passing):
    passing.server.hold.clear()
    stream = passing.container.unary_stream(STREAM)(b"at once")
    assert await stream.read() == b"1"
    await passing.server.kill()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stream.read()
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    await passing.server.start()


async def test_a_server_that_stays_away_is_said_in_the_end(passing, monkeypatch):
    monkeypatch.setattr(rpc, "RIDE_OUT_S", 0.1)
    passing.server.hold.clear()
    asked = asyncio.ensure_future(passing.stream(b"later"))
    await passing.server.reached.wait()
    await asyncio.sleep(0.15)
    await passing.server.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await asked
    await passing.server.start()


async def test_a_mistake_of_the_worker_is_no_reason_to_repeat(passing):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await passing.container.unary_unary("/modal.client.ModalClient/DictLen")(b"")
    assert error.value.code() is grpc.StatusCode.DATA_LOSS


async def test_what_is_no_rpc_of_the_client_is_not_passed_on(passing):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await passing.container.unary_unary("/aeolian.Worker/Volumes")(b"")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert passing.server.metadata == []


async def test_the_server_is_told_that_a_request_is_no_first_attempt_any_more(passing):
    passing.server.hold.clear()
    asked = asyncio.ensure_future(passing.unary((*KEY, ("x-retry-attempt", "0"))))
    await passing.server.reached.wait()
    await passing.server.kill()
    passing.server.hold.set()
    await passing.server.start()
    await asked
    assert [metadata.get("x-retry-attempt") for metadata in passing.server.metadata] == ["0", None]
