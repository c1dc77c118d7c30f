"""A data directory that an earlier version has left goes on with this one."""

import contextlib
import sqlite3
from pathlib import Path

from running import RunningAeolian

from aeolian.storage.files import ContentStore
from aeolian.storage.volume_files import VolumeFiles

EARLIER = Path(__file__).parents[1] / "storage/earlier/0002.sql"
GREETER = """
import modal

app = modal.App("greeter")


@app.function()
def greet(name: str) -> str:
    return f"hello {name}"
"""
SPAWNED = "fc-hMxRHb1HS6bJ4OCtLLmPYp"
LOOK = """
import modal

print(modal.Dict.from_name("names")["first"], modal.Queue.from_name("visitors").get(timeout=10))
print(modal.FunctionCall.from_id(CALL).get(timeout=10))
print(b"".join(modal.Volume.from_name("notes").read_file("note.txt")))
"""


def test_apps_storage_and_results_of_an_earlier_version_are_there_and_its_apps_can_be_deployed_again(tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(data_dir / "aeolian.db")) as connection:
        connection.executescript(EARLIER.read_text())
    VolumeFiles(data_dir / "volumes/content").put_bytes(b"old note")
    ContentStore(data_dir / "content").put(GREETER.lstrip().encode())

    aeolian = RunningAeolian(data_dir, "process").start()
    try:
        [app] = aeolian.modal_json("app", "list")
        assert "greeter" in app.values() and "deployed" in app.values()
        seen = aeolian.python(LOOK.replace("CALL", repr(SPAWNED)), tmp_path)
        assert seen.splitlines() == ["Ada Bo", "hello Cleo", "b'old note'"]
        aeolian.deploy(GREETER, tmp_path, "greeter.py")
        call = "import modal; print(modal.Function.from_name('greeter', 'greet').remote('Dora'))"
        assert "hello Dora" in aeolian.python(call, tmp_path)
    finally:
        aeolian.stop()
