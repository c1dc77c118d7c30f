"""Images over the host's own folders, and on hosts that have not even namespaces."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound
from aeolian.domain.images import ContextFile
from aeolian.worker.images.mode import Mode
from aeolian.worker.images.portable import Install, as_install
from aeolian.worker.images.steps import StepFailed
from aeolian.worker.runtimes import view

from .conftest import Workbench
from .test_builder import lines_of

SERIES = f"{sys.version_info.major}.{sys.version_info.minor}"
SLIM = (
    f"FROM python:{SERIES}-slim-bookworm",
    "RUN apt-get update",
    "RUN apt-get install -y gcc gfortran build-essential",
    "RUN echo 'debconf debconf/frontend select Noninteractive' | debconf-set-selections",
    'CMD ["sleep", "172800"]',
)
REQUIREMENTS = (ContextFile("/.requirements.txt", b"six\n"),)


@pytest.fixture
def over_host(tmp_path):
    probe = [sys.executable, "-I", view.__file__, str(tmp_path / "probe"), "user"]
    done = subprocess.run(probe, capture_output=True, text=True)
    problem = json.loads(done.stdout) if done.stdout else done.stderr
    if problem:
        pytest.skip(f"needs user namespaces: {problem}")
    return Workbench(tmp_path / "own", mode=Mode("over_host", own_pids=False))


@pytest.fixture
def portable(tmp_path):
    return Workbench(tmp_path / "own", mode=Mode("portable", own_pids=False, problem="there are no namespaces here"))


async def test_debian_slim_is_a_virtual_environment_of_the_hosts_python(over_host):
    base = await over_host.build(*SLIM)
    image = await over_host.build(
        "FROM base",
        "COPY /.requirements.txt /.requirements.txt",
        "RUN python -m pip install -r /.requirements.txt",
        "RUN python -c 'import six; print(\"six=\" + six.__file__)'; echo which=$(command -v python)",
        base_image_ids={"base": base.image_id},
        context_files=REQUIREMENTS,
    )
    assert image.over_host
    assert image.python == "/opt/python/bin/python"
    assert Path(image.host_python).exists()
    assert image.python_version.startswith(SERIES)
    assert '"six"' in image.info["python_packages"]
    assert lines_of(over_host, "six=")[0].startswith("/opt/python/lib/")
    assert lines_of(over_host, "which=") == ["/opt/python/bin/python"]
    assert over_host.log.count("left out") == 3
    topmost = over_host.store.layer_paths(image)
    assert any((layer / image.host_path[0] / "six.py").exists() for layer in topmost)


async def test_layers_over_the_host_hold_only_what_steps_changed(over_host):
    image = await over_host.build(
        "FROM debian:bookworm-slim",
        "RUN mkdir -p /data/sub && echo 1 > /data/one && echo 2 > /etc/aeolian-two && touch ~/three",
        "RUN rm /data/one && test -e /etc/aeolian-two && test -e /root/three && test -d /usr/bin",
    )
    upper, lower = over_host.store.layer_paths(image)
    files = lambda layer: sorted(str(path.relative_to(layer)) for path in layer.rglob("*"))  # noqa: E731
    assert files(lower) == ["data", "data/one", "data/sub", "etc", "etc/aeolian-two", "root", "root/three"]
    assert files(upper) == ["data", "data/one"]
    assert not (upper / "data/one").is_file(), "a whiteout"
    assert not Path("/etc/aeolian-two").exists()


async def test_system_packages_need_root(over_host):
    with pytest.raises(InvalidArgument, match=r"apt-get changes the system.*run Aeolian as root"):
        await over_host.build(SLIM[0], "RUN apt-get install -y git")
    with pytest.raises(InvalidArgument, match="apt changes the system"):
        await over_host.build(SLIM[0], "RUN true && apt install git")
    await over_host.build(SLIM[0], "RUN echo apt-get is only a word here")


async def test_registries_need_root(over_host):
    with pytest.raises(FailedPrecondition, match="without root no image of a registry"):
        await over_host.build("FROM alpine:3.20")


async def test_a_python_that_the_host_lacks_is_told(over_host, monkeypatch):
    monkeypatch.setattr("aeolian.worker.interpreters._download", lambda series, target: False)
    with pytest.raises(NotFound, match=f"no Python 3.99 .*{SERIES}"):
        await over_host.build("FROM python:3.99-slim")


async def test_failing_steps_over_the_host_are_told(over_host):
    with pytest.raises(StepFailed, match="exit code 3"):
        await over_host.build("FROM debian:bookworm-slim", "RUN exit 3")


# ---- no namespaces --------------------------------------------------------------------------------------


async def test_packages_go_into_a_plain_folder(portable):
    base = await portable.build(*SLIM)
    image = await portable.build(
        "FROM base",
        "COPY /.requirements.txt /.requirements.txt",
        "RUN python -m pip install -r /.requirements.txt",
        "COPY --from=ghcr.io/astral-sh/uv:latest /uv /.uv/uv",
        "RUN /.uv/uv pip install --python $(command -v python) --compile-bytecode 'idna>=3'",
        "ENV A=1",
        "WORKDIR /srv",
        base_image_ids={"base": base.image_id},
        context_files=REQUIREMENTS,
    )
    assert image.over_host
    assert image.python == image.host_python
    assert set(json.loads(image.info["python_packages"])) == {"six", "idna"}
    path = [str(layer / folder) for layer in portable.store.layer_paths(image) for folder in image.host_path]
    code = f"import sys; sys.path[:0] = {path}; import six, idna; print(six.__file__)"
    done = subprocess.run([image.host_python, "-c", code], capture_output=True, text=True, check=True)  # noqa: ASYNC221
    assert done.stdout.startswith(str(portable.data_dir))


async def test_uv_sync_installs_what_the_project_depends_on(portable):
    project = b'[project]\nname = "app"\nversion = "0"\nrequires-python = ">=3.10"\ndependencies = ["six"]\n'
    image = await portable.build(
        SLIM[0],
        "COPY pyproject.toml /.uv/pyproject.toml",
        "RUN /.uv/uv sync --project=/.uv --no-install-workspace --compile-bytecode",
        context_files=(ContextFile("/pyproject.toml", project),),
    )
    assert set(json.loads(image.info["python_packages"])) == {"six"}


@pytest.mark.parametrize("command", ["echo hi > /x", "pip install six && rm -rf /", "pip install $X", "make"])
async def test_other_commands_are_refused_with_the_reason(portable, command):
    with pytest.raises(InvalidArgument, match=r"there are no namespaces here.*only pip and uv"):
        await portable.build(SLIM[0], f"RUN {command}")


async def test_copies_stay_inside_the_layer(portable, tmp_path):
    image = await portable.build(
        SLIM[0], "COPY a.txt ../../../../../x/", "COPY a.txt /y", context_files=(ContextFile("/a.txt", b"A"),)
    )
    trees = [
        sorted(str(path.relative_to(layer)) for path in layer.rglob("*")) for layer in portable.store.layer_paths(image)
    ]
    assert trees == [["y"], ["x", "x/a.txt"]]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("pip install six", Install(("six",))),
        ("python -m pip install 'six>=1' --pre", Install(("six>=1", "--prerelease=allow"))),
        ("pip install --no-cache-dir -i https://x/simple six", Install(("--index-url", "https://x/simple", "six"))),
        (
            "/.uv/uv pip install --python $(command -v python) --compile-bytecode six",
            Install(("--compile-bytecode", "six")),
        ),
        (
            "/.uv/uv sync --project=/.uv --no-install-workspace --compile-bytecode --group=dev --frozen",
            Install(("--group=dev", "--frozen"), "/.uv"),
        ),
        ("pip install six; true", None),
        ("pip install `x`", None),
        ("pip install six > log", None),
        ("pip list", None),
        ("pip install 'unfinished", None),
        ("sudo pip install six", None),
    ],
)
def test_commands_that_only_install_are_known(command, expected):
    assert as_install(["/bin/sh", "-c", command]) == expected
