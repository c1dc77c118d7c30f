"""Classes and unusual Functions, driven by the official client."""

CLASSES = """
import asyncio
import os
import traceback

import modal

app = modal.App("classes")


@app.cls(max_containers=1)
class Counter:
    name: str = modal.parameter()
    step: int = modal.parameter(default=1)
    raw: bytes = modal.parameter(default=b"\\x00\\xff")
    flag: bool = modal.parameter(default=False)
    notes: list = modal.parameter(init=False)

    @modal.enter()
    def first(self):
        self.total = 0
        self.notes = ["enter"]

    @modal.enter()
    async def second(self):
        await asyncio.sleep(0)
        self.notes.append("async enter")

    @modal.method()
    def add(self, n=1):
        self.total += n * self.step
        return self.total

    @modal.method()
    async def describe(self):
        await asyncio.sleep(0)
        return self.name, self.step, self.raw, self.flag, self.notes, os.environ["MODAL_TASK_ID"]

    @modal.method()
    def count_to(self, n):
        for i in range(n):
            yield self.name, i

    @modal.method()
    async def count_async(self, n):
        for i in range(n):
            yield self.name, i

    @modal.method()
    async def ask_another(self, name):
        return await Counter(name=name, step=100).add.remote.aio()

    @modal.exit()
    def last(self):
        print(f"exit of {self.name} with {self.total}")

    def undecorated(self):
        return "undecorated " + self.name


class Base:
    kind = "base"

    @modal.enter()
    def base_enter(self):
        self.order = ["base"]

    @modal.method()
    def shared(self):
        return self.kind, self.order, self.own()

    def own(self):
        return "base"


@app.cls()
class Derived(Base):
    kind = "derived"

    @modal.enter()
    def derived_enter(self):
        self.order.append("derived")

    @modal.method()
    def extra(self):
        return "extra"

    def own(self):
        return "derived"


@app.cls()
class Broken:
    @modal.enter()
    def start(self):
        print("trying to enter")
        raise KeyError("no such weights")

    @modal.method()
    def f(self, x=0):
        return x

    @modal.method()
    def g(self):
        yield 1


@app.cls(retries=1)
class Raising:
    @modal.method()
    def f(self):
        raise ValueError("of the method")


@app.local_entrypoint()
def main():
    one, two = Counter(name="one"), Counter(name="two", step=10, raw=b"x", flag=True)
    *of_one, task_one = one.describe.remote()
    *of_two, task_two = two.describe.remote()
    assert of_one == ["one", 1, b"\\x00\\xff", False, ["enter", "async enter"]], of_one
    assert of_two == ["two", 10, b"x", True, ["enter", "async enter"]], of_two
    assert task_one != task_two
    assert [one.add.remote() for _ in range(3)] == [1, 2, 3]
    assert [two.add.remote() for _ in range(3)] == [10, 20, 30]
    assert Counter(name="one").add.remote(5) == 8, "equal parameters mean the same pool"
    assert list(one.count_to.remote_gen(3)) == [("one", 0), ("one", 1), ("one", 2)]
    assert list(two.count_async.remote_gen(2)) == [("two", 0), ("two", 1)]
    assert one.ask_another.remote("three") == 100
    assert one.undecorated() == "undecorated one"
    assert one.name == "one" and two.flag is True
    here = Counter(name="here", step=5)
    assert [here.add.local(), here.add.local()] == [5, 10] and here.notes[0] == "enter"
    several = Counter.with_options(max_containers=3)(name="several")
    assert len(list(several.add.map(range(20)))) == 20
    call = two.add.spawn(1)
    assert modal.FunctionCall.from_id(call.object_id).get() == 40
    assert Derived().shared.remote() == ("derived", ["base", "derived"], "derived")
    assert Derived().extra.remote() == "extra"

    for attempt in (
        lambda: Broken().f.remote(),
        lambda: list(Broken().g.remote_gen()),
        lambda: list(Broken().f.map([1, 2])),
        lambda: Broken().f.spawn().get(),
    ):
        try:
            attempt()
        except KeyError as error:
            assert "no such weights" in str(error)
            assert "in start" in "".join(traceback.format_exception(error))
        else:
            raise AssertionError("the enter hook did not fail")
    try:
        Raising().f.remote()
    except ValueError as error:
        assert "in f" in "".join(traceback.format_exception(error))

    for wrong, kind in (
        (lambda: Counter(), AttributeError),
        (lambda: Counter(name=3).add.remote(), TypeError),
        (lambda: Counter(title="x").add.remote(), modal.exception.InvalidError),
    ):
        try:
            wrong()
        except kind:
            pass
        except Exception as error:
            print("unexpected", type(error), error)
    print("all is well")
"""


def test_each_parameter_value_has_its_own_containers_and_hooks_run_around_them(aeolian, tmp_path):
    output = aeolian.run_app(CLASSES, tmp_path)
    assert "all is well" in output
    assert "unexpected" not in output
    for line in ("exit of one with 8", "exit of two with 40", "exit of three with 100"):
        assert output.count(line) == 1
    assert 0 < output.count("trying to enter\n") <= 8, "a class that cannot start is not started over and over"


HOOKS = """
import time

import modal

app = modal.App("hooks")
ends = modal.Dict.from_name("ends-of-hooks", create_if_missing=True)


@app.cls(enable_memory_snapshot=True)
class Snapped:
    @modal.enter(snap=True)
    def before(self):
        self.order = ["before"]

    @modal.enter(snap=False)
    def after(self):
        self.order.append("after")

    @modal.method()
    def f(self):
        return self.order


@app.cls(scaledown_window=2)
class Leaving:
    name: str = modal.parameter()

    @modal.method()
    def f(self):
        self.called = True

    @modal.exit()
    def leave(self):
        ends[self.name] = self.called


@app.cls()
class BadExit:
    @modal.method()
    def f(self):
        return 1

    @modal.exit()
    def leave(self):
        raise RuntimeError("the exit hook failed")


@app.cls(startup_timeout=1)
class TooSlow:
    @modal.enter()
    def start(self):
        time.sleep(600)

    @modal.method()
    def f(self):
        return 1


@app.cls(max_containers=1)
class Together:
    factor: int = modal.parameter(default=2)

    @modal.batched(max_batch_size=4, wait_ms=2000)
    def f(self, xs):
        return [(x * self.factor, len(xs)) for x in xs]


@app.cls()
class Plain:
    kind = "plain"

    @modal.method()
    def f(self):
        return self.kind

    @property
    def loud(self):
        return self.kind.upper()

    @staticmethod
    def static():
        return 3


@app.local_entrypoint()
def main():
    assert Snapped().f.remote() == ["before", "after"]
    Leaving(name="scaled down").f.remote()
    idle_since = time.monotonic()
    assert BadExit().f.remote() == 1
    try:
        TooSlow().f.remote()
    except modal.exception.FunctionTimeoutError as error:
        assert "not ready after 1 s" in str(error), error
    else:
        raise AssertionError("no timeout")
    assert list(Together().f.map(range(4))) == [(0, 4), (2, 4), (4, 4), (6, 4)]
    assert list(Together(factor=3).f.map(range(4))) == [(0, 4), (3, 4), (6, 4), (9, 4)]
    larger = Together.with_batching(max_batch_size=6, wait_ms=2000)
    assert list(larger().f.map(range(6)))[0] == (0, 6)
    assert (Plain.kind, Plain().kind, Plain().loud, Plain.static()) == ("plain", "plain", "PLAIN", 3)
    kept = Plain()
    kept.f.remote()
    while "scaled down" not in ends:
        assert time.monotonic() - idle_since < 60
        time.sleep(0.2)
    Leaving(name="with the app").f.remote()
    print("all is well")
"""


def test_hooks_run_at_every_start_and_end_of_a_container(aeolian, tmp_path):
    output = aeolian.run_app(HOOKS, tmp_path)
    assert "all is well" in output
    assert "RuntimeError: the exit hook failed" in output
    ends = aeolian.python(
        "import modal; print(dict(modal.Dict.from_name('ends-of-hooks').items()))", tmp_path, name="ends.py"
    )
    assert "'scaled down': True" in ends and "'with the app': True" in ends
    aeolian.modal("dict", "delete", "--yes", "ends-of-hooks")


SERIALIZED = '''
import modal

offset = 41


def shifted(x):
    return x + offset


app = modal.App("serialized")


def make(n):
    @app.function(serialized=True, name=f"plus-{n}")
    def plus(x):
        return x + n + shifted(0)

    return plus


pluses = [make(n) for n in range(3)]
double = app.function(serialized=True, name="double")(lambda x: x * 2)


@app.function(serialized=True)
def count(n):
    for i in range(n):
        yield shifted(i)


def make_class(suffix):
    @app.cls(serialized=True)
    class Inner:
        p: str = modal.parameter(default="d")

        @modal.enter()
        def start(self):
            self.x = shifted(1)

        @modal.method()
        def get(self):
            return self.p, self.x, suffix

    return Inner


Inner = make_class("captured")


class Custom:
    def __init__(self, value):
        self.value = value


@app.function(serialized=True)
def increased(custom):
    return Custom(custom.value + 1)


@app.function(serialized=True)
def fails():
    class Inside(Exception):
        pass

    raise Inside("made in the container")


part = modal.App("part")


@part.function(name="of-the-part")
def of_part(x):
    return "part", x


@part.cls()
class PartClass:
    @modal.method()
    def m(self):
        return "part class"


app.include(part)

if __name__ == "__main__":
    with app.run():
        assert [plus.remote(1) for plus in pluses] == [42, 43, 44]
        assert list(double.map([1, 2])) == [2, 4]
        assert list(count.remote_gen(3)) == [41, 42, 43]
        assert Inner().get.remote() == ("d", 42, "captured") and Inner(p="q").get.remote()[0] == "q"
        assert increased.remote(Custom(4)).value == 5
        assert of_part.remote(1) == ("part", 1) and PartClass().m.remote() == "part class"
        try:
            fails.remote()
        except Exception as error:
            assert type(error).__name__ == "Inside" and "made in the container" in str(error)
        else:
            raise AssertionError("nothing was raised")

    source = """
import modal

made = modal.App("made-by-exec")

@made.function(serialized=True)
def squared(x):
    return x**2
"""
    names = {"__name__": "__main__"}
    exec(source, names)
    with names["made"].run():
        assert names["squared"].remote(9) == 81
    print("all is well")
'''


def test_serialized_functions_and_classes_run_without_their_source(aeolian, tmp_path):
    assert "all is well" in aeolian.python(SERIALIZED, tmp_path)


def test_packages_siblings_and_added_sources_are_importable_in_containers(aeolian, tmp_path):
    package = tmp_path / "shop"
    (package / "parts").mkdir(parents=True)
    (package / "__init__.py").write_text("VERSION = 3\n")
    (package / "helpers.py").write_text("def helped(x):\n    return 'helped', x\n")
    (package / "parts/__init__.py").write_text("")
    (package / "parts/app.py").write_text(PACKAGED)
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart/__init__.py").write_text("def said():\n    return 'apart'\n")
    (tmp_path / "sibling.py").write_text("def said():\n    return 'sibling'\n")
    output = aeolian.modal(
        "run",
        "-m",
        "shop.parts.app::main",
        "--count",
        "3",
        "--factor",
        "1e3",
        "--flag",
        "--when",
        "2026-01-02",
        cwd=tmp_path,
    )
    assert "main 3 1000.0 True 2026-01-02T00:00:00 plain (('helped', 3), 3, 'shop.parts.app', 'apart')" in output
    output = aeolian.modal("run", "-m", "shop.parts.app::show", "--x", "5", cwd=tmp_path)
    assert "show 5 <class 'int'>" in output
    output = aeolian.modal("run", "-m", "shop.parts.app::main", "--count", "x", cwd=tmp_path, ok=False)
    assert "'x' is not a valid integer" in output
    (tmp_path / "script.py").write_text(SCRIPT)
    assert "main sibling" in aeolian.modal("run", "script.py", cwd=tmp_path)


PACKAGED = """
from datetime import datetime

import modal

from shop import VERSION

from ..helpers import helped

app = modal.App("packaged", image=modal.Image.debian_slim().add_local_python_source("apart"))


@app.function()
def told(x: int):
    import apart

    return helped(x), VERSION, __name__, apart.said()


@app.function()
def show(x: int = 4):
    print("show", x, type(x))


@app.local_entrypoint()
def main(count: int, factor: float = 2.5, flag: bool = False, when: datetime = None, name: str = "plain"):
    print("main", count, factor, flag, when.isoformat(), name, told.remote(count))
"""

SCRIPT = """
import modal
import sibling

app = modal.App("script", image=modal.Image.debian_slim().add_local_python_source("sibling"))


@app.function()
def told():
    return sibling.said()


@app.local_entrypoint()
def main():
    print("main", told.remote())
"""

LOOKED_UP = """
import os

import modal

app = modal.App("looked-up")


@app.function()
def hello(name="you"):
    return f"hello {name} VERSION in {os.environ['MODAL_ENVIRONMENT']}"


@app.cls(secrets=[modal.Secret.from_dict({"KEPT": "yes"})])
class Model:
    size: int = modal.parameter(default=7)

    @modal.enter()
    def start(self):
        self.n = 0

    @modal.method()
    def f(self, x):
        self.n += 1
        return self.size * x, self.n, os.environ["MODAL_TASK_ID"]

    @modal.method()
    def env(self, name):
        return os.environ.get(name)

    @modal.method()
    def write(self, path, text):
        with open(path, "w") as stream:
            stream.write(text)

    @modal.method()
    def nap(self, seconds):
        import time

        started = time.time()
        time.sleep(seconds)
        return started, os.environ["MODAL_TASK_ID"]

    @modal.method()
    def double(self, x):
        return x * 2

    @modal.method()
    def count(self, n):
        yield from range(n)
"""

LOOKS_UP = """
import modal

hello = modal.Function.from_name("looked-up", "hello")
assert hello.remote("x") == "hello x v2 in main", hello.remote("x")
assert modal.Function.from_name("looked-up", "hello", version=1).remote() == "hello you v1 in main"
assert modal.Function.from_name("looked-up", "hello", environment_name="elsewhere").remote() == "hello you v3 in elsewhere"
Model = modal.Cls.from_name("looked-up", "Model")
assert Model().f.remote(2)[:2] == (14, 1) and Model(size=3).f.remote(2)[:2] == (6, 1)
assert list(Model().count.remote_gen(3)) == [0, 1, 2]
assert modal.Cls.from_name("looked-up", "Model", environment_name="elsewhere")(size=2).f.remote(2)[0] == 4

# Options of a lookup make a pool of their own.
volume = modal.Volume.from_name("of-options", create_if_missing=True)
secret = modal.Secret.from_dict({"ADDED": "abc"})
Tuned = Model.with_options(
    secrets=[secret],
    volumes={"/data": volume},
    env={"OTHER": "1"},
    max_containers=1,
    timeout=60,
    cpu=0.5,
    memory=256,
    scaledown_window=2,
)
tuned = Tuned(size=5)
assert tuned.f.remote(1)[:2] == (5, 1)
assert [tuned.env.remote(name) for name in ("ADDED", "OTHER")] == ["abc", "1"]
assert Model(size=5).env.remote("ADDED") is None
tuned.write.remote("/data/note.txt", "from options")
tuned.write.remote("/data/note.txt", "from options again")
naps = list(tuned.nap.map([0.2] * 3))
assert len({task for _, task in naps}) == 1, "max_containers"
together = Model.with_options(max_containers=1).with_concurrency(max_inputs=8)(size=9)
naps = list(together.nap.map([0.5] * 6))
starts = sorted(started for started, _ in naps)
assert len({task for _, task in naps}) == 1 and starts[-1] - starts[0] < 2.5, "with_concurrency"
try:
    Model.with_options(timeout=1)(size=11).nap.remote(30)
except modal.exception.FunctionTimeoutError:
    pass
else:
    raise AssertionError("no timeout")
assert hello.with_options(timeout=5, secrets=[secret]).remote("o") == "hello o v2 in main"


def message(attempt):
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__} {error}"
    raise AssertionError("found")


from_name, cls_from_name = modal.Function.from_name, modal.Cls.from_name
for attempt, *expected in (
    (lambda: from_name("looked-up", "helo").hydrate(), "NotFoundError", "has no Function 'helo'", "did you mean 'hello'?"),
    (lambda: from_name("loked-up", "hello").hydrate(), "NotFoundError", "'loked-up' not found", "did you mean 'looked-up'?"),
    (lambda: cls_from_name("looked-up", "Modl")().f.remote(1), "NotFoundError", "no class 'Modl'", "did you mean 'Model'?"),
    (lambda: from_name("looked-up", "Model").hydrate(), "NotFoundError", "modal.Cls"),
    (lambda: cls_from_name("looked-up", "hello")().f.remote(), "NotFoundError", "is a Function of App"),
    (lambda: from_name("looked-up", "hello", environment_name="nope").hydrate(), "NotFoundError", "'nope'", "elsewhere"),
    (lambda: from_name("looked-up", "hello", version=9).hydrate(), "NotFoundError", "9"),
    (lambda: Model().nope.remote(), "NotFoundError", "nope"),
    (lambda: Model(siz=3).f.remote(1), "InvalidError", "siz"),
    (lambda: Model(size="x").f.remote(1), "TypeError"),
    (lambda: modal.FunctionCall.from_id("fc-nope").get(), "NotFoundError", "fc-nope"),
):
    said = message(attempt)
    for text in expected:
        assert text in said, f"{text!r} is not in {said!r}"
print("all is well")
"""


def test_functions_and_classes_are_found_by_name_across_versions_and_environments(aeolian, tmp_path):
    aeolian.modal("environment", "create", "elsewhere")
    aeolian.deploy(LOOKED_UP.replace("VERSION", "v1"), tmp_path)
    aeolian.deploy(LOOKED_UP.replace("VERSION", "v2"), tmp_path)
    aeolian.modal("deploy", "-e", "elsewhere", "--name", "looked-up", "third.py", cwd=_with(tmp_path, "third.py", "v3"))
    assert "all is well" in aeolian.python(LOOKS_UP, tmp_path)
    assert "from options again" in aeolian.modal("volume", "get", "of-options", "note.txt", "-")
    for name in ("main", "elsewhere"):
        aeolian.modal("app", "stop", "--yes", "looked-up", "-e", name)
    aeolian.modal("environment", "delete", "--yes", "elsewhere")


def _with(folder, name, version):
    (folder / name).write_text(LOOKED_UP.replace("VERSION", version))
    return folder
