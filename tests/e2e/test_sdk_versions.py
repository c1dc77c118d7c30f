"""Clients of other versions run the same programs, in containers that run their own SDK."""

import subprocess
import sys

import pytest
from uv import find_uv_bin

from aeolian.worker.package_index import installer_env

PROGRAM = """
import modal

app = modal.App("versions")


@app.function()
def version(x):
    import modal

    return modal.__version__, x


@app.cls(restrict_modal_access=True)
class Counter:
    start: int = modal.parameter(default=1)

    @modal.enter()
    def enter(self):
        self.count = self.start

    @modal.method()
    def add(self, x):
        self.count += x
        return self.count


if modal.__version__.startswith("1.4."):  # later ones refuse constructors

    @app.cls()
    class Constructed:
        def __init__(self, x, *, y=None):
            self.x, self.y = x, y

        @modal.method()
        def get(self):
            return self.x, self.y


@app.function(restrict_modal_access=True)
def numbers():
    yield from range(5)


@app.function(retries=1)
def fails():
    raise KeyError("as it should")


@app.local_entrypoint()
def main():
    assert version.remote(1) == (modal.__version__, 1)
    assert [x for _, x in version.map(range(20))] == list(range(20))
    assert Counter(start=5).add.remote(2) == 7
    if modal.__version__.startswith("1.4."):
        assert Constructed([1], y={"k": 2}).get.remote() == ([1], {"k": 2})
        assert Constructed("other").get.remote() == ("other", None)
    assert list(numbers.remote_gen()) == list(range(5))
    call = version.spawn(3)
    assert call.get(timeout=60)[1] == 3
    try:
        fails.remote()
    except KeyError as error:
        assert error.args == ("as it should",)
    with modal.Volume.ephemeral() as volume:
        with volume.batch_upload() as batch:
            batch.put_file(__file__, "/program.py")
        assert b"".join(volume.read_file("program.py")) == open(__file__, "rb").read()
    with modal.Queue.ephemeral() as queue, modal.Dict.ephemeral() as words:
        queue.put_many(["a", "b"])
        assert queue.get_many(2) == ["a", "b"]
        words["c"] = "d"
        assert words["c"] == "d"
    print("all is well with", modal.__version__)
"""


@pytest.fixture(scope="module", params=["1.5.5", "1.4.3"])
def python_with_modal(request, tmp_path_factory):
    """A fresh virtual environment, as a user of that version has it."""
    folder = tmp_path_factory.mktemp("client") / "venv"
    uv, env = find_uv_bin(), installer_env()
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
    python = folder / "bin/python"
    subprocess.run([uv, "pip", "install", "-q", "-p", python, f"modal=={request.param}"], check=True, env=env)
    return request.param, str(python)


def test_an_older_client_and_its_containers_work(aeolian, python_with_modal, tmp_path):
    version, python = python_with_modal
    (tmp_path / "versions.py").write_text(PROGRAM)
    output = aeolian.run(python, "-m", "modal", "run", "versions.py", cwd=tmp_path)
    assert f"all is well with {version}" in output
