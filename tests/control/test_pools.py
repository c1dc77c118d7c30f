import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from some_cluster import ME, Cluster, input_id, payload
from virtual_time import settle, virtually

from aeolian.control import pools as pools_module
from aeolian.domain.containers import ContainerState
from aeolian.domain.link import AssignInputs, HeldInput


def test_queued_inputs_go_to_containers_in_order():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn(3)
            first, second = cluster.container(), cluster.container()
            assert first.given() == [input_id(call, 0)]
            assert second.given() == [input_id(call, 1)]
            assert cluster.pools.get("fu-1").num_queued == 1
            assert cluster.pools.num_unfinished("fu-1") == 3

    virtually(scenario())


def test_of_two_idle_containers_the_one_used_last_works_so_that_the_other_may_end():
    async def scenario():
        async with Cluster() as cluster:
            old = cluster.container()
            await asyncio.sleep(10)
            young = cluster.container()
            await cluster.spawn()
            assert (len(old.given()), len(young.given())) == (0, 1)

    virtually(scenario())


def test_a_container_without_an_open_request_gets_nothing():
    async def scenario():
        async with Cluster() as cluster:
            container = cluster.container(wants=None)
            await cluster.spawn()
            assert container.given() == []
            container.ask()
            assert len(container.given()) == 1

    virtually(scenario())


@pytest.mark.parametrize("state", [ContainerState.STOPPING, ContainerState.EXITED])
def test_a_container_on_its_way_out_gets_nothing(state):
    async def scenario():
        async with Cluster() as cluster:
            container = cluster.container()
            container.state.move_to(state)
            await cluster.spawn()
            assert container.given() == []

    virtually(scenario())


def test_a_container_of_an_older_version_gets_nothing():
    async def scenario():
        async with Cluster() as cluster:
            container = cluster.container()
            cluster.functions.add("fu-1", revision="newer")
            await cluster.spawn()
            assert container.given() == []

    virtually(scenario())


def test_a_single_use_container_gets_one_input_that_says_it_is_the_last():
    async def scenario():
        async with Cluster() as cluster:
            cluster.functions.add("fu-1", max_inputs=1)
            call = await cluster.spawn(2)
            container = cluster.container(max_inputs=1)
            assert container.given() == [input_id(call, 0)]
            assert not container.state.takes_inputs
            await container.put()
            container.ask()
            assert len(container.given()) == 1

    virtually(scenario())


def test_short_inputs_are_assigned_ahead_and_long_ones_are_not():
    async def scenario():
        async with Cluster() as cluster:
            await cluster.spawn(40)
            container = cluster.container()
            assert len(container.given()) == 1
            await container.put(duration_s=0.001)
            container.ask()
            assert len(container.given()) == 1 + 1 + pools_module.AHEAD_MAX
            held = [HeldInput(name, 0) for name in container.holds[1:]]
            cluster.pools.take_back(container.state, held, cluster.calls.unfinished_input)
            await container.put(duration_s=1.0)
            container.ask()
            assert len(container.holds) == 1

    virtually(scenario())


def test_what_is_taken_back_goes_to_the_head_of_the_queue_in_order():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn(5)
            container = cluster.container(wants=3)
            assert len(container.holds) == 3
            held = [HeldInput(name, 0) for name in container.holds[1:]]
            cluster.pools.take_back(container.state, held, cluster.calls.unfinished_input)
            other = cluster.container(wants=4)
            assert other.given() == [input_id(call, idx) for idx in (1, 2, 3, 4)]

    virtually(scenario())


def test_a_return_that_comes_too_late_changes_nothing():
    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn()
            first = cluster.container()
            cluster.calls.container_lost(first.lose(), None, "")
            second = cluster.container()
            held = [HeldInput(input_id(call), 0), HeldInput("in-nobody:0", 0)]
            cluster.pools.take_back(first.state, held, cluster.calls.unfinished_input)
            assert second.holds == [input_id(call)]
            assert cluster.pools.get("fu-1").num_queued == 0

    virtually(scenario())


def test_a_batch_is_given_when_it_is_full():
    async def scenario():
        async with Cluster() as cluster:
            cluster.functions.add("fu-1", batch_max_size=3, batch_linger_ms=10_000)
            container = cluster.container(wants=None)
            container.ask(3, 10_000)
            call = await cluster.spawn(2)
            assert container.given() == []
            await cluster.calls.put_inputs("fu-1", call.call_id, ME, [(2, payload(2)), (3, payload(3))])
            assert container.given() == [input_id(call, idx) for idx in (0, 1, 2)]

    virtually(scenario())


def test_a_batch_that_does_not_fill_is_given_after_its_linger():
    async def scenario():
        async with Cluster() as cluster:
            cluster.functions.add("fu-1", batch_max_size=3, batch_linger_ms=500)
            container = cluster.container(wants=None)
            container.ask(3, 500)
            await cluster.spawn(2)
            await asyncio.sleep(0.45)
            assert container.given() == []
            await asyncio.sleep(0.1)
            assert len(container.given()) == 2

    virtually(scenario())


def test_payloads_that_memory_does_not_hold_are_read_before_they_are_sent(monkeypatch):
    monkeypatch.setattr("aeolian.control.open_inputs.PAYLOAD_BUDGET_BYTES", 20)

    async def scenario():
        async with Cluster() as cluster:
            await cluster.spawn(4)
            for _ in range(4):
                cluster.container()
            await settle()
            items = [item for command in cluster.of(AssignInputs) for item in command.items]
            assert len(items) == 4
            assert all(b"input %d" % number in b"".join(items) for number in range(4))

    virtually(scenario())


def test_an_input_that_is_cancelled_while_its_payload_is_read_is_not_sent(monkeypatch):
    monkeypatch.setattr("aeolian.control.open_inputs.PAYLOAD_BUDGET_BYTES", 0)

    async def scenario():
        async with Cluster() as cluster:
            call = await cluster.spawn(2)
            container = cluster.container()
            assert container.holds == [input_id(call, 0)]
            await cluster.calls.cancel(call.call_id, ME, terminate=False)
            await settle()
            assert container.given() == []
            call = await cluster.spawn()
            await settle()
            assert container.given() == [input_id(call)]  # its request is still open

    virtually(scenario())


def test_a_container_that_waits_for_another_is_blocked_as_long_as_it_waits():
    async def scenario():
        async with Cluster() as cluster:
            cluster.functions.add("fu-2")
            await cluster.remote()
            parent = cluster.container()
            child = await cluster.remote(function_id="fu-2", caller=parent.caller, parent=parent.holds[0])
            assert not parent.state.is_blocked
            polling = asyncio.ensure_future(
                cluster.calls.get_outputs(child.call_id, parent.caller, timeout_s=50, between=(0, 0))
            )
            await settle()
            assert parent.state.is_blocked
            assert "fu-2" in cluster.pools.unsettled
            await cluster.container("fu-2").put()
            assert len((await polling).outputs) == 1
            assert not parent.state.is_blocked

    virtually(scenario())


def test_a_container_with_other_inputs_in_hand_is_not_blocked_by_one_that_waits():
    async def scenario():
        async with Cluster() as cluster:
            cluster.functions.add("fu-1", max_concurrent_inputs=2, target_concurrent_inputs=2)
            call = await cluster.spawn(2)
            container = cluster.container()
            container.ask()
            assert len(container.holds) == 2
            with cluster.pools.waiting("fu-1", container.task_id):
                assert not container.state.is_blocked
                await container.put(input_id(call, 0))
                assert container.state.is_blocked

    virtually(scenario())


def test_a_function_that_calls_itself_runs_its_deepest_calls_first():
    async def scenario():
        async with Cluster() as cluster:
            top = await cluster.spawn(2)
            container = cluster.container()
            deeper = await cluster.remote(2, caller=container.caller, parent=container.holds[0])
            other = cluster.container(wants=3)
            assert other.given() == [input_id(deeper, 0), input_id(deeper, 1), input_id(top, 1)]

    virtually(scenario())


def test_an_idle_container_is_known_since_when():
    async def scenario():
        async with Cluster() as cluster:
            container = cluster.container()
            since = container.state.idle_since
            assert since
            await asyncio.sleep(5)
            container.ask()  # the SDK asks again now and then
            assert container.state.idle_since == since
            await cluster.spawn()
            assert container.state.idle_since == 0
            await container.put()
            container.ask()
            assert container.state.idle_since > since

    virtually(scenario())


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["spawn", "container", "ask", "put", "lose", "stop", "cancel", "take_back"]), st.integers(0, 8)
    ),
    max_size=50,
)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_what_is_queued_and_held_is_always_what_is_unfinished(steps):
    async def scenario():
        async with Cluster() as cluster:
            calls, containers = [], []
            for step, number in steps:
                container = containers[number % len(containers)] if containers else None
                if step == "spawn":
                    calls.append(await cluster.spawn(number))
                elif step == "container":
                    containers.append(cluster.container(wants=number % 3 + 1))
                elif container is None:
                    continue
                elif step == "ask":
                    container.ask(number + 1)
                elif step == "put" and container.holds:
                    await container.put(duration_s=0.001 if number % 2 else 1.0)
                elif step == "lose":
                    containers.remove(container)
                    cluster.calls.container_lost(container.lose(), None, "")
                elif step == "stop":
                    container.state.move_to(ContainerState.STOPPING)
                elif step == "cancel" and calls:
                    await cluster.calls.cancel(calls[number % len(calls)].call_id, ME, terminate=False)
                elif step == "take_back":
                    held = [HeldInput(item.input_id, item.retry_count) for item in container.state.held.values()]
                    cluster.pools.take_back(container.state, held, cluster.calls.unfinished_input)
                await settle()
                pool = cluster.pools.get("fu-1")
                queued = [item.input_id for item in pool.queue if item.is_queued] if pool else []
                held = [name for container in containers for name in container.holds]
                unfinished = {item.input_id for call in calls for item in call.inputs.values()}
                # Those that no longer lost their containers too often are in one place each.
                assert len(queued) + len(held) == len(set(queued) | set(held))
                assert set(queued) | set(held) == unfinished
                assert not pool or pool.num_queued == len(queued)

    virtually(scenario())
