"""The inputs of one container: asked for, handed out, timed, cancelled, and their outputs kept until they are stored.

The server assigns inputs to the container's open request, sometimes a few ahead. Outputs are acknowledged to the
container at once and repeated to the server until it has stored them: were the worker to die, the server would give
the inputs to another container.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from modal_proto import api_pb2

from aeolian.domain.containers import ContainerSpec
from aeolian.domain.link import AssignInputs, Event, HeldInput, Outputs, ReturnInputs, WantInputs
from aeolian.worker.rpc import parsed

HOLD_S = 25.0
"""How long a request for inputs is held; the container asks again at once."""
HEARTBEAT_HOLD_S = 14.0
"""The SDK gives a heartbeat 15.1 s, and begins one every 15 s: between two of them it hears of no cancellation."""
AHEAD_WAIT_S = 0.15
"""Inputs assigned ahead go back when the one before them takes longer than this."""
CANCEL_GRACE_S = 10.0
MAX_UNACKED = 2000
MAX_UNACKED_BYTES = 64 << 20
"""Beyond either, containers wait until the server has stored their outputs."""
REPLIES_KEPT = 4


@dataclass
class _Batch:
    """Inputs that were handed out together."""

    is_cancelled: bool = False
    """One of them was: the SDK ends them all."""


@dataclass
class _Held:
    retry_count: int
    started_at: float
    call_id: str
    batch: _Batch
    deadline: asyncio.TimerHandle | None = None


class ContainerInputs:
    def __init__(
        self,
        spec: ContainerSpec,
        send: Callable[[Event], None],
        on_first_request: Callable[[], None],
        on_stuck: Callable[[str], None],
        on_last: Callable[[], None],
        before_output: Callable[[], Awaitable[None]],
    ):
        """`on_stuck(reason)`: the container does not let go of an input that was cancelled or timed out.

        `on_last()`: it has nothing left to do, and knows that no more is to come. `before_output()`: awaited while
        its only input is still the current one.
        """
        self._spec = spec
        self._send = send
        self._on_first_request = on_first_request
        self._on_stuck = on_stuck
        self._on_last = on_last
        self._before_output = before_output
        self._loop = asyncio.get_running_loop()
        self._held: dict[str, _Held] = {}
        self._ahead: deque[tuple[HeldInput, bytes]] = deque()
        self._ahead_timer: asyncio.TimerHandle | None = None
        self._want: WantInputs | None = None
        self._seq = 0
        self._request: tuple[int, asyncio.Future[bytes]] | None = None
        """The container's open request: how many inputs it takes, and its reply."""
        self._replies: OrderedDict[str, asyncio.Future[bytes]] = OrderedDict()
        self._unacked: OrderedDict[int, tuple[bytes, ...]] = OrderedDict()
        self._unacked_ids: dict[int, tuple[HeldInput, ...]] = {}
        self._unacked_bytes = 0
        self._outputs_seq = 0
        self._room = asyncio.Event()
        self._room.set()
        self._ending: dict[HeldInput, asyncio.TimerHandle] = {}
        """Inputs that were cancelled or timed out, and that the container still works on."""
        self._told = asyncio.Event()
        """Set while the container has something to let go of, and after its end."""
        self._has_asked = False
        self._num_begun = 0
        self._is_last_given = self._has_told_last = False
        self.has_succeeded = False
        """An input came to a good end."""
        self.is_draining = False

    # ---- what the server says ---------------------------------------------------------------------------

    def assigned(self, command: AssignInputs) -> None:
        if self._want is None or command.seq != self._want.seq:
            # An answer to a request that is over: nobody waits for these.
            self._send(ReturnInputs(self._spec.task_id, command.held))
            return
        self._want = None
        self._ahead.extend(zip(command.held, command.items, strict=True))
        if self.is_draining:
            self._return_ahead()
        else:
            self._hand_out()

    def acknowledged(self, seq: int) -> None:
        """Outputs up to `seq` are stored."""
        while self._unacked:
            first = next(iter(self._unacked))
            if first > seq:
                break
            self._unacked_bytes -= sum(map(len, self._unacked.pop(first)))
            self._unacked_ids.pop(first, None)
        if len(self._unacked) < MAX_UNACKED and self._unacked_bytes < MAX_UNACKED_BYTES:
            self._room.set()

    def cancel(self, input_ids: tuple[str, ...]) -> None:
        """Stop working on these; outputs that the container still makes for them are dropped."""
        wanted = set(input_ids)
        self._ahead = deque(pair for pair in self._ahead if pair[0].input_id not in wanted)
        for input_id in input_ids:
            held = self._held.pop(input_id, None)
            if held is not None:
                self._let_go(input_id, held, f"input {input_id} was cancelled, but went on")

    def drain(self) -> None:
        """Hand out no more inputs; the next request is answered by the kill switch."""
        self.is_draining = True
        self._return_ahead()
        self._want = None
        if self._request is not None:
            self._reply_last()

    def repeat(self) -> None:
        """After a reconnection: outputs that may not have arrived."""
        for seq, items in self._unacked.items():
            self._send(Outputs(self._spec.task_id, seq, items))

    def held(self) -> tuple[HeldInput, ...]:
        """Everything that the server must not give to others: begun, ahead, or done but not stored."""
        begun = [HeldInput(input_id, held.retry_count) for input_id, held in self._held.items()]
        ahead = [pair[0] for pair in self._ahead]
        return (*begun, *ahead, *(item for items in self._unacked_ids.values() for item in items))

    @property
    def num_given(self) -> int:
        return self._num_begun + len(self._ahead)

    @property
    def has_unstored(self) -> bool:
        """Whether there are outputs that the server has not stored yet."""
        return bool(self._unacked)

    @property
    def want(self) -> WantInputs | None:
        return self._want

    @property
    def is_busy(self) -> bool:
        return bool(self._held)

    @property
    def is_letting_go(self) -> bool:
        """Whether the container was told to stop working on something, and has not said that it did."""
        return bool(self._ending)

    def current(self) -> tuple[str, str]:
        """(input id, call id), if there is exactly one."""
        if len(self._held) != 1:
            return "", ""
        input_id, held = next(iter(self._held.items()))
        return input_id, held.call_id

    def close(self) -> None:
        """The container has ended."""
        self.is_draining = True
        for held in self._held.values():
            if held.deadline is not None:
                held.deadline.cancel()
        for timer in self._ending.values():
            timer.cancel()
        if self._ahead_timer is not None:
            self._ahead_timer.cancel()
        if self._request is not None:
            self._reply(_KILL_SWITCH)
        self._told.set()

    # ---- what the container asks ------------------------------------------------------------------------

    async def FunctionGetInputs(self, raw: bytes, key: str) -> bytes:
        """A request that is repeated by its key gets the same inputs."""
        reply = self._replies.get(key) if key else None
        if reply is None:
            request = parsed(api_pb2.FunctionGetInputsRequest, raw)
            reply = self._new_request(max(1, request.batch_max_size), int(request.batch_linger_ms))
            if key:
                self._replies[key] = reply
                while len(self._replies) > REPLIES_KEPT:
                    self._replies.popitem(last=False)
        return await asyncio.shield(reply)

    def _new_request(self, max_items: int, linger_ms: int) -> "asyncio.Future[bytes]":
        if not self._has_asked:
            self._has_asked = True
            self._on_first_request()
        if self._request is not None:
            self._reply(_NOTHING)  # the container gave up on its last one
        future = self._loop.create_future()
        self._request = (max_items, future)
        timer = self._loop.call_later(HOLD_S, self._hold_is_over, future)
        future.add_done_callback(lambda _: timer.cancel())
        if self.is_draining:
            self._reply_last()
        elif self._ahead:
            self._hand_out()
        elif self._want is None:
            self._seq += 1
            self._want = WantInputs(self._spec.task_id, self._seq, max_items, linger_ms)
            self._send(self._want)
        return future

    def _hold_is_over(self, future: "asyncio.Future[bytes]") -> None:
        if self._request is not None and self._request[1] is future:
            self._reply(_NOTHING)

    def _reply(self, raw: bytes) -> None:
        assert self._request is not None
        (_, future), self._request = self._request, None
        if not future.done():
            future.set_result(raw)

    def _reply_last(self) -> None:
        self._reply(_KILL_SWITCH)
        self._is_last_given = True
        self._tell_if_done()

    def _tell_if_done(self) -> None:
        if self._is_last_given and not self._held and not self._has_told_last:
            self._has_told_last = True
            self._on_last()

    def _hand_out(self) -> None:
        """Answer the open request from what is there."""
        if self._request is None or not self._ahead:
            return
        max_items, _ = self._request
        response = api_pb2.FunctionGetInputsResponse()
        now, batch = time.time(), _Batch()
        while self._ahead and len(response.inputs) < max_items:
            report, raw = self._ahead.popleft()
            item = response.inputs.add()
            item.MergeFromString(raw)
            held = _Held(report.retry_count, now, item.function_call_id, batch)
            held.deadline = self._loop.call_later(self._spec.input_timeout_s, self._timed_out, item.input_id)
            self._held[item.input_id] = held
            self._num_begun += 1
            self._is_last_given |= item.input.final_input
        self._reply(response.SerializeToString())
        if self._ahead_timer is not None:
            self._ahead_timer.cancel()
            self._ahead_timer = None
        if self._ahead:
            self._ahead_timer = self._loop.call_later(AHEAD_WAIT_S, self._return_ahead)

    def _return_ahead(self) -> None:
        ahead, self._ahead = self._ahead, deque()
        if ahead:
            self._send(ReturnInputs(self._spec.task_id, tuple(pair[0] for pair in ahead)))

    async def FunctionPutOutputs(self, raw: bytes, key: str) -> bytes:
        request = parsed(api_pb2.FunctionPutOutputsRequest, raw)
        await self._room.wait()
        if len(self._held) == 1:
            await self._before_output()
        kept, returned = [], []
        for item in request.outputs:
            report = HeldInput(item.input_id, item.retry_count)
            self._has_let_go(report)
            held = self._held.get(item.input_id)
            if held is None or held.retry_count != item.retry_count:
                continue  # cancelled or timed out meanwhile, or a repetition
            del self._held[item.input_id]
            if held.deadline is not None:
                held.deadline.cancel()
            if held.batch.is_cancelled and item.result.status == api_pb2.GenericResult.GENERIC_STATUS_TERMINATED:
                returned.append(report)  # it was not this one that was cancelled
                continue
            kept.append(item)
            self.has_succeeded |= item.result.status == api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
        if returned:
            self._send(ReturnInputs(self._spec.task_id, tuple(returned)))
        self._put(kept)
        self._tell_if_done()
        return b""

    def _put(self, items: list[api_pb2.FunctionPutOutputsItem]) -> None:
        if not items:
            return
        self._outputs_seq += 1
        raw = tuple(item.SerializeToString() for item in items)
        self._unacked[self._outputs_seq] = raw
        self._unacked_bytes += sum(map(len, raw))
        self._unacked_ids[self._outputs_seq] = tuple(HeldInput(item.input_id, item.retry_count) for item in items)
        if len(self._unacked) >= MAX_UNACKED or self._unacked_bytes >= MAX_UNACKED_BYTES:
            self._room.clear()
        self._send(Outputs(self._spec.task_id, self._outputs_seq, raw))

    async def ContainerHeartbeat(self, raw: bytes, key: str) -> bytes:
        """Held for a while; answered at once while there is something to let go of.

        The SDK passes over inputs that it has not begun, so it is told until it has let go. It asks once a second.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_HOLD_S):
                await self._told.wait()
        response = api_pb2.ContainerHeartbeatResponse()
        # A later attempt of the same input may have begun here: the id would end that one.
        ids = {report.input_id for report in self._ending} - self._held.keys()
        if ids:
            response.cancel_input_event.input_ids.extend(sorted(ids))
        return response.SerializeToString()

    # ---- ends of inputs ---------------------------------------------------------------------------------

    def _timed_out(self, input_id: str) -> None:
        """The worker is the one who keeps time: it publishes the output, and makes the container let go."""
        held = self._held.pop(input_id, None)
        if held is None:
            return
        text = f"the input ran for longer than the Function's timeout of {self._spec.input_timeout_s:g} s"
        self._put(
            [
                api_pb2.FunctionPutOutputsItem(
                    input_id=input_id,
                    retry_count=held.retry_count,
                    input_started_at=held.started_at,
                    output_created_at=time.time(),
                    result=api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT, exception=text),
                )
            ]
        )
        self._let_go(input_id, held, f"an input hit the timeout of {self._spec.input_timeout_s:g} s")

    def _let_go(self, input_id: str, held: _Held, reason: str) -> None:
        """Tell the container to stop working on an input; end it when it does not."""
        if held.deadline is not None:
            held.deadline.cancel()
        held.batch.is_cancelled = True
        report = HeldInput(input_id, held.retry_count)
        self._ending[report] = self._loop.call_later(CANCEL_GRACE_S, self._did_not_let_go, report, reason)
        self._told.set()

    def _has_let_go(self, report: HeldInput) -> None:
        if (timer := self._ending.pop(report, None)) is not None:
            timer.cancel()
            if not self._ending:
                self._told.clear()

    def _did_not_let_go(self, report: HeldInput, reason: str) -> None:
        if report in self._ending:
            self._has_let_go(report)
            self._on_stuck(reason)


_KILL_SWITCH = api_pb2.FunctionGetInputsResponse(
    inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)]
).SerializeToString()
_NOTHING = b""
