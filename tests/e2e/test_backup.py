"""A backup of a running Aeolian goes on elsewhere."""

import subprocess
import sys

from faults import client
from running import AEOLIAN, RunningAeolian, runtimes

SERVICE = """
import modal

app = modal.App("archive")
volume = modal.Volume.from_name("books", create_if_missing=True)
secret = modal.Secret.from_name("archive-key")
image = modal.Image.debian_slim().run_commands("echo inside > /etc/made-by-an-image")

@app.function(image=image, volumes={"/books": volume}, secrets=[secret], serialized=True)
def look():
    import os
    with open("/books/title.txt") as title, open("/etc/made-by-an-image") as made:
        return title.read().strip(), made.read().strip(), os.environ["KEY"]
"""
FILL = """
import modal
from pathlib import Path

modal.Dict.from_name("shelf", create_if_missing=True)["first"] = {"pages": 300}
Path("title.txt").write_text("Moby Dick")
Path("large.bin").write_bytes(bytes(range(256)) * 40_000)
with modal.Volume.from_name("books", create_if_missing=True).batch_upload() as batch:
    batch.put_file("title.txt", "/title.txt")
    batch.put_file("large.bin", "/large.bin")
"""
LOOK = """
import modal

print(modal.Function.from_name("archive", "look").remote())
print(modal.Dict.from_name("shelf")["first"])
print(sum(len(piece) for piece in modal.Volume.from_name("books").read_file("large.bin")))
"""
WRITE = """
import itertools, modal

volume = modal.Volume.from_name("books")
for number in itertools.count():
    with volume.batch_upload(force=True) as batch:
        batch.put_file("title.txt", "/copies/last.txt")
    print("wrote", number, flush=True)
"""


def command(*argv: str, ok: bool = True) -> str:
    done = subprocess.run([*AEOLIAN, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def test_what_was_backed_up_from_a_running_instance_works_after_it_is_restored_elsewhere(tmp_path):
    runtime = runtimes()[0]
    first = RunningAeolian(tmp_path / "first", runtime).start()
    try:
        first.modal("secret", "create", "archive-key", "KEY=whale")
        first.python(FILL, tmp_path)
        first.deploy(SERVICE, tmp_path)
        before = first.python(LOOK, tmp_path)
        assert "('Moby Dick', 'inside', 'whale')" in before and "{'pages': 300}" in before and "10240000" in before
        (tmp_path / "write.py").write_text(WRITE)
        with client(first, sys.executable, "write.py", cwd=tmp_path) as writer:
            writer.wait_for("wrote 3")
            printed = command("backup", str(tmp_path / "all.tar"), "--data-dir", str(first.data_dir))
            assert "missing" not in printed
    finally:
        first.stop()
    assert (tmp_path / "all.tar").stat().st_mode & 0o777 == 0o600

    restored = ("--data-dir", str(tmp_path / "second"))
    assert "restored to" in command("restore", str(tmp_path / "all.tar"), *restored)
    assert "is not empty" in command("restore", str(tmp_path / "all.tar"), *restored, ok=False)
    second = RunningAeolian(tmp_path / "second", runtime).start()
    try:
        assert second.python(LOOK, tmp_path) == before
    finally:
        second.stop()
