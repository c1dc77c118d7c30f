"""Base file systems made from a distribution's packages by mmdebstrap, for hosts that reach no image registry."""

import asyncio
import os
import shutil
from pathlib import Path

from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.images.apt_sources import Archive, find_archive, network_options, sources_list
from aeolian.worker.images.layers import digest_of
from aeolian.worker.images.machine_cache import MachineCache
from aeolian.worker.images.steps import INFO, OnLog, StepFailed, StepRunner

RECIPE = 1
"""Counts changes of what is done here: older trees in the machine's cache are not taken any more."""
PACKAGES = ("ca-certificates", "netbase", "tzdata")
DPKG_SETTINGS = """\
# Images are thrown away when a step fails: nothing needs to be synced to disk.
force-unsafe-io
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/info/*
path-exclude /usr/share/man/*
path-exclude /usr/share/locale/*
"""
APT_SETTINGS = """\
Acquire::Languages "none";
Acquire::Retries "3";
Apt::AutoRemove::SuggestsImportant "false";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb || true"; };
"""
POLICY_RC = "#!/bin/sh\n# No service is started while an image is built.\nexit 101\n"


class DebianBases:
    def __init__(self, steps: StepRunner, cache: MachineCache):
        self._steps = steps
        self._cache = cache

    def key(self, distribution: str, suite: str) -> str:
        archive = find_archive(distribution)
        return digest_of("base", RECIPE, distribution, suite, archive.main, os.uname().machine)[:24]

    async def tree(self, distribution: str, suite: str, on_log: OnLog) -> Path:
        """A minimal root file system of that suite, in the machine's cache. Raises FailedPrecondition."""
        if shutil.which("mmdebstrap") is None:
            raise FailedPrecondition(
                "no image registry can be reached, and mmdebstrap, which could make a Debian base in its place, "
                "is not installed: run `apt install mmdebstrap`, or give this host access to a registry"
            )
        archive = find_archive(distribution)
        if not archive.keyring.exists():
            raise FailedPrecondition(
                f"{archive.keyring} is missing, with which packages of {distribution} are verified: "
                f"run `apt install {archive.keyring.stem}`, or give this host access to a registry"
            )

        async def make(tree: Path) -> None:
            on_log(INFO, f"making a base of {distribution} {suite} from {archive.main}: once on this machine\n")
            await self._bootstrap(archive, distribution, suite, tree, on_log)
            await asyncio.to_thread(_settle, tree, archive, suite)

        return await self._cache.tree(self.key(distribution, suite), make)

    async def _bootstrap(self, archive: Archive, distribution: str, suite: str, tree: Path, on_log: OnLog) -> None:
        tree.rmdir()
        argv = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"]
        argv += [f"--include={','.join(PACKAGES)}", f"--keyring={archive.keyring}", "--dpkgopt=force-unsafe-io"]
        argv += [f"--dpkgopt={line}" for line in DPKG_SETTINGS.splitlines() if line.startswith("path-")]
        argv += [f"--aptopt={line}" for line in ('Acquire::Languages "none"', *network_options())]
        argv += [suite, str(tree), *sources_list(archive, suite)]
        job = {"action": "tool", "argv": argv, "env": dict(os.environ), "cwd": "/"}
        try:
            await self._steps.run(job, f"making a base of {distribution} {suite}", on_log)
        except StepFailed as error:
            raise FailedPrecondition(
                f"no image registry can be reached, and a base of {distribution} {suite} could not be made from "
                f"{archive.main}: {error.message}"
            ) from None


def _settle(tree: Path, archive: Archive, suite: str) -> None:
    """apt works inside as the host's does; nothing of the host's own names and settings stays."""
    for name in ("etc/apt/apt.conf.d/99mmdebstrap", "etc/dpkg/dpkg.cfg.d/99mmdebstrap", "etc/hostname"):
        (tree / name).unlink(missing_ok=True)
    (tree / "etc/resolv.conf").unlink(missing_ok=True)
    for name in ("etc/resolv.conf", "etc/hosts"):  # where the host's are shown
        (tree / name).touch()
    lists = tree / "etc/apt/sources.list"
    lists.write_text("".join(f"{line}\n" for line in sources_list(archive, suite)))
    (tree / "etc/dpkg/dpkg.cfg.d/aeolian").write_text(DPKG_SETTINGS)
    (tree / "etc/apt/apt.conf.d/aeolian").write_text(APT_SETTINGS)
    policy = tree / "usr/sbin/policy-rc.d"
    policy.write_text(POLICY_RC)
    policy.chmod(0o755)
    for name in ("doc-base", "info", "man", "locale"):
        shutil.rmtree(tree / "usr/share" / name, ignore_errors=True)
