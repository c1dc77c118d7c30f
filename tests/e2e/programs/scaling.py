"""What users of the deployed App `scaling` see of its autoscaler."""

import time

import modal


def named(name: str) -> modal.Function:
    return modal.Function.from_name("scaling", name)


def num_runners(function: modal.Function) -> int:
    return function.get_current_stats().num_total_runners


def until(condition, what: str, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about"
        time.sleep(0.1)


def run() -> None:
    """What takes time is started first, and looked at last."""
    quick, slow, warm, buffered, shared = map(named, ("quick", "slow", "warm", "buffered", "shared"))
    many = [shared.spawn(4) for _ in range(20)]
    working = slow.spawn(6)
    with_buffer = buffered.spawn(4)
    until(lambda: num_runners(buffered) == 2, "a container in reserve")

    answers = list(quick.map(range(1000)))
    assert [x for x, _ in answers] == list(range(1000))
    print("containers for a burst:", len({task_id for _, task_id in answers}))

    until(lambda: num_runners(warm) == 1, "a container that nobody called for")
    settings = warm.autoscaler.update(min_containers=2, scaledown_window=2)
    assert (settings.min_containers, settings.scaledown_window) == (2, 2)
    until(lambda: num_runners(warm) == 2, "a higher minimum")
    warm.autoscaler.update(min_containers=0)
    assert warm.autoscaler.settings().min_containers == 0

    births = modal.Dict.from_name("scaling-births")
    modal.Cls.from_name("scaling", "Kept")().dies_later.remote()
    num_births = births.len()
    until(lambda: births.len() == num_births + 1, "another container for the one that was killed")

    model = modal.Cls.from_name("scaling", "Model")
    one, two = model(size=1), model(size=2)
    assert one.where.remote()[1] != two.where.remote()[1]
    assert one.where.remote() == one.where.remote()
    modal.Cls.from_name("scaling", "Model")(size=3).update_autoscaler(min_containers=1)
    assert model(size=3).where.remote()[0] == 3

    assert working.get().startswith("ta-")  # longer than its window
    with_buffer.get()
    most = max(call.get() for call in many)
    assert most > 2, "no container took more than its target although inputs waited"
    for function in (quick, slow, warm, buffered):
        until(lambda function=function: num_runners(function) == 0, "the end of idle containers")
    print("all is well")
