"""Images that a Function makes (`Image.run_function`): it runs once, and its container's file system is kept.

::

    call --> container over the base image --> output: SUCCESS --> the worker keeps what was written --> ImageBuilt
      ^                                                                    |
      +---------------- the container was lost before that ---------------+
"""

import asyncio
from collections.abc import Awaitable, Callable

from modal_proto import api_pb2

from aeolian.control.calls import Calls
from aeolian.control.image_state import Build, BuildFailed
from aeolian.domain.caller import Caller
from aeolian.domain.calls import CallType, Invocation, Status
from aeolian.domain.errors import FailedPrecondition, NotFound

POLL_S = 55.0
KEEP_S = 900.0
"""How long a worker may take to keep what a container wrote."""
MAX_LOSSES = 3


class BuildFunctions:
    def __init__(self, calls: Calls, note_loss: Callable[[Build, int], Awaitable[None]]):
        """`note_loss(build, num_losses)`: remembers that what the Function made was lost."""
        self._calls = calls
        self._note_loss = note_loss

    async def run(self, build: Build) -> dict[str, str]:
        """Run the build's Function until its work is kept. Raises BuildFailed."""
        while not build.is_over:
            app_id, function_id = next(iter(build.asking.items()))
            output = await self._call(build, function_id)
            status = Status(output.result.status)
            if status is Status.TERMINATED:  # its App was stopped; others may want the image, too
                build.asking.pop(app_id, None)
                if build.asking:
                    continue
            if status is not Status.SUCCESS:
                raise BuildFailed(*_explained(output.result))
            if not await self._kept(build, output.task_id):
                losses = build.image.num_losses + 1
                if losses >= MAX_LOSSES:
                    raise BuildFailed(
                        f"the build function ended well {losses} times, but its container was lost each time "
                        "before its file system was kept (the worker's log says why)"
                    )
                await self._note_loss(build, losses)
        return build.result()

    async def _call(self, build: Build, function_id: str) -> api_pb2.FunctionGetOutputsItem:
        """The output of the one call: the same call again after a restart of the server."""
        key = f"{build.image.build_id}/{function_id}/{build.image.num_losses}"
        caller = Caller(workspace=build.image.workspace, token_id="image-builds", idempotency_key=key)
        payload = build.definition.build_function.input.SerializeToString()
        try:
            call = await self._calls.start(
                function_id, caller, call_type=CallType.UNARY, invocation=Invocation.SYNC, inputs=[(0, payload)]
            )
            while True:
                page = await self._calls.get_outputs(call.call_id, caller, timeout_s=POLL_S)
                if page.outputs:
                    return api_pb2.FunctionGetOutputsItem.FromString(page.outputs[0].item)
        except (NotFound, FailedPrecondition) as error:
            # The Function went with its App.
            result = api_pb2.GenericResult(
                status=api_pb2.GenericResult.GENERIC_STATUS_TERMINATED, exception=error.message
            )
            return api_pb2.FunctionGetOutputsItem(result=result)

    async def _kept(self, build: Build, task_id: str) -> bool:
        """Whether the worker has kept what the container wrote; False: the container is gone without that."""
        until = asyncio.get_running_loop().time() + KEEP_S
        while True:
            build.woken.clear()
            if build.is_over:
                return True
            if task_id in build.ended_tasks or not await build.changed(until):
                return False


def _explained(result: api_pb2.GenericResult) -> tuple[str, Status]:
    """The failure as the client shows it: with the traceback where there is one."""
    text = result.traceback or result.exception
    status = Status(result.status)
    if status not in (Status.TERMINATED, Status.TIMEOUT):
        status = Status.FAILURE
    return text.strip() or "the build function failed without saying why", status
