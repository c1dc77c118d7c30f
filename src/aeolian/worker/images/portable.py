"""Builds on hosts without namespaces: layers are plain folders, into which Python packages and files are put.

Nothing else can be run without touching the host, so every other command is refused.
"""

import asyncio
import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from uv import find_uv_bin

from aeolian.domain.errors import InvalidArgument
from aeolian.storage.files import ContentStore
from aeolian.worker.images import copying
from aeolian.worker.images.over_host import is_left_to_host
from aeolian.worker.images.steps import OnLog, StepRunner
from aeolian.worker.images.store import ImageStore, StoredImage
from aeolian.worker.images.workshop import CopyJob, RunJob, write_own
from aeolian.worker.package_index import installer_env

PYTHON_SUBSTITUTION = re.compile(r"\$\(command -v python3?\)")
OPERATORS = frozenset("();<>|&")
INSTALLERS = (
    ("pip", "install"),
    ("pip3", "install"),
    ("python", "-m", "pip", "install"),
    ("python3", "-m", "pip", "install"),
    ("uv", "pip", "install"),
    ("/.uv/uv", "pip", "install"),
)
UV_SYNCS = (("uv", "sync"), ("/.uv/uv", "sync"))
DROPPED = frozenset(["--system", "--no-cache-dir", "--no-cache", "--compile", "--user", "--no-install-workspace"])
RENAMED = {"--pre": "--prerelease=allow", "-i": "--index-url", "-f": "--find-links"}
DIST_INFO = re.compile(r"(.+?)-([^-]+)\.dist-info")


class Install(NamedTuple):
    """A command that only installs packages, in uv's words."""

    arguments: tuple[str, ...]
    project: str = ""
    """For `uv sync`: the folder of its pyproject.toml."""


class PortableWorkshop:
    def __init__(self, store: ImageStore, content: ContentStore, steps: StepRunner, problem: str):
        self._store = store
        self._content = content
        self._steps = steps
        self._problem = problem

    async def run(
        self, folder: Path, image: StoredImage, job: RunJob, own: Mapping[str, bytes | Path], on_log: OnLog
    ) -> Path | None:
        if is_left_to_host(job, on_log):
            return None
        install = as_install(job.argv)
        if install is None or job.mounts or not image.host_python:
            raise InvalidArgument(
                f"this host gives builds no root file system of their own ({self._problem}), so that only pip and uv "
                "can be run, and nothing else along with them: run Aeolian as root, or where user namespaces are allowed"
            )
        env = {**os.environ, **installer_env(), **job.env, "PATH": os.environ.get("PATH", os.defpath)}
        arguments = [self._seen(argument, image) for argument in install.arguments]
        if install.project:
            arguments = await self._exported(
                folder, image, Path(self._seen(install.project, image)), arguments, env, on_log
            )
        tree = folder / "tree"
        target = tree / image.host_path[0]
        target.mkdir(parents=True)
        argv = [find_uv_bin(), "pip", "install", "--python", image.host_python, "--target", str(target), *arguments]
        await self._host(argv, folder, env, on_log)
        (target / ".lock").unlink(missing_ok=True)
        return tree

    async def copy(
        self, folder: Path, image: StoredImage, job: CopyJob, own: Mapping[str, bytes | Path], on_log: OnLog
    ) -> Path | None:
        tree = folder / "tree"
        tree.mkdir()
        try:
            await asyncio.to_thread(self._copy, tree, folder, job, own)
        except copying.Refused as error:
            raise InvalidArgument(str(error)) from None
        return tree

    async def inspect(self, folder: Path, image: StoredImage) -> str:
        if not image.host_python:
            return ""
        packages = await asyncio.to_thread(self._packages, image)
        libc = " ".join(platform.libc_ver()).strip() or "musl"
        facts = {"version": image.python_version, "libc": libc, "packages": packages}
        return f"{image.host_python}\n{json.dumps(facts)}"

    def _copy(self, tree: Path, folder: Path, job: CopyJob, own: Mapping[str, bytes | Path]) -> None:
        target = str(tree) + job.target
        copied = {**job._asdict(), "target": target, "owner": (os.getuid(), os.getgid())}
        if job.layers:
            layers = [self._store.layers_folder / layer for layer in reversed(job.layers)]
            copied["tree"] = str(next((one for one in layers if _holds(one, job.sources)), layers[-1]))
        else:
            write_own(folder / "own", job.files, own)
            copied["files"] = [
                (path, str(folder / "own" / digest if digest in own else self._content.path(digest)), mode)
                for path, digest, mode in job.files
            ]
        copying.copy(copied)

    async def _exported(
        self, folder: Path, image: StoredImage, project: Path, options: Sequence[str], env: dict, on_log: OnLog
    ) -> list[str]:
        """What `uv sync` would install, as requirements: its lock file is made in a copy of the project."""
        copy, listed = folder / "project", folder / "requirements.txt"
        await asyncio.to_thread(shutil.copytree, project, copy)
        argv = [find_uv_bin(), "export", "--project", str(copy), "--python", image.host_python, "--no-emit-workspace"]
        await self._host([*argv, "--quiet", "--output-file", str(listed), *options], folder, env, on_log)
        return ["--requirements", str(listed)]

    async def _host(self, argv: list[str], folder: Path, env: dict[str, str], on_log: OnLog) -> None:
        job = {"action": "tool", "argv": argv, "env": env, "cwd": str(folder)}
        await self._steps.run(job, "the command", on_log)

    def _seen(self, argument: str, image: StoredImage) -> str:
        """A path of the image, where it lies on the host."""
        name, equals, path = argument.rpartition("=")
        if not path.startswith("/"):
            return argument
        for layer in self._store.layer_paths(image):
            place = layer / path.lstrip("/")
            if place.exists():
                return f"{name}{equals}{place}"
        return argument

    def _packages(self, image: StoredImage) -> dict[str, str]:
        found: dict[str, str] = {}
        for layer in self._store.layer_paths(image):
            for path in image.host_path:
                for place in (layer / path).glob("*.dist-info"):
                    if match := DIST_INFO.fullmatch(place.name):
                        found.setdefault(match[1].replace("_", "-"), match[2])
        return dict(sorted(found.items()))


def as_install(argv: Sequence[str]) -> Install | None:
    """A command that does nothing but install packages; None for any other."""
    words = _simple_words(argv[-1]) if len(argv) > 1 and argv[-2] == "-c" else list(argv)
    if words is None:
        return None
    for prefix in (*INSTALLERS, *UV_SYNCS):
        if tuple(words[: len(prefix)]) == prefix:
            break
    else:
        return None
    project, kept, rest = "", [], iter(words[len(prefix) :])
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("--python", "--project"):
            value = value if equals else next(rest, "")
            project = value if name == "--project" else project
        elif word not in DROPPED and not (prefix in UV_SYNCS and word == "--compile-bytecode"):
            kept.append(RENAMED.get(word, word))
    return Install(tuple(kept), project or "." if prefix in UV_SYNCS else "")


def _simple_words(command: str) -> list[str] | None:
    """The words of a shell command that is one program with its arguments; None when the shell has more to do."""
    command = PYTHON_SUBSTITUTION.sub("python", command)
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:
        return None
    has_syntax = any(OPERATORS.issuperset(word) or "$" in word or "`" in word for word in words)
    return None if has_syntax or "\n" in command.strip() else words


def _holds(layer: Path, sources: Sequence[str]) -> bool:
    return all((layer / source.lstrip("/")).exists() for source in sources)
