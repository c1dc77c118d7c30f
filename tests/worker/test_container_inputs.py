import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from modal_proto import api_pb2
from virtual_time import settle, virtually

from aeolian.domain.containers import ContainerSpec
from aeolian.domain.link import AssignInputs, HeldInput, Outputs, ReturnInputs, WantInputs
from aeolian.worker import container_inputs
from aeolian.worker.container_inputs import ContainerInputs

SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
TERMINATED = api_pb2.GenericResult.GENERIC_STATUS_TERMINATED
TIMEOUT = api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT


class Worker:
    """A server and a container around the inputs under test."""

    def __init__(self, *, timeout_s: float = 300.0):
        self.sent: list = []
        self.stuck: list[str] = []
        self.num_firsts = self.num_lasts = 0
        spec = ContainerSpec("ta-1", "ap-1", "fu-1", "main", "im-1", input_timeout_s=timeout_s)
        self.inputs = ContainerInputs(
            spec, self.sent.append, self._first, self.stuck.append, self._last, self._read_logs
        )
        self._keys = 0

    def _first(self) -> None:
        self.num_firsts += 1

    def _last(self) -> None:
        self.num_lasts += 1

    async def _read_logs(self) -> None:
        self.was_current = self.inputs.current()

    def of(self, kind: type) -> list:
        return [event for event in self.sent if isinstance(event, kind)]

    # the container's side

    def ask(self, max_items: int = 0, key: str = "") -> "asyncio.Task[api_pb2.FunctionGetInputsResponse]":
        if not key:
            self._keys += 1
            key = f"key-{self._keys}"
        request = api_pb2.FunctionGetInputsRequest(batch_max_size=max_items, batch_linger_ms=10)

        async def call():
            raw = await self.inputs.FunctionGetInputs(request.SerializeToString(), key)
            return api_pb2.FunctionGetInputsResponse.FromString(raw)

        return asyncio.ensure_future(call())

    async def put(self, *outputs: tuple[str, int, int]) -> None:
        """(input id, retry count, status)"""
        request = api_pb2.FunctionPutOutputsRequest()
        for input_id, retry_count, status in outputs:
            request.outputs.add(input_id=input_id, retry_count=retry_count, result={"status": status})
        await self.inputs.FunctionPutOutputs(request.SerializeToString(), "")

    async def heartbeat(self) -> list[str]:
        raw = await self.inputs.ContainerHeartbeat(b"", "")
        return list(api_pb2.ContainerHeartbeatResponse.FromString(raw).cancel_input_event.input_ids)

    # the server's side

    def assign(self, *names: str, retry_count: int = 0, final: bool = False, seq: int | None = None) -> None:
        items = []
        for name in names:
            item = api_pb2.FunctionGetInputsItem(input_id=name, function_call_id="fc-1", retry_count=retry_count)
            item.input.final_input = final and name == names[-1]
            items.append(item.SerializeToString())
        seq = self.of(WantInputs)[-1].seq if seq is None else seq
        held = tuple(HeldInput(name, retry_count) for name in names)
        self.inputs.assigned(AssignInputs("ta-1", seq, held, tuple(items)))

    async def run(self, *names: str, max_items: int = 0) -> None:
        """The container gets these inputs."""
        asked = self.ask(max_items)
        await settle()
        self.assign(*names)
        assert [item.input_id for item in (await asked).inputs] == list(names)

    def outputs(self) -> list[tuple[str, int, int]]:
        """(input id, retry count, status) of all outputs sent."""
        items = [api_pb2.FunctionPutOutputsItem.FromString(raw) for event in self.of(Outputs) for raw in event.items]
        return [(item.input_id, item.retry_count, item.result.status) for item in items]

    def returned(self) -> list[str]:
        return [held.input_id for event in self.of(ReturnInputs) for held in event.held]


def test_a_container_gets_what_is_assigned_to_its_request():
    async def scenario():
        worker = Worker()
        asked = worker.ask()
        await settle()
        assert worker.num_firsts == 1
        assert worker.of(WantInputs) == [WantInputs("ta-1", 1, 1, 10)]
        worker.assign("in-a")
        assert [item.input_id for item in (await asked).inputs] == ["in-a"]
        assert worker.inputs.held() == (HeldInput("in-a", 0),)
        assert worker.inputs.current() == ("in-a", "fc-1")
        await worker.put(("in-a", 0, SUCCESS))
        assert worker.was_current == ("in-a", "fc-1")  # what it wrote belongs to this input
        assert worker.outputs() == [("in-a", 0, SUCCESS)]
        assert worker.inputs.held() == (HeldInput("in-a", 0),)  # nobody else may run it before its output is stored
        worker.inputs.acknowledged(1)
        assert worker.inputs.held() == ()
        assert not worker.inputs.has_unstored

    virtually(scenario())


def test_a_request_that_is_repeated_gets_the_same_inputs():
    async def scenario():
        worker = Worker()
        first = worker.ask(key="k")
        await settle()
        worker.assign("in-a")
        reply = await first
        assert await worker.ask(key="k") == reply
        assert len(worker.of(WantInputs)) == 1

    virtually(scenario())


def test_a_container_that_waits_in_vain_asks_again_without_a_second_want():
    async def scenario():
        worker = Worker()
        assert not (await worker.ask()).inputs  # the hold is over
        again = worker.ask()
        await settle()
        worker.assign("in-a")
        assert [item.input_id for item in (await again).inputs] == ["in-a"]
        assert len(worker.of(WantInputs)) == 1

    virtually(scenario())


def test_inputs_assigned_ahead_are_handed_out_one_by_one_and_go_back_when_it_takes_long():
    async def scenario():
        worker = Worker()
        asked = worker.ask()
        await settle()
        worker.assign("in-a", "in-b", "in-c")
        await asked
        await worker.put(("in-a", 0, SUCCESS))
        assert [item.input_id for item in (await worker.ask()).inputs] == ["in-b"]
        assert worker.returned() == []
        await asyncio.sleep(1)
        assert worker.returned() == ["in-c"]
        assert worker.inputs.num_given == 2

    virtually(scenario())


def test_an_answer_to_a_request_that_is_over_goes_back():
    async def scenario():
        worker = Worker()
        worker.ask()
        await settle()
        worker.assign("in-a", seq=7)
        assert worker.returned() == ["in-a"]

    virtually(scenario())


def test_a_draining_container_hands_back_what_it_has_not_begun_and_gets_the_kill_switch():
    async def scenario():
        worker = Worker()
        asked = worker.ask()
        await settle()
        worker.assign("in-a", "in-b")
        await asked
        worker.inputs.drain()
        assert worker.returned() == ["in-b"]
        assert worker.inputs.is_busy
        await worker.put(("in-a", 0, SUCCESS))
        assert worker.num_lasts == 0  # it has not been told yet
        assert (await worker.ask()).inputs[0].kill_switch
        assert worker.num_lasts == 1

    virtually(scenario())


def test_a_request_that_is_open_when_draining_begins_gets_the_kill_switch_and_late_inputs_go_back():
    async def scenario():
        worker = Worker()
        asked = worker.ask()
        await settle()
        seq = worker.of(WantInputs)[-1].seq
        worker.inputs.drain()
        assert (await asked).inputs[0].kill_switch
        worker.assign("in-a", seq=seq)  # was on its way
        assert worker.returned() == ["in-a"]
        assert worker.inputs.want is None

    virtually(scenario())


def test_the_final_input_of_a_container_ends_it_when_its_output_is_there():
    async def scenario():
        worker = Worker()
        asked = worker.ask()
        await settle()
        worker.assign("in-a", final=True)
        await asked
        assert worker.num_lasts == 0
        await worker.put(("in-a", 0, SUCCESS))
        assert worker.num_lasts == 1

    virtually(scenario())


def test_the_worker_publishes_a_timeout_and_makes_the_container_let_go():
    async def scenario():
        worker = Worker(timeout_s=5)
        await worker.run("in-a")
        assert await worker.heartbeat() == ["in-a"]
        assert worker.outputs() == [("in-a", 0, TIMEOUT)]
        await worker.put(("in-a", 0, TERMINATED))  # the SDK's own word on it comes too late
        assert worker.outputs() == [("in-a", 0, TIMEOUT)]
        assert not worker.inputs.is_letting_go
        await asyncio.sleep(60)
        assert worker.stuck == []

    virtually(scenario())


def test_a_container_that_does_not_let_go_is_stuck():
    async def scenario():
        worker = Worker(timeout_s=5)
        await worker.run("in-a")
        await asyncio.sleep(5 + container_inputs.CANCEL_GRACE_S + 1)
        assert len(worker.stuck) == 1
        assert "timeout of 5 s" in worker.stuck[0]

    virtually(scenario())


def test_the_container_is_told_of_a_cancellation_until_it_lets_go():
    async def scenario():
        worker = Worker()
        await worker.run("in-a")
        worker.inputs.cancel(("in-a",))
        assert worker.inputs.held() == ()
        assert await worker.heartbeat() == ["in-a"]
        assert await worker.heartbeat() == ["in-a"]  # it had not begun the input when it was told first
        await worker.put(("in-a", 0, TERMINATED))
        assert worker.outputs() == []
        assert await worker.heartbeat() == []

    virtually(scenario())


def test_a_heartbeat_is_answered_in_the_time_that_the_sdk_gives_it():
    async def scenario():
        loop = asyncio.get_running_loop()
        at = loop.time()
        assert await Worker().heartbeat() == []
        assert 13 < loop.time() - at < 15

    virtually(scenario())


def test_a_cancelled_input_that_waits_in_the_worker_is_never_handed_out():
    async def scenario():
        worker = Worker()
        asked = worker.ask()
        await settle()
        worker.assign("in-a", "in-b", "in-c")
        await asked
        worker.inputs.cancel(("in-b",))
        await worker.put(("in-a", 0, SUCCESS))
        assert [item.input_id for item in (await worker.ask()).inputs] == ["in-c"]

    virtually(scenario())


def test_the_neighbours_of_a_cancelled_input_in_its_batch_are_given_back():
    async def scenario():
        worker = Worker()
        await worker.run("in-a", "in-b", "in-c", max_items=3)
        worker.inputs.cancel(("in-b",))
        await worker.put(("in-a", 0, TERMINATED), ("in-b", 0, TERMINATED), ("in-c", 0, TERMINATED))
        assert worker.outputs() == []
        assert worker.returned() == ["in-a", "in-c"]

    virtually(scenario())


def test_an_input_that_ends_itself_by_cancellation_has_that_output():
    async def scenario():
        worker = Worker()
        await worker.run("in-a")
        await worker.put(("in-a", 0, TERMINATED))
        assert worker.outputs() == [("in-a", 0, TERMINATED)]

    virtually(scenario())


def test_the_output_of_an_earlier_attempt_is_not_taken_for_the_later_ones():
    async def scenario():
        worker = Worker(timeout_s=5)
        await worker.run("in-a")
        await asyncio.sleep(5.5)
        asked = worker.ask()
        await settle()
        worker.assign("in-a", retry_count=1)
        await asked
        await worker.put(("in-a", 0, TERMINATED))
        assert worker.outputs() == [("in-a", 0, TIMEOUT)]
        await worker.put(("in-a", 1, SUCCESS))
        assert worker.outputs() == [("in-a", 0, TIMEOUT), ("in-a", 1, SUCCESS)]

    virtually(scenario())


def test_a_later_attempt_is_not_ended_in_place_of_an_earlier_one():
    async def scenario():
        worker = Worker(timeout_s=5)
        await worker.run("in-a")
        await asyncio.sleep(5.5)
        asked = worker.ask()  # a container with several inputs at a time asks although one of them hangs
        await settle()
        worker.assign("in-a", retry_count=1)
        await asked
        assert await worker.heartbeat() == []

    virtually(scenario())


def test_containers_wait_while_the_server_stores_too_much():
    async def scenario():
        worker = Worker()
        await worker.run("in-a")
        item = api_pb2.FunctionPutOutputsItem(input_id="in-a")
        item.result.data = bytes(container_inputs.MAX_UNACKED_BYTES)
        request = api_pb2.FunctionPutOutputsRequest(outputs=[item])
        await worker.inputs.FunctionPutOutputs(request.SerializeToString(), "")
        await worker.run("in-b")
        putting = asyncio.ensure_future(worker.put(("in-b", 0, SUCCESS)))
        await settle()
        assert not putting.done()
        worker.inputs.acknowledged(1)
        await putting
        assert len(worker.outputs()) == 2

    virtually(scenario())


def test_unstored_outputs_are_repeated():
    async def scenario():
        worker = Worker()
        await worker.run("in-a")
        await worker.put(("in-a", 0, SUCCESS))
        await worker.run("in-b")
        await worker.put(("in-b", 0, SUCCESS))
        worker.inputs.acknowledged(1)
        worker.sent.clear()
        worker.inputs.repeat()
        assert worker.outputs() == [("in-b", 0, SUCCESS)]

    virtually(scenario())


def test_the_end_of_the_container_ends_what_waits():
    async def scenario():
        worker = Worker()
        asked, beating = worker.ask(), asyncio.ensure_future(worker.heartbeat())
        await settle()
        worker.inputs.close()
        assert (await asked).inputs[0].kill_switch
        assert await beating == []

    virtually(scenario())


STEPS = st.lists(
    st.sampled_from(["ask", "assign", "assign_many", "put", "cancel", "wait", "long_wait", "drain", "acknowledge"]),
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_each_assigned_input_has_one_output_or_is_given_back_or_was_cancelled(steps):
    """Whatever order things happen in, no input is put out twice, lost, or both put out and given back."""

    async def scenario():
        worker = Worker(timeout_s=30)
        assigned: list[str] = []
        cancelled: set[str] = set()
        running: list[str] = []
        asked = None

        def receive() -> None:
            nonlocal asked
            if asked is not None and asked.done():
                running.extend(item.input_id for item in asked.result().inputs if not item.kill_switch)
                asked = None

        for step in steps:
            if step == "ask" and asked is None and not running:
                asked = worker.ask()
            elif step in ("assign", "assign_many") and worker.inputs.want is not None:
                count = 1 if step == "assign" else 3
                names = [f"in-{len(assigned) + i}" for i in range(count)]
                assigned += names
                worker.assign(*names)
            elif step == "put" and running:
                await worker.put((running.pop(), 0, SUCCESS))
            elif step == "cancel" and assigned:
                name = assigned[len(assigned) // 2]
                cancelled.add(name)
                worker.inputs.cancel((name,))
            elif step == "wait":
                await asyncio.sleep(0.2)
            elif step == "long_wait":
                await asyncio.sleep(40)
            elif step == "drain":
                worker.inputs.drain()
            elif step == "acknowledge" and (sent := worker.of(Outputs)):
                worker.inputs.acknowledged(sent[-1].seq)
            await settle()
            receive()
            out, back = [name for name, *_ in worker.outputs()], worker.returned()
            assert len(out) == len(set(out))
            assert not set(out) & set(back)
            held = {report.input_id for report in worker.inputs.held()}
            assert set(assigned) <= held | set(out) | set(back) | cancelled
            assert not set(back) & held
        worker.inputs.close()
        if asked is not None:
            await asked

    virtually(scenario())
