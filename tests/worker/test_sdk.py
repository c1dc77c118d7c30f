import asyncio
import importlib.metadata
import sys

import pytest

from aeolian.domain.errors import InvalidArgument, NotFound, Unavailable
from aeolian.worker import sdk
from aeolian.worker.interpreters import Interpreters
from aeolian.worker.sdk import SdkStore, own_version

SERIES = f"{sys.version_info.major}.{sys.version_info.minor}"


class Installs:
    """Stands in for uv: writes one module per call, refuses what is not in `index`."""

    def __init__(self, unknown=(), reachable=True):
        self.calls = []
        self.unknown = unknown
        self.reachable = reachable

    async def __call__(self, arguments, target, what):
        self.calls.append(arguments)
        await asyncio.sleep(0)
        if not self.reachable:
            raise Unavailable(f"{what}: out of reach")
        for requirement in arguments:
            if requirement.split(" ")[0] in self.unknown:
                raise NotFound(f"Because there is no version of {requirement.split(' ')[0]} and you require it")
        for argument in arguments:
            if "==" in argument and argument.startswith("modal"):
                version = argument.split("==")[1]
                info = target / f"modal-{version}.dist-info"
                info.mkdir(parents=True)
                (info / "METADATA").write_text("Requires-Dist: synchronicity~=0.1\nRequires-Dist: x; extra == 'y'\n")
                (target / "modal").mkdir()
                (target / "modal" / "__init__.py").write_text("")
                (target / "junk.py").write_text("")


@pytest.fixture
def installs(monkeypatch):
    installs = Installs()
    monkeypatch.setattr(sdk, "_install", installs)
    return installs


@pytest.fixture
def store(tmp_path):
    return SdkStore(tmp_path, Interpreters(tmp_path))


async def test_our_own_version_is_copied_and_compiled_without_an_index(store, installs):
    folder = await store.packages(own_version(), SERIES)
    assert installs.calls == []
    assert {"modal", "modal_proto", "modal_version", "synchronicity", "sitecustomize.py"} <= {
        p.name for p in folder.iterdir()
    }
    tag = SERIES.replace(".", "")
    assert (folder / f"modal/__pycache__/_container_entrypoint.cpython-{tag}.pyc").exists()
    assert "/__modal/deps" in (folder / "sitecustomize.py").read_text()


async def test_what_an_older_aeolian_runs_first_in_containers_is_renewed(store, installs):
    site = await store.packages(own_version(), SERIES) / "sitecustomize.py"
    (compiled,) = site.parent.glob("__pycache__/sitecustomize.*")
    new, new_compiled = site.read_text(), compiled.read_bytes()
    site.write_text("# of an older version")
    compiled.write_bytes(b"old")
    await store.packages(own_version(), SERIES)
    assert (site.read_text(), compiled.read_bytes()) == (new, new_compiled)


async def test_asking_twice_at_once_builds_once(store, installs):
    first, second = await asyncio.gather(store.packages("1.0.7", SERIES), store.packages("1.0.7", SERIES))
    assert first == second == store.root / "1.0.7" / "pkg"
    assert installs.calls == [["--no-deps", "modal==1.0.7"], ["--no-deps", "synchronicity~=0.1"]]
    assert not (first / "junk.py").exists()
    await store.packages("1.0.7", SERIES)
    assert len(installs.calls) == 2


@pytest.mark.parametrize("version", ["", "../1", "1.6", "1.6.4; rm", "--index-url=x", "1.6.4/..", "1.6.4\n"])
async def test_what_is_no_version_reaches_neither_path_nor_command(store, installs, version):
    with pytest.raises(InvalidArgument):
        await store.packages(version, SERIES)
    with pytest.raises(InvalidArgument):
        await store.dependencies(version, "2025.06", SERIES)
    with pytest.raises(InvalidArgument):
        await store.dependencies("1.6.4", version, SERIES)
    with pytest.raises(InvalidArgument):
        await store.packages("1.6.4", version)
    assert installs.calls == []


async def test_a_pin_that_the_index_lacks_is_loosened_the_others_stay(store, installs):
    pins = sdk._pinned_list(store.root, "2025.06").read_text().splitlines()
    pin = next(line.split(" ")[0] for line in pins if line.startswith("certifi=="))
    installs.unknown = (pin,)
    await store.dependencies(own_version(), "2025.06", SERIES)
    assert len(installs.calls) == 2
    assert "certifi" in installs.calls[1]
    assert any(requirement.startswith("h2==") for requirement in installs.calls[1])


async def test_without_an_index_our_own_dependencies_serve_our_own_version_only(store, installs):
    installs.reachable = False
    folder = await store.dependencies(own_version(), "2025.06", SERIES)
    assert folder.name.startswith("own-")
    assert (folder / "grpclib").is_dir() and (folder / "google/protobuf").is_dir()
    version = importlib.metadata.version("protobuf")
    assert (folder / f"protobuf-{version}.dist-info").is_dir()
    with pytest.raises(Unavailable):
        await store.packages("1.0.7", SERIES)
    assert not (store.root / "1.0.7").exists()
