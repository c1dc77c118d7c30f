import asyncio

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from modal_proto import api_pb2
from some_cluster import (
    FAILURE,
    ME,
    STRANGER,
    SUCCESS,
    TERMINATED,
    TIMEOUT,
    Cluster,
    input_id,
    payload,
)
from virtual_time import settle, virtually

from aeolian.control import call_memory, call_outputs
from aeolian.control import calls as calls_module
from aeolian.domain.calls import MAX_CRASHES, MAX_LOSSES, CallType, Invocation
from aeolian.domain.containers import ExitStatus
from aeolian.domain.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfSpace,
    PayloadTooLarge,
    Unavailable,
)
from aeolian.domain.functions import RetryPolicy
from aeolian.domain.link import HeldInput
from aeolian.storage import calls as storage


def test_a_call_runs_in_a_container_and_its_output_can_be_read_again_and_again():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn()
            assert await cluster.outputs(call) == []
            container = cluster.container()
            assert container.given() == [input_id(call)]
            await container.put(data=b"42")
            for _ in range(2):
                [item] = await cluster.outputs(call, between=(0, 0))
                assert (item.idx, item.input_id, item.result.data) == (0, input_id(call), b"42")

    virtually(scenario())


def test_who_waits_is_woken_by_the_output():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.remote(), cluster.container()
            loop = asyncio.get_running_loop()
            waiting, at = asyncio.ensure_future(cluster.outputs(call, timeout_s=50, between=(0, 0))), loop.time()
            await settle()
            assert not waiting.done()
            await container.put()
            assert len(await waiting) == 1
            assert loop.time() == at

    virtually(scenario())


def test_an_output_on_its_way_to_the_database_is_one_to_come():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.spawn(), cluster.container()
            message = api_pb2.FunctionPutOutputsItem(input_id=input_id(call), result={"status": SUCCESS})
            cluster.calls.output_received(container.task_id, message, lambda: None)
            page = await cluster.calls.get_outputs(call.call_id, ME, timeout_s=0.0, between=(0, 0))
            assert (page.outputs, page.num_unfinished) == ([], 1)
            assert await cluster.statuses(call, timeout_s=1.0, between=(0, 0)) == [SUCCESS]

    virtually(scenario())


def test_an_output_that_is_stored_while_somebody_looks_for_it_is_found():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.spawn(), cluster.container()
            call.skip_seqs(1)  # as after a restart: what is stored is read
            read = cluster.database.read

            async def read_slowly(fn):
                rows = await read(fn)
                await settle()  # meanwhile it is committed
                return rows

            cluster.database.read = read_slowly
            message = api_pb2.FunctionPutOutputsItem(input_id=input_id(call), result={"status": SUCCESS})
            cluster.calls.output_received(container.task_id, message, lambda: None)
            assert await cluster.statuses(call, timeout_s=0.0, between=(0, 0)) == [SUCCESS]

    virtually(scenario())


def test_a_poll_without_an_output_ends_at_its_time():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.remote()
            loop = asyncio.get_running_loop()
            at = loop.time()
            assert await cluster.outputs(call, timeout_s=50, between=(0, 0)) == []
            assert loop.time() - at == pytest.approx(50)

    virtually(scenario())


def test_outputs_of_a_map_come_in_the_order_of_finishing_from_a_cursor():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.remote(5)
            containers = [cluster.container() for _ in range(5)]
            for number in (3, 0, 4):
                await containers[number].put()
            assert [item.idx for item in await cluster.outputs(call)] == [3, 0, 4]
            for number in (1, 2):
                await containers[number].put()
            assert [item.idx for item in await cluster.outputs(call, after_seq=3)] == [1, 2]
            assert [item.idx for item in await cluster.outputs(call, between=(0, 4))] == [0, 1, 2, 3, 4]
            assert [item.idx for item in await cluster.outputs(call, between=(0, 4), max_outputs=2)] == [0, 1]

    virtually(scenario())


def test_what_memory_has_let_go_of_is_read_from_the_database(monkeypatch):
    monkeypatch.setattr("aeolian.control.call_state.MAX_RECENT_OUTPUTS", 2)

    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn(6)
            for number in range(6):
                cluster.container()
                await cluster.container(wants=None).put(input_id(call, number))
            assert [item.idx for item in await cluster.outputs(call)] == list(range(6))
            assert [item.idx for item in await cluster.outputs(call, between=(1, 2))] == [1, 2]

    virtually(scenario())


def test_a_reply_is_never_larger_than_a_message_may_be(monkeypatch):
    monkeypatch.setattr(call_outputs, "MAX_REPLY_BYTES", 1000)
    monkeypatch.setattr("aeolian.control.call_state.MAX_RECENT_BYTES", 1000)

    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn(4)
            for number in range(4):
                await cluster.container(wants=None).put(input_id(call, number), data=bytes(400))
            seen, seq = [], 0
            while len(seen) < 4:
                page = await cluster.calls.get_outputs(call.call_id, ME, timeout_s=0, after_seq=seq)
                assert 1 <= len(page.outputs) <= 2
                seen += [output.idx for output in page.outputs]
                seq = page.last_seq
            assert seen == [0, 1, 2, 3]

    virtually(scenario())


def test_the_first_output_of_an_input_is_its_only_one():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.remote(), cluster.container()
            late = cluster.container()
            await container.put(data=b"first")
            await late.put(input_id(call), data=b"second")
            assert [item.result.data for item in await cluster.outputs(call)] == [b"first"]

    virtually(scenario())


def test_an_output_from_a_container_that_was_given_up_counts_and_its_successor_is_stopped():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.remote()
            first = cluster.container()
            cluster.calls.container_lost(first.lose(), None, "its worker went away")
            second = cluster.container()
            assert second.holds == [input_id(call)]
            await first.put(input_id(call), data=b"late")
            assert [item.result.data for item in await cluster.outputs(call)] == [b"late"]
            assert second.told_to_cancel() == [input_id(call)]
            assert second.holds == []

    virtually(scenario())


@pytest.mark.parametrize("is_just_started", [True, False])
def test_a_call_whose_commit_was_done_but_not_answered_is_carried_out_once_when_it_is_repeated(is_just_started):
    async def scenario():
        async with Cluster() as cluster:
            await asyncio.sleep(0 if is_just_started else 10_000)
            caller = msgspec.structs.replace(ME, idempotency_key="the same")
            cluster.database.lost_answers.append(Unavailable("the connection broke"))
            with pytest.raises(Unavailable):
                await cluster.spawn(caller=caller)
            call = await cluster.spawn(caller=caller)
            container = cluster.container(wants=5)
            assert container.given() == [input_id(call)]
            await container.put()
            assert await cluster.statuses(call) == [SUCCESS]
            assert await cluster.database.read(storage.unfinished_inputs) == []

    virtually(scenario())


def test_inputs_of_a_map_whose_commit_was_not_answered_can_be_sent_again():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.remote(1)
            cluster.database.lost_answers.append(Unavailable("the connection broke"))
            more = [(idx, payload(idx)) for idx in (1, 2)]
            with pytest.raises(Unavailable):
                await cluster.calls.put_inputs("fu-1", call.call_id, ME, more)
            await cluster.calls.put_inputs("fu-1", call.call_id, ME, more)
            for _ in range(3):
                await cluster.container().put()
            assert await cluster.statuses(call) == [SUCCESS] * 3

    virtually(scenario())


# ---- retries ------------------------------------------------------------------------------------------------


def test_a_client_that_retries_sees_no_stale_output():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.remote(), cluster.container()
            await container.put(status=FAILURE)
            assert await cluster.statuses(call, between=(0, 0)) == [FAILURE]
            answers = await cluster.calls.retry_inputs(call.call_id, ME, [(0, payload(0), 0)])
            assert answers == [(0, 1)]
            assert await cluster.statuses(call, between=(0, 0)) == []
            container.ask()
            await container.put(status=FAILURE, retry_count=0)  # of the first attempt, once more
            assert await cluster.statuses(call, between=(0, 0)) == []
            await container.put(retry_count=1)
            assert await cluster.statuses(call, between=(0, 0)) == [SUCCESS]

    virtually(scenario())


def test_a_retry_that_is_repeated_changes_nothing():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.remote(2), cluster.container()
            await container.put(status=FAILURE)
            for _ in range(2):
                assert await cluster.calls.retry_inputs(call.call_id, ME, [(0, payload(0), 1)]) == [(0, 1)]
            container.ask()
            await container.put(input_id(call, 1))
            container.ask()
            await container.put(retry_count=1)
            assert await cluster.calls.retry_inputs(call.call_id, ME, [(0, payload(0), 1)]) == [(0, 1)]
            assert sorted(await cluster.statuses(call)) == [SUCCESS, SUCCESS]

    virtually(scenario())


def test_a_spawned_call_is_retried_by_the_server_after_its_delays():
    async def scenario():
        async with Cluster() as cluster:
            policy = RetryPolicy(max_retries=2, initial_delay_ms=3000, backoff_coefficient=2.0)
            function_id = cluster.functions.add("fu-retried", retry_policy=policy)
            call, container = await cluster.spawn(function_id=function_id), cluster.container(function_id)
            for retry_count, delay_s in ((0, 3), (1, 6)):
                await container.put(status=(FAILURE, TIMEOUT)[retry_count], retry_count=retry_count)
                container.ask()
                await asyncio.sleep(delay_s - 0.1)
                assert container.holds == []
                await asyncio.sleep(0.2)
                assert container.holds == [input_id(call)]
            await container.put(status=FAILURE, retry_count=2)
            assert await cluster.statuses(call) == [FAILURE]

    virtually(scenario())


def test_a_waiting_retry_survives_a_restart_and_keeps_its_time():
    async def scenario():
        async with Cluster() as cluster:
            policy = RetryPolicy(max_retries=2, initial_delay_ms=10_000)
            function_id = cluster.functions.add("fu-1", retry_policy=policy)
            call = await cluster.spawn()
            await cluster.container(function_id).put(status=FAILURE)
            engine = cluster.database.engine
        async with Cluster(engine) as cluster:
            assert [(item.input_id, item.retry_count) for item in cluster.recovered] == [(input_id(call), 1)]
            cluster.calls.enqueue_when_due(cluster.recovered)
            container = cluster.container()
            await asyncio.sleep(8)
            assert container.given() == []
            await asyncio.sleep(3)
            assert container.given() == [input_id(call)]

    virtually(scenario())


def test_a_lost_container_uses_up_no_retry():
    async def scenario():
        async with Cluster() as cluster:
            function_id = cluster.functions.add("fu-1", retry_policy=RetryPolicy(max_retries=0))
            call = await cluster.spawn(function_id=function_id)
            for _ in range(MAX_LOSSES - 1):
                container = cluster.container()
                cluster.calls.container_lost(container.lose(), ExitStatus(exit_code=-9), "it was killed")
            container = cluster.container()
            assert container.holds == [input_id(call)]
            await container.put(retry_count=0)
            assert await cluster.statuses(call) == [SUCCESS]

    virtually(scenario())


@pytest.mark.parametrize("exit", [ExitStatus(exit_code=7), ExitStatus(exit_code=0), ExitStatus(exit_code=-11)])
def test_an_input_whose_containers_end_themselves_fails_and_says_so(exit):
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.remote()
            for _ in range(MAX_CRASHES):
                cluster.calls.container_lost(cluster.container().lose(), exit, "container ta-1 ended by itself")
            await settle()
            [item] = await cluster.outputs(call)
            assert item.result.status == FAILURE
            assert item.result.exception == "container ta-1 ended by itself"

    virtually(scenario())


def test_inputs_of_a_lost_container_are_the_next_to_run():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.remote(3), cluster.container()
            cluster.calls.container_lost(container.lose(), None, "")
            assert cluster.container().given() == [input_id(call, 0)]

    virtually(scenario())


# ---- cancellation -------------------------------------------------------------------------------------------


def test_a_cancelled_call_has_an_output_for_each_input_and_frees_its_containers():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.spawn(3), cluster.container()
            await container.put()
            container.ask()
            await cluster.calls.cancel(call.call_id, ME, terminate=False)
            assert await cluster.statuses(call, between=(0, 2)) == [SUCCESS, TERMINATED, TERMINATED]
            assert container.told_to_cancel() == [input_id(call, 1)]
            assert container.holds == []
            container.ask()
            assert container.given() == [input_id(call, 0), input_id(call, 1)]
            with pytest.raises(FailedPrecondition):
                await cluster.calls.put_inputs("fu-1", call.call_id, ME, [(3, payload(3))])

    virtually(scenario())


def test_a_large_call_is_cancelled_piece_by_piece_and_nothing_of_it_runs_meanwhile(monkeypatch):
    monkeypatch.setattr(calls_module, "SLICE", 3)

    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn(20)
            other = await cluster.spawn()
            await cluster.calls.cancel(call.call_id, ME, terminate=False)
            container = cluster.container()
            assert container.given() == [input_id(other)]
            await settle()
            assert await cluster.statuses(call, timeout_s=10, between=(0, 30)) == [TERMINATED] * 20
            assert cluster.pools.num_unfinished("fu-1") == 1

    virtually(scenario())


def test_a_cancellation_that_a_restart_cut_short_is_completed(monkeypatch):
    monkeypatch.setattr(calls_module, "SLICE", 3)

    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn(20)
            cancelling = asyncio.ensure_future(cluster.calls.cancel(call.call_id, ME, terminate=False))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            engine = cluster.database.engine
        await asyncio.gather(cancelling, return_exceptions=True)
        async with Cluster(engine) as cluster:
            await settle()
            cluster.calls.enqueue_when_due([item for item in cluster.recovered if not item.finished])
            assert cluster.container().given() == []
            await asyncio.sleep(1)
            assert await cluster.statuses(call, between=(0, 30)) == [TERMINATED] * 20

    virtually(scenario())


def test_cancellation_reaches_what_was_called_and_is_waited_for():
    async def scenario():
        async with Cluster() as cluster:
            cluster.functions.add("fu-2")
            top, container = await cluster.spawn(), cluster.container()
            kwargs = {"function_id": "fu-2", "caller": container.caller, "parent": input_id(top)}
            waited_for, forgotten = await cluster.remote(**kwargs), await cluster.spawn(**kwargs)
            await cluster.calls.cancel(top.call_id, ME, terminate=False)
            assert await cluster.statuses(waited_for) == [TERMINATED]
            assert await cluster.statuses(forgotten) == []

    virtually(scenario())


@pytest.mark.parametrize("how", ["timeout", "loss"])
def test_what_an_abandoned_attempt_called_is_cancelled(how):
    async def scenario():
        async with Cluster() as cluster:
            cluster.functions.add("fu-2")
            top, container = await cluster.remote(2), cluster.container()
            other = cluster.container()
            kwargs = {"function_id": "fu-2", "caller": container.caller}
            its = await cluster.remote(**kwargs, parent=container.holds[0])
            others = await cluster.remote(**kwargs, parent=other.holds[0])
            if how == "timeout":
                await container.put(status=TIMEOUT)
            else:
                cluster.calls.container_lost(container.lose(), None, "")
                await settle()
            assert await cluster.statuses(its) == [TERMINATED]
            assert await cluster.statuses(others) == []
            assert top.num_unfinished

    virtually(scenario())


def test_a_map_that_its_caller_leaves_is_cancelled():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.remote(3), cluster.container()
            await cluster.outputs(call, clear=True)
            assert container.told_to_cancel() == [input_id(call)]
            assert cluster.pools.num_unfinished("fu-1") == 0

    virtually(scenario())


def test_a_map_of_a_detached_app_goes_on_without_its_caller():
    async def scenario():
        async with Cluster() as cluster:
            cluster.app.outlives_its_client = True
            call, container = await cluster.remote(3), cluster.container()
            await cluster.outputs(call, clear=True)
            assert container.told_to_cancel() == []
            for _ in range(3):
                await container.put()
                container.ask()
            assert await cluster.statuses(call) == [SUCCESS] * 3

    virtually(scenario())


def test_only_the_own_workspace_sees_a_call():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn()
            with pytest.raises(NotFound, match="never made, or its outputs have expired"):
                await cluster.calls.open(call.call_id, STRANGER)
            with pytest.raises(NotFound):
                await cluster.calls.cancel(call.call_id, STRANGER, terminate=True)

    virtually(scenario())


# ---- storage ------------------------------------------------------------------------------------------------


def test_everything_acknowledged_is_there_after_a_restart():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.spawn(4), cluster.container()
            await container.put(data=b"kept")
            engine = cluster.database.engine
        async with Cluster(engine) as cluster:
            assert [item.idx for item in cluster.recovered] == [1, 2, 3]
            cluster.calls.enqueue_when_due(cluster.recovered)
            [item] = await cluster.outputs(call)
            assert item.result.data == b"kept"
            for _ in range(3):
                container = cluster.container()
                await settle()  # its payload is read from the database
                await container.put()
            assert [item.idx for item in await cluster.outputs(call, between=(0, 3))] == [0, 1, 2, 3]
            assert (await cluster.calls.open(call.call_id, ME)).num_inputs == 4

    virtually(scenario())


def test_a_cursor_from_before_a_restart_misses_no_output_of_a_retry():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.remote(2)
            await cluster.container().put()
            await cluster.container().put(status=FAILURE)
            assert [item.idx for item in await cluster.outputs(call)] == [0, 1]
            await cluster.calls.retry_inputs(call.call_id, ME, [(1, payload(1), 1)])
            engine = cluster.database.engine
        async with Cluster(engine) as cluster:
            cluster.calls.enqueue_when_due(cluster.recovered)
            container = cluster.container()
            await settle()  # its payload is read from the database
            await container.put(retry_count=1)
            assert [item.idx for item in await cluster.outputs(call, after_seq=2)] == [1]

    virtually(scenario())


def test_a_repeated_request_makes_no_second_call_even_after_a_restart():
    async def scenario():
        caller = msgspec.structs.replace(ME, idempotency_key="once")
        async with Cluster() as cluster:
            call = await cluster.spawn(caller=caller)
            assert await cluster.spawn(caller=caller) is call
            engine = cluster.database.engine
        async with Cluster(engine) as cluster:
            assert (await cluster.spawn(caller=caller)).call_id == call.call_id
            assert len(cluster.recovered) == 1

    virtually(scenario())


def test_a_retry_that_is_repeated_after_a_restart_is_none_although_it_has_failed_meanwhile():
    async def scenario():
        caller = msgspec.structs.replace(ME, idempotency_key="once")
        async with Cluster() as cluster:
            call = await cluster.remote()
            await cluster.container().put(status=FAILURE)
            first = await cluster.calls.retry_inputs(call.call_id, caller, [(0, payload(0), 0)])
            await cluster.container().put(status=FAILURE, retry_count=1)
            engine = cluster.database.engine
        async with Cluster(engine) as cluster:
            assert await cluster.calls.retry_inputs(call.call_id, caller, [(0, payload(0), 0)]) == first
            assert await cluster.statuses(call, between=(0, 0)) == [FAILURE]

    virtually(scenario())


def test_inputs_that_come_twice_run_once():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn(2)
            await cluster.calls.put_inputs("fu-1", call.call_id, ME, [(1, payload(1)), (2, payload(2))])
            assert call.num_inputs == 3
            assert cluster.pools.get("fu-1").num_queued == 3

    virtually(scenario())


def test_a_call_that_cannot_be_stored_is_refused_and_leaves_nothing():
    async def scenario():
        async with Cluster() as cluster:
            container = cluster.container()
            cluster.database.failures = [OutOfSpace("full")]
            with pytest.raises(OutOfSpace):
                await cluster.spawn(2)
            assert cluster.pools.num_unfinished("fu-1") == 0
            assert container.told_to_cancel() == container.given()  # it had begun already
            container.ask()
            call = await cluster.spawn()
            await container.put()
            assert await cluster.statuses(call) == [SUCCESS]

    virtually(scenario())


def test_an_output_that_cannot_be_stored_is_shown_when_it_can():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.spawn(), cluster.container()
            cluster.database.failures = [OutOfSpace("full")] * 3
            stored = []
            message = api_pb2.FunctionPutOutputsItem(input_id=input_id(call), result={"status": SUCCESS})
            cluster.calls.output_received(container.task_id, message, lambda: stored.append(True))
            await settle()
            assert (stored, await cluster.statuses(call)) == ([], [])
            assert await cluster.statuses(call, timeout_s=30) == [SUCCESS]
            assert stored == [True]

    virtually(scenario())


def test_a_retry_that_cannot_be_stored_waits_until_it_can():
    async def scenario():
        async with Cluster() as cluster:
            call, container = await cluster.remote(), cluster.container()
            await container.put(status=FAILURE)
            cluster.database.failures = [OutOfSpace("full")] * 2
            await cluster.calls.retry_inputs(call.call_id, ME, [(0, payload(0), 0)])
            assert not cluster.database.failures
            engine = cluster.database.engine
        async with Cluster(engine) as cluster:
            assert [item.retry_count for item in cluster.recovered] == [1]

    virtually(scenario())


def test_a_flush_ends_although_more_and_more_is_written():
    async def scenario():
        async with Cluster() as cluster:
            go_on = True

            async def keep_writing():
                while go_on:
                    await cluster.spawn()

            writing = asyncio.ensure_future(keep_writing())
            await settle()
            await cluster.calls.flush()
            go_on = False
            await writing

    virtually(scenario())


def test_finished_calls_leave_memory_and_come_back_when_asked_for(monkeypatch):
    monkeypatch.setattr(call_memory, "EXPIRY_ASYNC_S", 600.0)

    async def scenario():
        async with Cluster() as cluster:
            await cluster.calls.start_sweeping()
            call = await cluster.spawn()
            await cluster.container().put(data=b"kept")
            assert cluster.calls.living(call.call_id) is call
            await asyncio.sleep(call_memory.KEEP_S + 2 * call_memory.SWEEP_S)
            assert cluster.calls.living(call.call_id) is None
            assert [item.result.data for item in await cluster.outputs(call)] == [b"kept"]
            assert (await cluster.calls.open(call.call_id, ME)).num_inputs == 1
            await asyncio.sleep(call_memory.EXPIRY_ASYNC_S + 100)
            with pytest.raises(NotFound):
                await cluster.outputs(call)

    virtually(scenario())


def test_a_call_that_finished_just_before_a_restart_expires_like_any_other():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.remote()
            await cluster.container().put()
            engine = cluster.database.engine
        async with Cluster(engine) as cluster:
            await cluster.calls.start_sweeping()
            assert await cluster.statuses(call) == [SUCCESS]
            await asyncio.sleep(call_memory.EXPIRY_SYNC_S + 200)
            with pytest.raises(NotFound):
                await cluster.calls.open(call.call_id, ME)

    virtually(scenario())


def test_of_a_map_that_is_over_only_what_became_of_it_is_kept():
    async def scenario():
        async with Cluster() as cluster:
            await cluster.calls.start_sweeping()
            call = await cluster.remote(2)
            for _ in range(2):
                await cluster.container().put(data=bytes(1000))
            await cluster.outputs(call, clear=True)
            await asyncio.sleep(call_memory.KEEP_S + 2 * call_memory.SWEEP_S)
            rows = await cluster.database.read(lambda c: storage.inputs_of_calls(c, [call.call_id]))
            assert [(row.idx, row.status) for row in rows] == [(0, SUCCESS), (1, SUCCESS)]
            num_bytes = await cluster.database.read(
                lambda c: c.scalar(sa.select(sa.func.sum(sa.func.length(storage.outputs.c.item))))
            )
            assert num_bytes == 0
            page = await cluster.calls.get_outputs(call.call_id, ME, timeout_s=50, between=(0, 0))
            assert (page.outputs, page.num_unfinished) == ([], 0)

    virtually(scenario())


def test_blobs_go_with_the_call_that_they_belong_to(monkeypatch):
    monkeypatch.setattr(call_memory, "EXPIRY_ASYNC_S", 600.0)

    async def scenario():
        deleted: list[str] = []

        async def delete(blob_id: str) -> None:
            deleted.append(blob_id)

        async with Cluster() as cluster:
            await cluster.calls.start_sweeping(delete)
            kwargs = {"call_type": CallType.UNARY, "inputs": [(0, payload(0))], "blob_ids": ["bl-in", "bl-in"]}
            await cluster.calls.start("fu-1", ME, invocation=Invocation.ASYNC, **kwargs)
            container = cluster.container()
            result = api_pb2.GenericResult(status=SUCCESS, data_blob_id="bl-out")
            message = api_pb2.FunctionPutOutputsItem(input_id=container.holds[0], result=result)
            cluster.calls.output_received(container.task_id, message, lambda: None)
            call = await cluster.remote(2)
            await cluster.calls.put_inputs("fu-1", call.call_id, ME, [(2, payload(2))], ["bl-map"])
            await cluster.outputs(call, clear=True)
            await asyncio.sleep(300)
            assert deleted == ["bl-map"]
            await asyncio.sleep(600)
            assert sorted(deleted) == ["bl-in", "bl-map", "bl-out"]

    virtually(scenario())


# ---- bad input ----------------------------------------------------------------------------------------------


def test_nonsense_is_refused():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn()
            with pytest.raises(NotFound):
                await cluster.spawn(function_id="fu-nobody")
            with pytest.raises(NotFound):
                await cluster.calls.open("fc-nobody", ME)
            with pytest.raises(InvalidArgument, match="not one of Function fu-2"):
                await cluster.calls.put_inputs("fu-2", call.call_id, ME, [])
            with pytest.raises(InvalidArgument, match="index"):
                await cluster.calls.put_inputs("fu-1", call.call_id, ME, [(-1, b"")])
            with pytest.raises(PayloadTooLarge, match="as a blob"):
                await cluster.calls.put_inputs("fu-1", call.call_id, ME, [(5, bytes(9 << 20))])
            for nonsense in ("", "in-", "in-x:y", "fc-1:0", "in-1:-1"):
                with pytest.raises(NotFound):
                    cluster.calls.unfinished_input(nonsense)
            assert call.num_inputs == 1

    virtually(scenario())


def test_a_parent_is_taken_from_containers_alone():
    async def scenario():
        async with Cluster() as cluster:
            top = await cluster.spawn()
            assert (await cluster.spawn(parent=input_id(top))).parent is None
            container = cluster.container()
            below = await cluster.spawn(parent=input_id(top), caller=container.caller)
            assert below.parent == (top.call_id, 0)
            assert (await cluster.spawn(parent="nonsense", caller=container.caller)).parent is None

    virtually(scenario())


# ---- everything at once -------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["call", "feed", "container", "put", "put_late", "fail", "lose", "retry", "cancel", "restart", "take_back"]
        ),
        st.integers(0, 10),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_every_input_ends_with_exactly_one_output(steps):
    """Whatever happens in whatever order: nothing is lost, nothing is put out twice, and the database agrees."""

    async def scenario():
        cluster = await Cluster().__aenter__()
        calls, containers = [], []
        for step, number in steps:
            holding = [container for container in containers if container.holds]
            if step == "call":
                calls.append(
                    await cluster.calls.start(
                        "fu-1",
                        ME,
                        call_type=CallType.MAP,
                        invocation=Invocation.SYNC,
                        inputs=[(idx, payload(idx)) for idx in range(number)],
                    )
                )
            elif step == "feed" and calls:
                call = calls[number % len(calls)]
                if not call.is_cancelled:
                    await cluster.calls.put_inputs("fu-1", call.call_id, ME, [(number, payload(number))])
            elif step == "container":
                containers.append(cluster.container())
            elif step in ("put", "fail") and holding:
                container = holding[number % len(holding)]
                item = next(iter(container.state.held.values()))
                await container.put(status=SUCCESS if step == "put" else FAILURE, retry_count=item.retry_count)
                container.ask()
            elif step == "put_late" and containers and calls:
                call = calls[number % len(calls)]
                await containers[number % len(containers)].put(input_id(call, number), data=b"late")
            elif step == "lose" and containers:
                container = containers.pop(number % len(containers))
                cluster.calls.container_lost(container.lose(), None, "")
            elif step == "retry" and calls:
                call = calls[number % len(calls)]
                if not call.is_cancelled and number < call.num_inputs:
                    await cluster.calls.retry_inputs(call.call_id, ME, [(number, payload(number), 0)])
            elif step == "cancel" and calls and number == 0:
                await cluster.calls.cancel(calls[-1].call_id, ME, terminate=False)
            elif step == "restart" and number < 3:
                await cluster.__aexit__()
                cluster, containers = await Cluster(cluster.database.engine).__aenter__(), []
                cluster.calls.enqueue_when_due(cluster.recovered)
                calls = [await cluster.calls.open(call.call_id, ME) for call in calls]
            elif step == "take_back" and holding:
                container = holding[0]
                held = [HeldInput(item.input_id, item.retry_count) for item in container.state.held.values()]
                cluster.pools.take_back(container.state, held, cluster.calls.unfinished_input)
            await settle()
        for _ in range(300):
            if not cluster.pools.num_unfinished("fu-1"):
                break
            container = cluster.container()
            await settle()
            for item in list(container.state.held.values()):
                await container.put(item.input_id, retry_count=item.retry_count)
            for other in containers:
                for item in list(other.state.held.values()):
                    await other.put(item.input_id, retry_count=item.retry_count)
        await cluster.calls.flush()
        left = await cluster.database.read(storage.unfinished_inputs)
        assert left == []
        for call in calls:
            assert not call.inputs
            assert call.num_finished == call.num_inputs
            rows = await cluster.database.read(lambda c, id=call.call_id: storage.output_marks(c, id))
            assert len(rows) == call.num_inputs
            seqs = [row.seq for row in rows]
            assert len(seqs) == len(set(seqs))
            if call.num_inputs:
                shown = await cluster.outputs(call, between=(0, 20))
                assert sorted(item.idx for item in shown) == sorted(row.idx for row in rows)
        await cluster.__aexit__()

    virtually(scenario())
