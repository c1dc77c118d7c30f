import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound
from aeolian.domain.images import ContextFile
from aeolian.worker.images.mode import WHOLE
from aeolian.worker.images.step_limits import StepLimits
from aeolian.worker.images.steps import StepFailed
from aeolian.worker.images.store import StoredImage

from .conftest import DEBIAN, Workbench


def running(words):
    """Whether a process of this host has these words (NUL between them) in its command line."""
    found = False
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found = found or words.encode() in path.read_bytes()
    return found


def holding(content, folder):
    """The files and names below `folder` that have that content."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    small = [path for path in files if path.stat().st_size < 1 << 20]
    return [path for path in small if content in path.read_bytes() or content in os.fsencode(path)]


def lines_of(bench, marker):
    return [line.removeprefix(marker) for line in bench.log.splitlines() if line.startswith(marker)]


async def test_commands_run_in_a_root_of_their_own(bench):
    await bench.build(DEBIAN, "RUN echo id=$(id -un) && . /etc/os-release && echo suite=$VERSION_CODENAME && ls /dev")
    assert lines_of(bench, "id=") == ["root"]
    assert lines_of(bench, "suite=") == ["bookworm"]
    assert not any(line.startswith(("sd", "vd", "nvme", "loop")) for line in bench.log.splitlines())


async def test_the_description_says_what_the_dockerfile_says(bench):
    image = await bench.build(
        DEBIAN,
        "ARG VERSION=1",
        "ENV A=$VERSION B='two words'",
        "WORKDIR /srv/app",
        "WORKDIR sub",
        "USER nobody",
        "LABEL team=search",
        "EXPOSE 80 443/tcp",
        "VOLUME /data",
        "STOPSIGNAL SIGINT",
        'SHELL ["/bin/bash", "-c"]',
        'ENTRYPOINT ["/bin/tool"]',
        "CMD serve --all",
        "HEALTHCHECK CMD true",
        "ONBUILD RUN true",
    )
    assert {name: image.env[name] for name in "AB"} == {"A": "1", "B": "two words"}
    assert (image.workdir, image.user, image.stop_signal) == ("/srv/app/sub", "nobody", "SIGINT")
    assert (image.labels, image.ports, image.volumes) == ({"team": "search"}, ("80", "443/tcp"), ("/data",))
    assert image.entrypoint == ("/bin/tool",)
    assert image.cmd == ("/bin/bash", "-c", "serve --all")


async def test_an_entry_point_drops_the_command_of_the_base(bench):
    base = await bench.build(DEBIAN, 'CMD ["sleep", "1"]')
    image = await bench.build("FROM base", 'ENTRYPOINT ["/x"]', base_image_ids={"base": base.image_id})
    both = await bench.build(DEBIAN, 'CMD ["a"]', 'ENTRYPOINT ["/x"]')
    assert base.cmd == ("sleep", "1")
    assert image.cmd == ()
    assert both.cmd == ("a",)


async def test_a_path_that_is_extended_still_has_the_usual_folders(bench):
    image = await bench.build(DEBIAN, "ENV PATH=/new/bin:$PATH", "RUN ls /")
    assert image.env["PATH"].startswith("/new/bin:/usr/local/sbin:")
    assert image.env["PATH"].endswith(":/bin")


async def test_build_arguments_are_seen_by_from_and_run_but_kept_by_neither(bench):
    image = await bench.build(
        "ARG SUITE=nowhere",
        "FROM debian:$SUITE-slim",
        "ARG SUITE",
        "ARG TARGETARCH",
        "ARG GREETING=hello",
        "RUN echo said=$GREETING-$SUITE-$TARGETARCH",
        build_args={"SUITE": "bookworm", "GREETING": "hi"},
    )
    assert lines_of(bench, "said=")[0].startswith("hi-bookworm-")
    assert "GREETING" not in image.env


async def test_users_run_as_themselves(bench):
    image = await bench.build(
        DEBIAN,
        "RUN useradd --create-home joe",
        "USER joe",
        "RUN echo who=$(id -u):$(id -g):$HOME; touch ~/mine; ! touch /nope",
        "USER joe:root",
        "RUN echo group=$(id -gn)",
    )
    assert lines_of(bench, "who=") == ["1000:1000:/home/joe"]
    assert lines_of(bench, "group=") == ["root"]
    assert image.user == "joe:root"
    with pytest.raises(StepFailed, match="no user or group ghost"):
        await bench.build(DEBIAN, "USER ghost", "RUN true")


async def test_here_documents_are_scripts_and_files(bench):
    await bench.build(
        DEBIAN,
        "ENV NAME=world",
        "RUN <<EOF",
        "greeting=hello",
        "echo one=$greeting-$NAME",
        "EOF",
        "RUN cat <<EOF > /written",
        "two=$NAME",
        "EOF",
        "COPY <<EOF <<'RAW' /copied/",
        "three=$NAME",
        "EOF",
        "four=$NAME",
        "RAW",
        "RUN cat /written /copied/EOF /copied/RAW",
    )
    assert lines_of(bench, "one=") == ["hello-world"]
    assert lines_of(bench, "two=") == ["world"]
    assert lines_of(bench, "three=") == ["world"]
    assert lines_of(bench, "four=") == ["$NAME"]


async def test_the_exec_form_has_no_shell(bench):
    await bench.build(DEBIAN, 'RUN ["/bin/echo", "raw=$HOME"]')
    assert lines_of(bench, "raw=") == ["$HOME"]


async def test_stages_give_files_to_one_another(bench, tmp_path):
    image = await bench.build(
        f"{DEBIAN} AS build",
        "RUN mkdir /out && echo made > /out/result && ln -s result /out/link && ln -s /out/result /pointer",
        "FROM scratch",
        "COPY --from=build /out /app/",
        "COPY --from=0 /pointer /followed",
    )
    with bench.mounted(image, tmp_path) as root:
        assert sorted(os.listdir(root)) == ["app", "followed"]
        assert (root / "app/result").read_text() == "made\n"
        assert os.readlink(root / "app/link") == "result"
        assert (root / "followed").read_text() == "made\n"
    assert image.python == ""


async def test_what_a_later_step_removes_is_gone(bench, tmp_path):
    image = await bench.build(
        DEBIAN,
        "RUN mkdir -p /keep/sub && echo 1 > /keep/a && echo 2 > /keep/sub/b && echo 3 > /single",
        "RUN rm /single /etc/debian_version && rm -r /keep/sub && mkdir /keep/sub && echo new > /keep/sub/c",
        "RUN mv /keep /moved",
    )
    with bench.mounted(image, tmp_path) as root:
        assert not (root / "single").exists()
        assert not (root / "etc/debian_version").exists()
        assert not (root / "keep").exists()
        assert sorted(str(path.relative_to(root / "moved")) for path in (root / "moved").rglob("*")) == [
            "a",
            "sub",
            "sub/c",
        ]


async def test_a_failing_step_is_named_with_the_end_of_its_output(bench):
    with pytest.raises(StepFailed) as caught:
        await bench.build(DEBIAN, "ENV A=1", "RUN seq 100; echo to stderr >&2; exit 7", "RUN true")
    message = caught.value.message
    assert "step 3/4 (RUN seq 100;" in message
    assert "exit code 7" in message
    assert "\n100" in message and "to stderr" in message
    assert "\n50\n" not in message
    assert "100\n" in bench.log


async def test_a_failed_build_leaves_no_image(bench):
    with pytest.raises(StepFailed):
        await bench.build(DEBIAN, "RUN false", image_id="im-failed")
    assert not bench.store.has("im-failed")
    assert not list(bench.store.layers_folder.glob(".new-*"))


async def test_commands_that_are_not_there_say_so(bench):
    with pytest.raises(StepFailed, match=r"exit code 127 \(command not found\)"):
        await bench.build(DEBIAN, "RUN no-such-command")
    with pytest.raises(StepFailed, match="/no/such: there is no such program in the image"):
        await bench.build(DEBIAN, 'RUN ["/no/such"]')


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (["RUN true"], "before FROM"),
        (["ARG A"], "no FROM line"),
        (["FROM a b"], "FROM image AS name"),
        (["FROM scratch", "NONSENSE x"], "NONSENSE"),
        (["FROM scratch", "COPY a"], "a source and a target"),
        (["FROM scratch", "COPY --parents a b"], "--parents is not supported"),
        (["FROM scratch", "COPY missing /x"], "missing: no such file"),
        (["FROM scratch", "WORKDIR $NOTHING"], "comes to nothing"),
        (["FROM scratch", "RUN --mount=type=odd true"], "the type is one of"),
        (["FROM scratch", "SHELL bash"], "must be a list"),
        (["FROM --platform=linux/riscv64 scratch"], "builds and runs linux/"),
        (["FROM scratch", "RUN --device=gpu true"], "--device is not supported"),
    ],
)
async def test_what_makes_no_sense_is_refused(bench, lines, what):
    with pytest.raises(InvalidArgument, match=what):
        await bench.build(*lines)


async def test_an_image_for_another_machine_is_refused(bench):
    with pytest.raises(InvalidArgument, match="the image is for riscv64"):
        await bench.build("FROM scratch", arch="riscv64")


async def test_values_of_several_lines_are_kept(bench):
    image = await bench.build(DEBIAN, "ENV TEXT='first\nsecond' OTHER=x", 'RUN echo "$TEXT"')
    assert image.env["TEXT"] == "first\nsecond"
    assert "first\nsecond\n" in bench.log


async def test_an_image_has_room_for_many_layers_but_not_for_any_number(bench, tmp_path):
    layers = []
    for number in range(125):
        folder = bench.store.new_folder()
        (folder / f"{number:03}").mkdir()
        layers.append(f"many-layers-of-an-image-{number:03}")
        bench.store.commit_layer(layers[-1], folder)
    bench.store.put(StoredImage("im-many", layers=tuple(layers)))
    image = await bench.build("FROM base", "WORKDIR /last", base_image_ids={"base": "im-many"})
    assert len(image.layers) == 126
    with bench.mounted(image, tmp_path) as root:
        assert len(os.listdir(root)) == 126
    with pytest.raises(InvalidArgument, match="127 layers at most"):
        await bench.build("FROM base", *(f"WORKDIR /{name}" for name in "abc"), base_image_ids={"base": "im-many"})


async def test_a_working_directory_is_made(bench, tmp_path):
    image = await bench.build(DEBIAN, "USER nobody", "WORKDIR /srv/deep/folder", "WORKDIR /tmp")
    with bench.mounted(image, tmp_path) as root:
        assert (root / "srv/deep/folder").is_dir()
        assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777


async def test_an_unknown_base_image_id_says_what_to_do(bench):
    with pytest.raises(NotFound, match="build it again"):
        await bench.build("FROM base", base_image_ids={"base": "im-unknown"})


# ---- caching --------------------------------------------------------------------------------------------


class Counter:
    """Counts runs of a step by a file in a cache mount."""

    def __init__(self, bench, name):
        self.step = (
            f"RUN --mount=type=cache,id={name},target=/count echo ran >> /count/runs; wc -l < /count/runs > /num"
        )
        self._bench, self._name = bench, name

    def value(self):
        caches = (self._bench.data_dir / "builds/caches").glob("*/runs")
        return max((len(path.read_text().splitlines()) for path in caches), default=0)


@pytest.fixture
def own_bench(tmp_path, bench):
    """With an empty cache."""
    return Workbench(tmp_path / "own", mode=WHOLE)


async def test_equal_steps_run_once_over_images_and_restarts(own_bench):
    counter = Counter(own_bench, "equal")
    first = await own_bench.build(DEBIAN, counter.step)
    second = await own_bench.build(DEBIAN, counter.step, "ENV A=1")
    restarted = Workbench(own_bench.data_dir, mode=WHOLE)
    third = await restarted.build(DEBIAN, counter.step, "ENV A=2")
    assert counter.value() == 1
    assert first.layers == second.layers == third.layers
    assert "CACHED" in restarted.log
    await own_bench.build(DEBIAN, "ENV B=1", counter.step)
    assert counter.value() == 2


async def test_forced_builds_run_again_and_leave_the_old_layers_alone(own_bench, tmp_path):
    counter = Counter(own_bench, "forced")
    old = await own_bench.build(DEBIAN, counter.step, image_id="im-old")
    new = await own_bench.build(DEBIAN, counter.step, image_id="im-new", force=True)
    ignoring = await own_bench.build(DEBIAN, counter.step, image_id="im-ignoring", ignore_cache=True)
    after = await own_bench.build(DEBIAN, counter.step, image_id="im-after")
    assert counter.value() == 3
    assert after.layers == ignoring.layers != new.layers
    for number, image in enumerate((old, new), 1):
        with own_bench.mounted(image, tmp_path / str(number)) as root:
            assert (root / "num").read_text() == f"{number}\n"


async def test_equal_steps_asked_for_at_the_same_time_run_once(own_bench):
    counter = Counter(own_bench, "same-time")
    step = counter.step.replace("echo ran", "sleep 0.5; echo ran")
    images = await asyncio.gather(
        *(own_bench.build(DEBIAN, step, f"ENV N={number}") for number in range(4)),
    )
    assert counter.value() == 1
    assert len({image.layers for image in images}) == 1
    assert "waiting for it" in own_bench.log


async def test_a_build_that_is_given_up_does_not_end_another_ones_step(own_bench):
    counter = Counter(own_bench, "given-up")
    step = counter.step.replace("echo ran", "echo begun; sleep 1; echo ran")
    first = asyncio.create_task(own_bench.build(DEBIAN, step, "ENV N=1"))
    await own_bench.until_said("begun\n")
    second = asyncio.create_task(own_bench.build(DEBIAN, step, "ENV N=2"))
    await own_bench.until_said("waiting for it")
    first.cancel()
    await second
    assert counter.value() == 1


async def test_a_cancelled_build_ends_its_processes_and_leaves_nothing(own_bench):
    task = asyncio.create_task(own_bench.build(DEBIAN, "RUN echo begun; (sleep 4321 &) ; sleep 4321"))
    await own_bench.until_said("begun\n")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not running("sleep\0004321")
    assert not list(own_bench.store.layers_folder.glob(".new-*"))


# ---- secrets --------------------------------------------------------------------------------------------


async def test_secrets_are_seen_by_steps_and_kept_nowhere(own_bench):
    secret = "f0e1d2c3b4a5-very-secret"
    image = await own_bench.build(
        DEBIAN,
        "RUN echo length=${#TOKEN}",
        "RUN --mount=type=secret,id=TOKEN echo file=$(wc -c < /run/secrets/TOKEN)",
        "RUN --mount=type=secret,id=TOKEN,env=OTHER echo other=${#OTHER}",
        "RUN --mount=type=secret,id=MISSING echo optional",
        env={"TOKEN": secret},
    )
    assert lines_of(own_bench, "length=") == [str(len(secret))]
    assert lines_of(own_bench, "file=") == [str(len(secret))]
    assert lines_of(own_bench, "other=") == [str(len(secret))]
    assert "TOKEN" not in image.env
    assert not holding(secret.encode(), own_bench.data_dir)
    with pytest.raises(InvalidArgument, match="'MISSING'"):
        await own_bench.build(DEBIAN, "RUN --mount=type=secret,id=MISSING,required=true true")


async def test_another_secret_is_another_step(own_bench):
    counter = Counter(own_bench, "secrets")
    for value in ("one", "two", "one"):
        await own_bench.build(DEBIAN, counter.step, env={"TOKEN": value})
    assert counter.value() == 2


async def test_nothing_of_the_hosts_settings_stays_in_a_layer(own_bench):
    image = await own_bench.build(DEBIAN, "RUN ls /__modal/build && test -s /etc/resolv.conf && touch /done")
    topmost = own_bench.store.layer_paths(image)[0]
    assert [path.name for path in topmost.iterdir()] == ["done"]


# ---- Python ---------------------------------------------------------------------------------------------


async def test_a_python_base_has_pip_and_says_what_it_is(bench):
    image = await bench.build(
        "FROM python:3.11-slim-bookworm",
        "COPY /.requirements.txt /.requirements.txt",
        "RUN python -m pip install -r /.requirements.txt",
        "RUN pip --version && python3 -c 'import ssl, sqlite3, ctypes, six; print(\"six=\" + six.__file__)'",
        context_files=(ContextFile("/.requirements.txt", b"six\n"),),
    )
    assert image.python == "/usr/local/bin/python"
    assert image.python_version.startswith("3.11.")
    assert image.info["python_version"] == image.python_version
    assert image.info["image_builder_version"] == "2025.06"
    assert '"six"' in image.info["python_packages"]
    assert image.info["libc_version"].startswith("glibc 2.")
    assert lines_of(bench, "six=")[0].startswith("/usr/local/lib/python3.11/")


async def test_uv_is_supplied_where_its_image_cannot_be_reached(bench):
    image = await bench.build(
        "FROM python:3.11-slim-bookworm",
        "COPY --from=ghcr.io/astral-sh/uv:latest /uv /.uv/uv",
        "COPY pyproject.toml /.uv/pyproject.toml",
        "RUN /.uv/uv sync --project=/.uv --no-install-workspace --compile-bytecode",
        "ENV PATH=/.uv/.venv/bin:$PATH",
        context_files=(
            ContextFile(
                "/pyproject.toml",
                b'[project]\nname = "app"\nversion = "0"\nrequires-python = ">=3.10"\ndependencies = ["six"]\n',
            ),
        ),
    )
    assert image.python == "/.uv/.venv/bin/python"
    assert '"six"' in image.info["python_packages"]


async def test_a_python_that_is_nowhere_is_told_with_those_that_are(bench, monkeypatch):
    monkeypatch.setattr("aeolian.worker.interpreters._download", lambda series, target: False)
    with pytest.raises(NotFound, match=r"Python 3\.99 .* there is Python .*3\.11"):
        await bench.build("FROM python:3.99-slim-bookworm")


async def test_debian_packages_can_be_installed(bench):
    await bench.build(DEBIAN, "RUN apt-get update", "RUN apt-get install -y hello && echo said=$(hello)")
    assert lines_of(bench, "said=") == ["Hello, world!"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("nvidia/cuda:12.4.0-devel-ubuntu22.04", "debian_slim.* torch"),
        ("mambaorg/micromamba:2.1.1-debian12-slim", "Image.micromamba"),
        ("registry.example.com/team/app:1", "give this host access to the registry"),
    ],
)
async def test_what_only_a_registry_has_comes_with_advice(bench, name, advice):
    with pytest.raises(FailedPrecondition, match=advice):
        await bench.build(f"FROM {name}")


async def test_a_command_mounts_nothing_makes_no_namespaces_and_has_limits(bench):
    await bench.build(
        DEBIAN,
        "RUN ! mount -t tmpfs none /mnt 2>&1 && ! unshare -U true 2>&1 && grep Seccomp: /proc/self/status",
        "RUN cat /proc/self/cgroup",
    )
    assert "Seccomp:\t2" in bench.log
    if StepLimits(bench.data_dir).are_there:
        assert "-builds/" in bench.log
