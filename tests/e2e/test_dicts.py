"""Dicts, driven by the official client."""

import json
import uuid

import pytest


@pytest.fixture
def unique() -> str:
    return uuid.uuid4().hex[:8]


def test_a_dict_does_what_python_s_does_from_outside(aeolian, tmp_path, unique):
    output = aeolian.python(
        f"""
        import os, threading
        import modal
        from modal.exception import AlreadyExistsError, InvalidError, NotFoundError, RequestSizeError

        def fails(kind, text, act):
            try:
                act()
            except kind as error:
                assert text in str(error), error
            else:
                raise AssertionError(f"nothing was raised, {{text}} was expected")

        d = modal.Dict.from_name("d-{unique}", create_if_missing=True)
        d["a"] = 1
        d[("a", 2)] = {{"nested": [1, 2, None]}}
        assert d["a"] == 1 and d[("a", 2)]["nested"] == [1, 2, None]
        assert d.get("b") is None and d.get("b", 7) == 7
        fails(KeyError, "b not in dict", lambda: d["b"])
        assert "a" in d and d.contains("a") and "b" not in d
        assert d.put("a", 2) and d["a"] == 2
        assert not d.put("a", 3, skip_if_exists=True) and d["a"] == 2
        assert d.put("c", 4, skip_if_exists=True)
        d.update({{"x": 1}}, y=2)
        assert d.len() == 5
        assert d.pop("x") == 1 and d.pop("x", "none") == "none"
        fails(KeyError, "x not in dict", lambda: d.pop("x"))
        del d["y"]
        assert set(d.keys()) == {{"a", ("a", 2), "c"}}
        assert dict(d.items())["c"] == 4 and 4 in list(d.values())
        d[None] = None
        assert d.get(None, "default") is None and None in d
        d.clear()
        assert d.len() == 0 and list(d.items()) == []

        # Many entries, in one request and in several; large values, listed too.
        d.update({{number: str(number) for number in range(2500)}})
        d.update({{number: str(number) for number in range(2500, 5000)}})
        assert d.len() == 5000
        assert dict(d.items()) == {{number: str(number) for number in range(5000)}}
        d.clear()
        large = os.urandom(30 << 20)
        for number in range(3):
            d[number] = large
        assert all(value == large for _, value in d.items()) and d[1] == large
        d.clear()
        fails(RequestSizeError, "too large", lambda: d.put("k", bytes(101 << 20)))
        fails(InvalidError, "10,000 entries at a time", lambda: d.update({{number: 0 for number in range(10_001)}}))
        assert d.len() == 0

        # Many who put if it is not there: one wins.
        won = []
        def race(number):
            if d.put("lock", number, skip_if_exists=True):
                won.append(number)
        threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(won) == 1 and d["lock"] == won[0], won

        # As an object.
        info = d.info()
        assert info.name == "d-{unique}" and info.created_by
        assert modal.Dict.from_id(d.object_id)["lock"] == won[0]
        objects = modal.Dict.objects
        fails(AlreadyExistsError, "d-{unique}", lambda: objects.create("d-{unique}"))
        objects.create("d-{unique}", allow_existing=True)
        objects.create("e-{unique}")
        assert [one.name for one in objects.list(max_objects=2)] == ["e-{unique}", "d-{unique}"]
        fails(NotFoundError, "'nope' not found in environment 'main'", lambda: modal.Dict.from_name("nope").len())
        fails(NotFoundError, "di-0123456789012345678901", lambda: modal.Dict.from_id("di-0123456789012345678901").len())
        fails(InvalidError, "Invalid Dict name", lambda: objects.create("has/slash"))
        with modal.Dict.ephemeral() as passing:
            passing["a"] = 1
            assert passing.len() == 1 and passing.info().name is None
            assert passing.object_id not in [one.object_id for one in objects.list()]

        modal.environments.create_environment("other-{unique}")
        other = modal.Dict.from_name("d-{unique}", environment_name="other-{unique}", create_if_missing=True)
        assert other.len() == 0
        other["a"] = 1
        modal.environments.delete_environment("other-{unique}")
        fails(NotFoundError, "no Dict with the id", lambda: other["a"])

        objects.delete("e-{unique}")
        objects.delete("d-{unique}")
        fails(NotFoundError, "d-{unique}", lambda: objects.delete("d-{unique}"))
        objects.delete("d-{unique}", allow_missing=True)
        fails(NotFoundError, "no Dict with the id", lambda: d["lock"])
        print("all is well")
        """,
        tmp_path,
    )
    assert "all is well" in output


def test_containers_and_clients_share_a_dict_and_the_cli_shows_it(aeolian, tmp_path, unique):
    output = aeolian.python(
        f"""
        import modal

        app = modal.App("dicts-{unique}")
        shared = modal.Dict.from_name("shared-{unique}", create_if_missing=True)

        @app.function(max_containers=2)
        def claim(number):
            shared[f"seen {{number}}"] = number
            return shared.put("winner", number, skip_if_exists=True)

        @app.function()
        def by_reference(d, key):
            return d.pop(key), len(list(d.keys()))

        if __name__ == "__main__":
            with app.run():
                won = list(claim.map(range(20)))
                assert sum(won) == 1 and won[shared["winner"]], won
                assert shared.len() == 21
                with modal.Dict.ephemeral() as passing:
                    passing.update(a=1, b=2)
                    assert by_reference.remote(passing, "a") == (1, 1)
                    assert list(passing.keys()) == ["b"]
            print("all is well")
        """,
        tmp_path,
    )
    assert "all is well" in output
    name = f"shared-{unique}"
    value, items, *_ = aeolian.modal_session(
        (f"dict get {name} 'seen 7'", "7"),
        (f"dict items {name} --json", "seen 7"),
        (f"dict items {name} 3", "..."),
        ("dict list --json", name),
        (f"dict clear {name} --yes", ""),
        (f"dict items {name} --json", "[]"),
        (f"dict create {name}", ""),
        (f"dict delete {name} --yes", ""),
        (f"! dict get {name} 'seen 7'", f"'{name}' not found in environment 'main'"),
        (f"! dict delete {name} --yes", "not found"),
        (f"dict delete {name} --yes --allow-missing", ""),
    )
    assert value.strip() == "7" and len(json.loads(items)) == 21
