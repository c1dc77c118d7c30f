"""Queues, driven by the official client."""

import json
import sys
import textwrap
import uuid

import pytest


@pytest.fixture
def unique() -> str:
    return uuid.uuid4().hex[:8]


def test_a_queue_does_what_its_documentation_says_from_outside(aeolian, tmp_path, unique):
    output = aeolian.python(
        f"""
        import os, queue, threading, time
        import modal
        from modal.exception import AlreadyExistsError, InvalidError, NotFoundError, RequestSizeError

        def fails(kind, text, act):
            try:
                act()
            except kind as error:
                assert text in str(error), error
            else:
                raise AssertionError(f"nothing was raised, {{text}} was expected")

        q = modal.Queue.from_name("q-{unique}", create_if_missing=True)
        q.put("one")
        q.put_many([2, {{"three": 3}}, None])
        assert q.len() == 4
        assert list(q.iterate()) == ["one", 2, {{"three": 3}}, None] and q.len() == 4
        assert q.get() == "one" and q.get_many(10) == [2, {{"three": 3}}, None]
        assert q.get(block=False) is None and q.get_many(3, block=False) == []
        fails(queue.Empty, "", lambda: q.get(timeout=0.1))
        fails(queue.Empty, "", lambda: q.get_many(2, timeout=0))

        # Partitions.
        q.put(1, partition="a")
        q.put_many([2, 3], partition="b")
        q.put(0)
        assert (q.len(), q.len(partition="b"), q.len(total=True)) == (1, 2, 4)
        assert q.get(partition="b") == 2 and list(q.iterate(partition="b")) == [3]
        q.clear(partition="b")
        assert q.get(partition="b", block=False) is None and q.get(partition="a") == 1
        q.put(4, partition="a")
        q.clear(all=True)
        assert q.len(total=True) == 0
        fails(InvalidError, "between 1 and 64", lambda: q.put(1, partition="p" * 65))

        # A partition's time.
        q.put("short", partition="ttl", partition_ttl=1)
        q.put("long")
        time.sleep(1.2)
        assert q.get(partition="ttl", block=False) is None and q.len(total=True) == 1
        q.clear()

        # Who waits is woken at once.
        def later(seconds, value):
            timer = threading.Timer(seconds, q.put, [value])
            timer.start()
            return timer
        started = time.monotonic()
        later(0.5, "woken")
        assert q.get() == "woken"
        waited = time.monotonic() - started
        assert waited < 5, waited
        print(f"woken {{waited - 0.5:.3f}} s after the put began")
        later(0.3, "seen")
        assert next(q.iterate(item_poll_timeout=20)) == "seen"
        q.clear()

        # A full one, and items that are too large.
        for _ in range(5):
            q.put_many([0] * 1000)
        fails(queue.Full, "5,000 items", lambda: q.put(1, block=False))
        fails(queue.Full, "5,000 items", lambda: q.put(1, timeout=0))
        fails(queue.Full, "5,000 items", lambda: q.put(1, timeout=3))
        q.put("elsewhere", partition="other")
        made_room = threading.Timer(1.0, q.get)
        made_room.start()
        q.put("last", timeout=30)
        while (some := q.get_many(1000, block=False)):
            last = some[-1]
        assert last == "last"
        fails(RequestSizeError, "too large", lambda: q.put(os.urandom(2 << 20)))
        fails(queue.Full, "put fewer", lambda: q.put_many([0] * 5001, block=False))
        q.clear(all=True)

        # As an object.
        assert q.info().name == "q-{unique}" and q.info().created_by
        q.put("by id")
        assert modal.Queue.from_id(q.object_id).get() == "by id"
        objects = modal.Queue.objects
        fails(AlreadyExistsError, "q-{unique}", lambda: objects.create("q-{unique}"))
        objects.create("q-{unique}", allow_existing=True)
        objects.create("r-{unique}")
        assert [one.name for one in objects.list(max_objects=2)] == ["r-{unique}", "q-{unique}"]
        fails(NotFoundError, "'nope' not found in environment 'main'", lambda: modal.Queue.from_name("nope").len())
        fails(NotFoundError, "qu-0123456789012345678901", lambda: modal.Queue.from_id("qu-0123456789012345678901").len())
        with modal.Queue.ephemeral() as passing:
            passing.put(1)
            assert passing.get() == 1 and passing.info().name is None
        modal.environments.create_environment("other-{unique}")
        other = modal.Queue.from_name("q-{unique}", environment_name="other-{unique}", create_if_missing=True)
        other.put(1)
        assert q.len() == 0
        modal.environments.delete_environment("other-{unique}")
        fails(NotFoundError, "no Queue with the id", lambda: other.get())

        # Whoever waits on a deleted one hears of it.
        threading.Timer(0.5, lambda: objects.delete("q-{unique}")).start()
        fails(NotFoundError, "no Queue with the id", lambda: q.get(timeout=30))
        fails(NotFoundError, "q-{unique}", lambda: objects.delete("q-{unique}"))
        objects.delete("r-{unique}")
        print("all is well")
        """,
        tmp_path,
    )
    assert "all is well" in output


MANY = """
    import multiprocessing, sys, threading, time
    import modal

    app = modal.App("queues-{unique}")
    jobs = modal.Queue.from_name("jobs-{unique}", create_if_missing=True)
    done = modal.Queue.from_name("done-{unique}", create_if_missing=True)
    NUM_PRODUCERS, NUM_CONSUMERS, NUM_ITEMS = 4, 6, 300

    def produce(number):
        for item in range(0, NUM_ITEMS, 3):
            jobs.put_many([(number, item + more) for more in range(3)], partition="jobs")
            if item % 60 == 0:
                print("produced", number, item, flush=True)

    def consume(how_many):
        taken = []
        while "end" not in taken:
            taken += jobs.get_many(how_many, partition="jobs", timeout=120)
        extra = taken.count("end") - 1
        if extra:
            jobs.put_many(["end"] * extra, partition="jobs")
        done.put([item for item in taken if item != "end"])

    @app.function(max_containers=2)
    def produces(number):
        produce(number)

    @app.function(max_containers=2)
    @modal.concurrent(max_inputs=3)
    def consumes(how_many):
        consume(how_many)

    if __name__ == "__main__":
        with app.run():
            consumers = [consumes.spawn(1 + number) for number in range(NUM_CONSUMERS // 2)]
            here = [threading.Thread(target=consume, args=(1 + number,)) for number in range(NUM_CONSUMERS // 2)]
            for thread in here:
                thread.start()
            producers = [produces.spawn(number) for number in range(NUM_PRODUCERS // 2)]
            for number in range(NUM_PRODUCERS // 2, NUM_PRODUCERS):
                produce(number)
            for call in producers:
                call.get()
            jobs.put_many(["end"] * NUM_CONSUMERS, partition="jobs")
            for thread in here:
                thread.join()
            for call in consumers:
                call.get()
        taken = [tuple(item) for some in done.get_many(NUM_CONSUMERS) for item in some]
        wanted = [(number, item) for number in range(NUM_PRODUCERS) for item in range(NUM_ITEMS)]
        assert len(taken) == len(set(taken)), "an item came twice"
        assert sorted(taken) == wanted, f"{{len(wanted) - len(taken)}} items are lost"
        assert jobs.len(total=True) == 0
        print("all is well")
"""


def test_many_producers_and_consumers_get_each_item_once(aeolian, tmp_path, unique):
    assert "all is well" in aeolian.python(MANY.format(unique=unique), tmp_path)


def test_each_item_comes_once_though_the_server_is_killed_in_the_middle(aeolian, tmp_path, unique):
    (tmp_path / "many.py").write_text(textwrap.dedent(MANY.format(unique=unique)))
    running = aeolian.start_command(sys.executable, "many.py", cwd=tmp_path)
    output, num_kills = "", 0
    assert running.stdout is not None
    for line in running.stdout:
        output += line
        if line.startswith("produced") and num_kills < 4:
            aeolian.kill("server")
            num_kills += 1
    assert running.wait(240) == 0 and "all is well" in output, output


def test_who_is_killed_while_it_waits_takes_nothing(aeolian, tmp_path, unique):
    output = aeolian.python(
        f"""
        import subprocess, sys, time
        import modal

        app = modal.App("waits-{unique}")
        q = modal.Queue.from_name("waits-{unique}", create_if_missing=True)
        tell = modal.Queue.from_name("tell-{unique}", create_if_missing=True)
        CLIENT = "import modal; modal.Queue.from_name('tell-{unique}').put(1); modal.Queue.from_name('waits-{unique}').get()"

        @app.function(single_use_containers=True)
        def waits():
            tell.put(1)
            return q.get()

        if __name__ == "__main__":
            client = subprocess.Popen([sys.executable, "-c", CLIENT])
            tell.get()
            time.sleep(0.5)
            client.kill()
            client.wait()
            q.put("for another client")
            assert q.get(timeout=30) == "for another client"
            with app.run():
                call = waits.spawn()
                tell.get()
                time.sleep(0.5)
                call.cancel(terminate_containers=True)
                time.sleep(0.5)
                q.put("for another container")
                assert q.get(timeout=30) == "for another container"
            print("all is well")
        """,
        tmp_path,
    )
    assert "all is well" in output


def test_queues_by_the_cli(aeolian, tmp_path, unique):
    name = f"cli-{unique}"
    aeolian.python(
        f"""
        import modal
        q = modal.Queue.from_name("{name}", create_if_missing=True)
        q.put_many(["first", "second"])
        q.put("third", partition="p")
        """,
        tmp_path,
    )
    two, third, *lengths, listed = aeolian.modal_session(
        (f"queue peek {name} 2", "second"),
        (f"queue peek {name} -p p", "third"),
        (f"queue len {name}", "2"),
        (f"queue len {name} --total", "3"),
        (f"queue clear {name} --yes", ""),
        (f"queue len {name} --total", "1"),
        ("queue list --json", name),
    )
    assert (two.split(), third.split()) == (["first", "second"], ["third"])
    assert [length.strip() for length in lengths] == ["2", "3", "", "1"]
    [row] = [row for row in json.loads(listed) if row["name"] == name]
    assert (row["partitions"], row["total_size"], row["total_size_truncated"]) == (1, 1, False)
    aeolian.modal_session(
        (f"queue clear {name} --all --yes", ""),
        (f"queue len {name} --total", "0"),
        (f"queue delete {name} --yes", ""),
        (f"! queue len {name}", f"'{name}' not found in environment 'main'"),
        (f"! queue delete {name} --yes", "not found"),
        (f"queue delete {name} --yes --allow-missing", ""),
        ("! queue create has/slash", "Invalid Queue name"),
    )
