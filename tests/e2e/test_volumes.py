"""Volumes, driven by the official client, inside containers and out."""

import hashlib
import os
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

FAILS = """
    def fails(kind, text, act):
        try:
            result = act()
        except kind as error:
            assert text in str(error), repr(error)
        else:
            raise AssertionError(f"nothing was raised but {result!r} returned, {text!r} was expected")

    def do(code, **variables):
        scope = {"os": os, "modal": modal, "time": time, "hashlib": hashlib, **variables}
        exec(textwrap.dedent(code), scope)
        return scope.get("result")
"""
"""Containers run what they are told."""


@pytest.fixture
def unique() -> str:
    return uuid.uuid4().hex[:8]


def test_what_one_container_commits_another_sees_after_a_reload(aeolian, tmp_path, unique):
    program = """
    import hashlib, io, os, stat, textwrap, time
    import modal

    app = modal.App("volumes-UNIQUE")
    new = modal.Volume.from_name("new-UNIQUE", create_if_missing=True)
    old = modal.Volume.from_name("old-UNIQUE", create_if_missing=True, version=1)
    volumes = {"/new": new, "/root/old": old}
    ODD = "k/ünï 漢字 'a' $%41.txt"

    def act(path, code):
        scope = {"os": os, "modal": modal, "path": path, "tree": tree, "ODD": ODD}
        scope["volume"] = old if path == "/root/old" else new
        exec(textwrap.dedent(code), scope)
        return scope.get("result")

    def tree(path):
        found = []
        for folder, folders, names in os.walk(path):
            for name in folders + names:
                status = os.lstat(os.path.join(folder, name))
                is_link = stat.S_ISLNK(status.st_mode)
                what = os.readlink(os.path.join(folder, name)) if is_link else oct(status.st_mode)
                size = status.st_size if stat.S_ISREG(status.st_mode) else 0
                found.append((os.path.relpath(os.path.join(folder, name), path), what, size))
        return sorted(found)

    one = app.function(volumes=volumes, max_containers=1, name="one")(act)
    two = app.function(volumes=volumes, max_containers=1, name="two")(act)
    brief = app.function(volumes=volumes, single_use_containers=True, name="brief")(act)

    def until(condition, what):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within a minute"
            time.sleep(0.1)

    def check(path, volume):
        # Nothing is seen before the commit and the reload.
        one.remote(path, "open(path + '/a', 'w').write('1')")
        assert two.remote(path, "result = os.listdir(path)") == []
        one.remote(path, "volume.commit()")
        assert two.remote(path, "result = os.listdir(path)") == []
        assert two.remote(path, "volume.reload(); result = open(path + '/a').read()") == "1"

        # Commits at exit, and in the background of a container that goes on.
        brief.remote(path, "os.makedirs(path + '/deep/er'); open(path + '/deep/er/b', 'w').write('2')")
        until(lambda: two.remote(path, "volume.reload(); result = os.path.exists(path + '/deep/er/b')"), "exit")
        one.remote(path, "open(path + '/background', 'w').write('3')")
        until(lambda: "background" in [entry.path for entry in volume.listdir("/")], "background commit")
        assert b"".join(volume.read_file("background")) == b"3"

        # A client's changes.
        with volume.batch_upload() as batch:
            batch.put_file(io.BytesIO(b"of the client"), "/up/c", mode=0o640)
        volume.remove_file("deep", recursive=True)
        one.remote(path, "volume.reload()")
        assert one.remote(path, "result = tree(path + '/up')") == [("c", "0o100640", 13)]
        assert one.remote(path, "result = sorted(os.listdir(path))") == ["a", "background", "up"]

        # Everything that a folder can hold.
        two.remote(path, '''
            volume.reload()
            os.makedirs(path + "/k/empty dir", 0o750)
            open(path + "/k/empty file", "w").close()
            open(path + "/" + ODD, "w").write("u")
            open(path + "/k/run.sh", "w").write("#!/bin/sh"); os.chmod(path + "/k/run.sh", 0o751)
            os.symlink("run.sh", path + "/k/link"); os.symlink("/etc/passwd", path + "/k/out")
            os.symlink("nowhere", path + "/k/broken"); os.symlink("../k", path + "/k/self")
            os.link(path + "/k/run.sh", path + "/k/hard")
            os.remove(path + "/a"); os.rename(path + "/up", path + "/moved")
            volume.commit()
        ''')
        one.remote(path, "volume.reload()")
        there = two.remote(path, "result = tree(path)")
        assert one.remote(path, "result = tree(path)") == there
        assert [name for name, _, _ in there] == sorted([
            "background", "k", "k/broken", "k/empty dir", "k/empty file", "k/hard", "k/link", "k/out", "k/run.sh",
            "k/self", ODD, "moved", "moved/c",
        ]), there
        assert {entry.path: entry.type.name for entry in volume.listdir("k")}["k/link"] == "SYMLINK"
        assert b"".join(volume.read_file("k/self/link")) == b"#!/bin/sh"
        assert b"".join(volume.read_file(ODD)) == b"u"
        fails(modal.exception.InvalidError, "outside the volume", lambda: b"".join(volume.read_file("k/out")))

        # Open files.
        fails(
            RuntimeError,
            "there are open files preventing the operation: path background is open",
            lambda: one.remote(path, "file = open(path + '/background'); volume.reload()"),
        )
        one.remote(path, "volume.reload()")

    if __name__ == "__main__":
        with app.run():
            check("/new", new)
            check("/root/old", old)
        print("all is well")
    """
    assert "all is well" in aeolian.python(FAILS + program.replace("UNIQUE", unique), tmp_path)


def test_volumes_are_mounted_as_asked(aeolian, tmp_path, unique):
    program = """
    import hashlib, io, os, textwrap, time
    import modal

    app = modal.App("mounts-UNIQUE")
    A = modal.Volume.from_name("a-UNIQUE", create_if_missing=True)
    B = modal.Volume.from_name("b-UNIQUE", create_if_missing=True)
    C = modal.Volume.from_name("c-UNIQUE", create_if_missing=True, version=1)

    read_only = {"/ro": A.read_only(), "/ro2": B.with_mount_options(read_only=True)}
    ro = app.function(volumes=read_only, name="ro")(do)
    parts = {"/s": A.with_mount_options(sub_path="users/me"), "/root/b": B}
    part = app.function(volumes=parts, name="part")(do)
    ro_part = {"/s": A.with_mount_options(sub_path="/made/at/start", read_only=True)}
    part_ro = app.function(volumes=ro_part, name="part_ro")(do)
    nested = app.function(volumes={"/data": A, "/data/in/ner": B, "/data/in": C}, name="nested")(do)
    nested_ro = app.function(volumes={"/data": A.read_only(), "/data/not/there": B}, name="nested_ro")(do)
    blocked = app.function(volumes={"/data": A, "/data/x": B}, name="blocked")(do)
    plain = app.function(name="plain")(do)

    def put(volume, **files):
        with volume.batch_upload(force=True) as batch:
            for path, data in files.items():
                batch.put_file(io.BytesIO(data), path)

    def everything(volume):
        return sorted(entry.path for entry in volume.listdir("/", recursive=True))

    def run():
        put(A, **{"x": b"x", "users/other/f": b"other", "in/hidden": b"in"})
        put(B, b=b"b")

        assert ro.remote("result = open('/ro/x').read() + open('/ro2/b').read()") == "xb"
        for code in ("open('/ro/new', 'w')", "open('/ro2/b', 'a')", "os.remove('/ro/x')", "os.mkdir('/ro2/d')"):
            fails(OSError, "Read-only file system", lambda: ro.remote(code))
        put(A, later=b"1")
        code = "v = modal.Volume.from_name('a-UNIQUE'); v.commit(); v.reload(); result = os.listdir('/ro')"
        assert "later" in ro.remote(code)
        fails(modal.exception.InvalidError, "Read-only Volume", lambda: A.read_only().remove_file("x"))

        assert part.remote("result = os.listdir('/s'), os.listdir('/root/b')") == ([], ["b"])
        part.remote("open('/s/mine', 'w').write('m'); modal.Volume.from_name('a-UNIQUE').commit()")
        assert {"users/me/mine", "users/other/f"} <= set(everything(A))
        put(A, **{"users/me/d/new": b"new", "users/other/g": b""})
        code = "modal.Volume.from_name('a-UNIQUE').reload(); result = sorted(os.listdir('/s'))"
        assert part.remote(code) == ["d", "mine"]
        assert part_ro.remote("result = os.listdir('/s')") == []
        assert "made/at/start" in everything(A)

        code = "result = os.path.exists('/data/in/hidden'), os.listdir('/data/in'), os.listdir('/data/in/ner')"
        assert nested.remote(code) == (False, ["ner"], ["b"])
        nested.remote("for path in ('/data/1', '/data/in/2', '/data/in/ner/3'): open(path, 'w').write(path)")
        nested.remote("for name in 'abc': modal.Volume.from_name(f'{name}-UNIQUE').commit()")
        assert "1" in everything(A) and "in/2" not in everything(A)
        assert (everything(B), everything(C)) == (["3", "b"], ["2"])
        assert nested_ro.remote("result = sorted(os.listdir('/data/not/there'))") == ["3", "b"]
        assert "not" not in everything(A)
        fails(modal.exception.RemoteError, "'x' in the volume is no directory", lambda: blocked.remote("1"))

        # By id, by options, from inside a container, ephemeral, deleted while mounted.
        by_id = modal.Volume.from_id(A.object_id)
        assert by_id.info().name == "a-UNIQUE"
        optional = plain.with_options(volumes={"/opt/v": by_id})
        assert optional.remote("result = open('/opt/v/x').read()") == "x"
        fails(
            RuntimeError,
            "not mounted here: reload it inside a container that mounts it",
            lambda: plain.remote("modal.Volume.from_name('a-UNIQUE').reload()"),
        )
        fails(RuntimeError, "not mounted here", lambda: A.commit())
        plain.remote('''
            import io
            with modal.Volume.from_name("a-UNIQUE").batch_upload() as batch:
                batch.put_file(io.BytesIO(b"9" * 9_000_000), "/from/a/container")
        ''')
        assert sum(map(len, A.read_file("from/a/container"))) == 9_000_000
        code = "result = sum(map(len, modal.Volume.from_name('a-UNIQUE').read_file('from/a/container')))"
        assert plain.remote(code) == 9_000_000
        with modal.Volume.ephemeral() as passing:
            with_it = plain.with_options(volumes={"/e": passing})
            with_it.remote("open('/e/x', 'w').write('e')")
            put(passing, y=b"y")
            code = f"v = modal.Volume.from_id({passing.object_id!r}); v.commit(); v.reload(); result = open('/e/y').read()"
            assert with_it.remote(code) == "y"
            assert b"".join(passing.read_file("x")) == b"e"
        gone = modal.Volume.from_name("gone-UNIQUE", create_if_missing=True)
        with_it = plain.with_options(volumes={"/d": gone})
        with_it.remote("open('/d/x', 'w').write('x')")
        modal.Volume.objects.delete("gone-UNIQUE")
        assert with_it.remote("result = open('/d/x').read()") == "x"
        with_another = plain.with_options(volumes={"/d": gone, "/a": A})
        fails(modal.exception.NotFoundError, gone.object_id, lambda: with_another.remote("1"))
        two_paths = {"/1": A, "/2": A}
        fails(modal.exception.InvalidError, "multiple locations", lambda: plain.with_options(volumes=two_paths).remote("1"))

        # Two environments.
        modal.environments.create_environment("other-UNIQUE")
        elsewhere = modal.Volume.from_name("a-UNIQUE", environment_name="other-UNIQUE", create_if_missing=True)
        assert everything(elsewhere) == []
        put(elsewhere, only=b"here")
        assert "only" not in everything(A)
        modal.environments.delete_environment("other-UNIQUE")
        fails(modal.exception.NotFoundError, elsewhere.object_id, lambda: everything(elsewhere))

    if __name__ == "__main__":
        with app.run():
            run()
        print("all is well")
    """
    assert "all is well" in aeolian.python(FAILS + program.replace("UNIQUE", unique), tmp_path)


def test_of_concurrent_writers_the_last_commit_wins_and_no_file_is_torn_though_the_server_is_killed(
    aeolian, tmp_path, unique
):
    program = f"""
    import os, threading
    import modal

    app = modal.App("writers-{unique}")
    shared = modal.Volume.from_name("shared-{unique}", create_if_missing=True)
    SIZE, NUM_WRITERS, NUM_TURNS = 9 << 20, 3, 6

    @app.function(volumes={{"/data": shared}}, max_containers=NUM_WRITERS, single_use_containers=True)
    def write(number):
        for turn in range(NUM_TURNS):
            with open("/data/same", "wb") as file:
                for _ in range(9):
                    file.write(bytes([65 + number]) * (SIZE // 9))
            with open(f"/data/own-{{number}}", "w") as file:
                file.write(str(turn))
            shared.commit()
            with open("/data/same", "rb") as file:
                data = file.read()
            assert len(data) == SIZE and len(set(data)) == 1, (len(data), set(data))

    if __name__ == "__main__":
        with app.run():
            calls = [write.spawn(number) for number in range(NUM_WRITERS)]
            seen = set()
            running = threading.Thread(target=modal.FunctionCall.gather, args=calls)
            running.start()
            while running.is_alive():
                try:
                    data = b"".join(shared.read_file("same"))
                except FileNotFoundError:
                    continue
                assert len(data) == SIZE and len(set(data)) == 1, (len(data), set(data))
                seen.add(chr(data[0]))
                print("read", chr(data[0]), flush=True)
            modal.FunctionCall.gather(*calls)
        data = b"".join(shared.read_file("same"))
        assert len(data) == SIZE and len(set(data)) == 1
        for number in range(NUM_WRITERS):
            assert b"".join(shared.read_file(f"own-{{number}}")) == str(NUM_TURNS - 1).encode()
        print("all is well", seen)
    """
    (tmp_path / "writers.py").write_text(textwrap.dedent(program))
    running = aeolian.start_command(sys.executable, "writers.py", cwd=tmp_path)
    output, num_reads = "", 0
    assert running.stdout is not None
    for line in running.stdout:
        output += line
        num_reads += line.startswith("read")
        if num_reads in (3, 10):
            aeolian.kill("server")
            num_reads += 1
    assert running.wait(240) == 0 and "all is well" in output, output


def test_a_large_file_and_many_small_ones_go_in_and_out(aeolian, tmp_path, unique):
    large, many = tmp_path / "large.bin", tmp_path / "many"
    with large.open("wb") as file:
        for _ in range(300):
            file.write(os.urandom(1 << 20))
    for number in range(5000):
        folder = many / f"{number // 100:02}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(f"number {number}")
    with large.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    program = f"""
    import hashlib, os, shutil, time
    import modal

    app = modal.App("sizes-{unique}")
    volume = modal.Volume.from_name("sizes-{unique}", create_if_missing=True)
    started = time.monotonic()

    def lap(what):
        global started
        print(f"{{time.monotonic() - started:6.2f}} s to {{what}}", flush=True)
        started = time.monotonic()

    @app.function(volumes={{"/data": volume}}, timeout=600)
    def look():
        with open("/data/large", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        texts = [open(entry).read() for folder in os.scandir("/data/many") for entry in os.scandir(folder)]
        return digest, len(texts), len(set(texts))

    @app.function(volumes={{"/data": volume}}, timeout=600)
    def work():
        shutil.copyfile("/data/large", "/data/copy")
        with open("/data/copy", "ab") as file:
            file.write(b"more")
        shutil.copytree("/data/many", "/data/again")
        for folder in os.scandir("/data/again"):
            for entry in os.scandir(folder):
                with open(entry, "a") as file:
                    file.write(" again")
        at = time.monotonic()
        volume.commit()
        return time.monotonic() - at

    if __name__ == "__main__":
        with app.run():
            with volume.batch_upload() as batch:
                batch.put_file("large.bin", "/large")
            lap("upload 300 MiB")
            with volume.batch_upload() as batch:
                batch.put_directory("many", "/many")
            lap("upload 5,000 files")
            assert look.remote() == ("{digest}", 5000, 5000)
            lap("start a container that reads all of it")
            print(f"{{work.remote():6.2f}} s to commit a copy of 300 MiB and 5,000 files")
            lap("copy and commit all of it")
            assert sum(1 for entry in volume.iterdir("/again") if entry.type.name == "FILE") == 5000
            lap("list 5,000 files")
            with open("copy.bin", "wb") as file:
                assert volume.read_file_into_fileobj("copy", file) == (300 << 20) + 4
            lap("download 300 MiB")
        with open("copy.bin", "rb") as file:
            again = hashlib.sha256(file.read(300 << 20)).hexdigest()
            assert (again, file.read()) == ("{digest}", b"more")
        print("all is well")
    """
    output = aeolian.python(program, tmp_path, timeout_s=600)
    assert "all is well" in output
    print(output)

    content = aeolian.data_dir / "volumes"
    before = disk_usage(content)
    aeolian.modal("volume", "delete", f"sizes-{unique}", "--yes")
    deadline = time.monotonic() + 60
    while disk_usage(content) > before - (590 << 20):
        assert time.monotonic() < deadline, f"{before:,} bytes before the deletion, {disk_usage(content):,} after it"
        time.sleep(0.2)


def disk_usage(folder: Path) -> int:
    """Bytes of the disk that files below a folder take, each counted once."""
    seen = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


@pytest.mark.parametrize("version", [1, 2])
def test_volumes_by_the_cli(aeolian, tmp_path, unique, version):
    (tmp_path / "d/sub").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "d/sub/ünï cöde").write_text("u")
    (tmp_path / "d/empty").touch()
    name = f"cli-{unique}"
    steps = [
        (f"volume create {name} --version {version}", "Created Volume"),
        (f"! volume create {name}", "already exists"),
        ("volume list --json", name),
        (f"volume put {name} a.txt", ""),
        (f"volume put {name} d /in", ""),
        (f"volume put {name} a.txt b/", ""),
        (f"! volume put {name} a.txt b/", "already exists"),
        (f"volume put {name} a.txt b/ --force", ""),
        (f"volume ls {name}", "a.txt\nb\nin"),
        (f"volume ls {name} in/sub --json", '"in/sub/\\\\xfcn\\\\xef c\\\\xf6de"'),
        (f"! volume ls {name} nope", "no file or directory 'nope'"),
        (f"volume get {name} in out", ""),
        (f"! volume get {name} in out", "already exists"),
        (f"volume cp {name} a.txt c.txt", ""),
        (f"volume cp {name} a.txt c.txt in", ""),
        (f"volume rm {name} c.txt", "deleted successfully"),
        (f"! volume rm {name} in", "recursive"),
        (f"volume rm {name} in/sub -r", "deleted successfully"),
        (f"volume ls {name} in", "in/a.txt\nin/c.txt\nin/empty"),
    ]
    for path in ("../x", "a/../../x", "%2e%2e/x", "..%2fx", "%252e%252e%252fx"):
        steps += [
            (f"! volume {command}", "path '")
            for command in (
                f"put {name} a.txt {path}",
                f"get {name} {path} -",
                f"rm {name} {path}",
                f"cp {name} a.txt {path}",
                f"ls {name} {path}",
            )
        ]
    if version == 2:
        steps += [
            (f"volume cp -r {name} in copy", ""),
            (f"volume ls {name} copy", "copy/a.txt\ncopy/c.txt\ncopy/empty"),
        ]
    steps += [
        (f"volume rename {name} new-{name} --yes", ""),
        (f"! volume ls {name}", f"'{name}' not found in environment 'main'"),
        (f"volume get new-{name} a.txt -", "hello"),
        (f"volume delete new-{name} --yes", ""),
        (f"! volume delete new-{name} --yes", "not found"),
        (f"volume delete new-{name} --yes --allow-missing", ""),
    ]
    (tmp_path / "out").mkdir()
    aeolian.modal_session(*steps, cwd=tmp_path)
    assert (tmp_path / "out/in/sub/ünï cöde").read_text() == "u" and (tmp_path / "out/in/empty").exists()
