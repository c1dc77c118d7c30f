"""COPY and ADD: what is taken, where it lands, and that neither leads out of the image."""

import contextlib
import http.server
import os
import stat
import tarfile
import threading

import pytest

from aeolian.domain.errors import InvalidArgument, Unavailable
from aeolian.worker.images import copying
from aeolian.worker.images.steps import StepFailed

from .conftest import DEBIAN


def tree_of(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


@pytest.fixture
def context(bench):
    return (
        bench.file("/a.txt", "A"),
        bench.file("/src/app.py", "app"),
        bench.file("/src/run.sh", "#!/bin/sh\necho ran\n", 0o755),
        bench.file("/src/lib/deep.py", "deep"),
        bench.file("/.hidden", "h"),
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("COPY a.txt /x", ["x"]),
        ("COPY /a.txt /x", ["x"]),
        ("COPY a.txt /x/", ["x/a.txt"]),
        ("COPY a.txt .", ["w/a.txt"]),
        ("COPY a.txt sub/b", ["w/sub/b"]),
        ("COPY src /x", ["x/app.py", "x/lib/deep.py", "x/run.sh"]),
        ("COPY src/ /x/", ["x/app.py", "x/lib/deep.py", "x/run.sh"]),
        ("COPY src/. /x", ["x/app.py", "x/lib/deep.py", "x/run.sh"]),
        ("COPY src/*.py /x/", ["x/app.py"]),
        ("COPY s?c/app.py a.txt /x/", ["x/a.txt", "x/app.py"]),
        ('COPY ["a.txt", "/x y"]', ["x y"]),
        ("COPY --exclude=*.py src /x", ["x/run.sh"]),
        ("COPY . /x", ["x/.hidden", "x/a.txt", "x/src/app.py", "x/src/lib/deep.py", "x/src/run.sh"]),
        ("ADD a.txt /x", ["x"]),
        ("COPY ../../a.txt /x", ["x"]),  # as Docker: the context's root is as high as it goes
    ],
)
async def test_sources_land_where_docker_puts_them(bench, context, tmp_path, line, expected):
    image = await bench.build("FROM scratch", "WORKDIR /w", line, context=context)
    with bench.mounted(image, tmp_path) as root:
        assert tree_of(root) == expected


async def test_modes_and_owners_are_the_contexts_unless_told(bench, context, tmp_path):
    image = await bench.build(
        DEBIAN,
        "COPY src /plain",
        "COPY --chown=nobody:nogroup --chmod=640 src /told",
        "COPY --chown=12:34 a.txt /new/folder/",
        context=context,
    )
    with bench.mounted(image, tmp_path) as root:
        plain, told, owned = (root / name for name in ("plain/run.sh", "told/lib/deep.py", "new/folder/a.txt"))
        assert (stat.S_IMODE(plain.stat().st_mode), plain.stat().st_uid) == (0o755, 0)
        assert (stat.S_IMODE(told.stat().st_mode), told.stat().st_uid) == (0o640, 65534)
        assert (owned.stat().st_uid, owned.stat().st_gid, owned.parent.stat().st_uid) == (12, 34, 12)


async def test_existing_files_are_replaced_and_existing_folders_kept(bench, context, tmp_path):
    image = await bench.build(
        DEBIAN,
        "RUN mkdir -m 700 /x && echo old > /x/app.py && echo other > /x/other && ln -s /etc/hostname /x/run.sh",
        "COPY src /x",
        "COPY a.txt /x",
        context=context,
    )
    with bench.mounted(image, tmp_path) as root:
        assert tree_of(root / "x") == ["a.txt", "app.py", "lib/deep.py", "other", "run.sh"]
        assert (root / "x/app.py").read_text() == "app"
        assert not (root / "x/run.sh").is_symlink()
        assert stat.S_IMODE((root / "x").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (["COPY src/app.py src/run.sh /etc/passwd"], "is a file"),
        (["COPY a.txt /etc/passwd/x"], "is a file"),
        (["COPY --chown=ghost a.txt /x"], "no ghost in the image"),
        (["RUN mkdir -p /x/a.txt", "COPY a.txt /x"], "is a folder"),
    ],
)
async def test_impossible_targets_are_refused(bench, context, lines, what):
    with pytest.raises(StepFailed, match=what):
        await bench.build(DEBIAN, *lines, context=context)


# ---- escapes --------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path):
    """A folder of the host that no build may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("of the host")
    return folder


@pytest.mark.parametrize("target", ["/way/in", "/way/../way/in", "/../way/in", "/climb/in"])
async def test_links_in_the_image_lead_nowhere_outside(bench, context, outside, target):
    await bench.build(
        DEBIAN,
        f"RUN ln -s {outside} /way && ln -s ../../../../../../..{outside} /climb && mkdir -p {outside}",
        f"COPY a.txt {target}",
        f"COPY src {target}2/",
        f"ADD a.txt {target}3",
        f"WORKDIR {target}4",
        context=context,
    )
    assert [path.name for path in outside.iterdir()] == ["secret"]


@pytest.mark.parametrize("link", ["{outside}/secret", "../../../../../../../../..{outside}/secret"])
async def test_links_in_another_stage_show_nothing_of_the_host(bench, outside, link):
    steps = [f"{DEBIAN} AS evil", f"RUN ln -s {link.format(outside=outside)} /way && ln -s {outside} /folder"]
    for source in ("/way", "/folder/secret", "/../../..{outside}/secret"):
        with pytest.raises(StepFailed, match="no such file"):
            await bench.build(*steps, DEBIAN, f"COPY --from=evil {source.format(outside=outside)} /got")
    for source in ("/way", "/folder"):
        with pytest.raises(StepFailed):
            await bench.build(
                *steps, DEBIAN, f"RUN --mount=type=bind,from=evil,source={source},target=/got cat /got /got/secret"
            )
    assert "of the host" not in bench.log


async def test_a_step_cannot_mount_or_see_the_hosts_folders(bench, outside):
    await bench.build(
        DEBIAN,
        f"RUN ! test -e {outside}; ! mount -t tmpfs none /mnt 2>/dev/null; ! mknod /disk b 254 0 2>/dev/null;"
        " ! chroot /proc/1/root true 2>/dev/null || test ! -e /proc/1/root/__modal/host; ps 2>/dev/null; ls /proc",
    )
    numbers = [line for line in bench.log.splitlines() if line.isdigit()]
    assert len(numbers) <= 6  # its own processes only


async def test_a_step_cannot_change_the_hosts_kernel(bench):
    await bench.build(
        DEBIAN,
        "RUN ! test -w /proc/sys/kernel/core_pattern && ! test -w /proc/sysrq-trigger && ! test -s /proc/kcore"
        " && ! test -w /sys/kernel && ! umount /proc/sys 2>/dev/null"
        " && ! unshare -Urm umount /proc/sys 2>/dev/null && ! unshare -Urmpf mount -t proc none /mnt 2>/dev/null",
    )


async def test_archives_that_climb_stay_inside(bench, context, outside, tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("way")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        archive.addfile(link)
        for name in ("../../../../../../climbed", "way/written", str(outside / "absolute")):
            member = tarfile.TarInfo(name)
            archive.addfile(member)
    digest, size = bench.content.put_file(path)
    entry = bench.file("/evil.tar", "")
    entry = type(entry)("/evil.tar", digest, size)
    with contextlib.suppress(StepFailed):  # refused is fine, too
        await bench.build(DEBIAN, "ADD evil.tar /unpacked/", context=(entry,))
    assert [path.name for path in outside.iterdir()] == ["secret"]


# ---- ADD ------------------------------------------------------------------------------------------------


async def test_add_unpacks_archives_and_copy_does_not(bench, tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/file").write_text("x")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "inside", "inside")
    digest, size = bench.content.put_file(tmp_path / "a.tar.gz")
    context = (type(bench.file("/x", ""))("/a.tar.gz", digest, size),)
    image = await bench.build("FROM scratch", "ADD a.tar.gz /x/", "COPY a.tar.gz /y/", context=context)
    with bench.mounted(image, tmp_path / "m") as root:
        assert tree_of(root) == ["x/inside/file", "y/a.tar.gz"]


@pytest.fixture
def web(tmp_path):
    """A web server on loopback; returns its address."""
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "data.bin").write_bytes(os.urandom(3000))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=folder, **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


async def test_add_fetches_addresses_and_notices_that_they_changed(bench, web, tmp_path):
    address, folder = web
    lines = ("FROM scratch", f"ADD {address}/data.bin /x/")
    first = await bench.build(*lines)
    same = await bench.build(*lines, image_id="im-same")
    (folder / "data.bin").write_bytes(b"changed")
    changed = await bench.build(*lines, image_id="im-changed")
    assert first.layers == same.layers != changed.layers
    with bench.mounted(changed, tmp_path / "m") as root:
        assert (root / "x/data.bin").read_bytes() == b"changed"
    with pytest.raises(Unavailable, match="404"):
        await bench.build("FROM scratch", f"ADD {address}/missing /x/")


# ---- patterns, without a build --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.txt", ["a.txt"]),
        ("./a.txt", ["a.txt"]),
        ("/", [""]),
        (".", [""]),
        ("src/*", ["src/app.py", "src/lib"]),
        ("*/app.py", ["src/app.py"]),
        ("[ab].txt", ["a.txt"]),
        ("src/../a.txt", ["a.txt"]),
    ],
)
def test_patterns_name_files_and_folders(pattern, expected):
    context = copying.Context((path, "", 0o644) for path in ("a.txt", "src/app.py", "src/lib/deep.py"))
    assert copying.matches(context, pattern) == expected


def test_a_pattern_that_names_nothing_is_refused():
    with pytest.raises(copying.Refused, match=r"\*\.md"):
        copying.matches(copying.Context([("a.txt", "", 0o644)]), "*.md")


async def test_sources_missing_from_the_context_are_told_before_anything_runs(bench, context):
    with pytest.raises(InvalidArgument, match=r"nowhere\.txt.*not in the build context"):
        await bench.build("FROM scratch", "COPY nowhere.txt /x", context=context)
