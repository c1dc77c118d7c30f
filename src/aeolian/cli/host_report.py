"""What this host offers to Aeolian, found by trying: runtimes, kernel, image tools, registries, Pythons, GPUs, disk.

Everything runs at the same time and has a deadline; nothing is installed or changed.
"""

import asyncio
import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

import msgspec
import psutil
from uv import find_uv_bin

from aeolian import __version__
from aeolian.worker import mounting
from aeolian.worker.cgroups import CgroupKind, Cgroups
from aeolian.worker.images.apt_sources import configured_uris, find_archive
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.interpreters import find_interpreters
from aeolian.worker.networks.bridge import missing_packages, problem_here
from aeolian.worker.package_index import installer_env
from aeolian.worker.runtimes.process import find_capabilities
from aeolian.worker.runtimes.selection import RUNTIMES, Offer, find_offer

ANSWER_TIMEOUT_S = 8.0
LOW_DISK_BYTES = 10 << 30
TESTED_IMAGE = "docker.io/library/busybox:latest"
TESTED_PACKAGE = "modal"
APT_HELPER = Path("/usr/lib/apt/apt-helper")
OLDEST_MINOR = 9
"""Python 3.9: the oldest that an SDK still in use runs on."""
GIB = 1 << 30


class Finding(msgspec.Struct, frozen=True):
    """One row: what was found, or what is missing and how to get it."""

    group: str
    name: str
    says: str
    is_missing: bool = False
    remedy: str = ""


class HostReport(msgspec.Struct, frozen=True):
    version: str
    host: str
    runtime: str
    """The one that `--runtime auto` takes."""
    findings: tuple[Finding, ...]


async def host_report(data_dir: Path) -> HostReport:
    """Nothing stays in `data_dir`, which need not exist."""
    async with _place_to_try(data_dir) as place:
        offers = asyncio.gather(*(find_offer(name, place) for name in RUNTIMES))
        groups: list[Coroutine] = [
            _runtimes(offers, place),
            _kernel(place),
            asyncio.to_thread(_image_tools),
            _registries(),
            asyncio.to_thread(_pythons, data_dir),
            _gpus(),
            asyncio.to_thread(_machine, data_dir),
        ]
        found = await asyncio.gather(*groups)
        taken = next(offer.name for offer in await offers if offer.is_available)
    host = f"{_distribution()}, Linux {platform.release()}, {platform.machine()}"
    if platform.system() != "Linux":
        host = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return HostReport(__version__, host, taken, tuple(finding for group in found for finding in group))


@contextlib.asynccontextmanager
async def _place_to_try(data_dir: Path) -> AsyncIterator[Path]:
    """A folder on the disk of the data directory, or, where that may not be written to, of /tmp."""
    parent = data_dir.absolute()
    while not parent.is_dir():
        parent = parent.parent
    try:
        folder = tempfile.mkdtemp(prefix=".aeolian-doctor-", dir=parent)
    except OSError:
        folder = tempfile.mkdtemp(prefix="aeolian-doctor-")
    try:
        yield Path(folder)
    finally:
        await asyncio.to_thread(remove_tree, Path(folder))


# ---- what containers run in ----------------------------------------------------------------------------------


async def _runtimes(offers: "asyncio.Future[list[Offer]]", place: Path) -> list[Finding]:
    found = []
    taken = ""
    for offer in await offers:
        if not offer.is_available:
            found.append(Finding("runtimes", offer.name, offer.problem, True, offer.remedy))
            continue
        says = "works" if offer.name != "process" else await _process_says(place)
        if not taken:
            taken = offer.name
            says += "; `--runtime auto` takes it"
        found.append(Finding("runtimes", offer.name, says))
    return found


async def _process_says(place: Path) -> str:
    capabilities = await find_capabilities(place)
    if capabilities.has_views:
        return "works, without isolation: each container has a view of files of its own"
    return "works, without isolation: containers see this host's files"


async def _kernel(place: Path) -> list[Finding]:
    cgroups = Cgroups()
    missing = cgroups.missing_controllers()
    kinds = {CgroupKind.HYBRID: "v1, with an empty v2 beside it", CgroupKind.NONE: "none"}
    limits = f"no limits of {', '.join(missing)}" if missing else "limits of CPU, memory and processes"
    found = [Finding("kernel", "cgroups", f"{kinds.get(cgroups.kind, cgroups.kind)}: {limits}", bool(missing))]
    if os.geteuid() != 0:
        found.append(Finding("kernel", "overlayfs", "only root can tell", True, "run aeolian doctor with sudo"))
    elif await asyncio.to_thread(mounting.can_mount_overlays, place):
        found.append(Finding("kernel", "overlayfs", "can be mounted on the data directory's disk"))
    else:
        remedy = "put the data directory on a disk of ext4, xfs or btrfs"
        found.append(Finding("kernel", "overlayfs", "cannot be mounted on the data directory's disk", True, remedy))
    found.append(await asyncio.to_thread(_user_namespaces))
    found.append(_networks())
    return found


def _networks() -> Finding:
    """Whether containers of `native` and `gvisor` get networks of their own."""
    problem, packages = problem_here(), missing_packages()
    if not problem:
        return Finding("kernel", "networks", "each isolated container has one of its own")
    remedy = f"apt install {' '.join(packages)}" if packages else "run Aeolian as root, on Linux"
    return Finding("kernel", "networks", f"containers share this host's: {problem}", True, remedy)


def _user_namespaces() -> Finding:
    """Whether a user who is not root may make them: then the process runtime has views without root, too."""
    settings = {
        "/proc/sys/user/max_user_namespaces": "0",
        "/proc/sys/kernel/unprivileged_userns_clone": "0",
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1",
    }
    if not os.path.exists("/proc/self/ns/user"):
        return Finding("kernel", "user namespaces", "this kernel has none", True)
    for path, refusal in settings.items():
        with contextlib.suppress(OSError):
            if Path(path).read_text().strip() == refusal:
                setting = path.removeprefix("/proc/sys/").replace("/", ".")
                says = f"refused to ordinary users by {setting} = {refusal}"
                return Finding("kernel", "user namespaces", says, True, "only needed without root")
    return Finding("kernel", "user namespaces", "open to ordinary users")


# ---- what images are made of ---------------------------------------------------------------------------------


def _image_tools() -> list[Finding]:
    return [
        _tool("crun", "crun", "runs native containers"),
        _tool("mmdebstrap", "mmdebstrap", "makes base images of Debian's packages where no registry is in reach"),
        _keyring(),
        _tool("skopeo", "skopeo", "pulls images from registries"),
        Finding("image tools", "uv", f"{_version_of(find_uv_bin())}, comes with Aeolian"),
    ]


def _tool(program: str, package: str, purpose: str) -> Finding:
    path = shutil.which(program)
    if path is None:
        return Finding("image tools", program, f"not installed: it {purpose}", True, f"apt install {package}")
    return Finding("image tools", program, _version_of(path))


def _keyring() -> Finding:
    keyring = find_archive("debian").keyring
    package = keyring.stem
    if keyring.exists():
        return Finding("image tools", package, "there")
    says = "not installed: mmdebstrap verifies Debian's packages with it"
    return Finding("image tools", package, says, True, f"apt install {package}")


def _version_of(program: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            timeout=ANSWER_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        words = (done.stdout or done.stderr).split()
        return next((word.rstrip(",") for word in words if word[0].isdigit()), "installed")
    return "installed"


async def _registries() -> list[Finding]:
    """Asked by the very programs that image builds use, with their settings on this host."""
    return list(await asyncio.gather(_docker_hub(), _packages_of_python(), _packages_of_debian()))


async def _docker_hub() -> Finding:
    name = "docker.io"
    if shutil.which("skopeo") is None:
        return Finding("registries", name, "not asked: skopeo is not installed", True, "apt install skopeo")
    problem, _ = await _ask("skopeo", "inspect", "--raw", f"docker://{TESTED_IMAGE}")
    if problem:
        remedy = "without it, base images are made of Debian's packages"
        return Finding("registries", name, f"cannot be reached: {problem}", True, remedy)
    return Finding("registries", name, "answers")


async def _packages_of_python() -> Finding:
    """By uv, which fetches the SDK that containers run."""
    argv = [find_uv_bin(), "pip", "compile", "-", "--no-deps", "--no-cache", "--no-config", "--quiet", "--no-header"]
    problem, said = await _ask(*argv, given=TESTED_PACKAGE, env={**os.environ, **installer_env()})
    if problem:
        remedy = "set PIP_INDEX_URL or pip's configuration to an index within reach"
        return Finding("registries", "Python packages", f"cannot be had: {problem}", True, remedy)
    newest = next((line for line in said.splitlines() if line.startswith(f"{TESTED_PACKAGE}==")), "")
    return Finding("registries", "Python packages", f"can be had; the newest SDK is {newest}")


async def _packages_of_debian() -> Finding:
    name = "Debian packages"
    if not APT_HELPER.exists():
        return Finding("registries", name, "not asked: this host has no apt", True)
    uri, suite = (configured_uris() or [(find_archive("debian").main, "stable")])[-1]
    address = f"{uri.rstrip('/')}/dists/{suite}/Release"
    with tempfile.TemporaryDirectory() as folder:
        problem, _ = await _ask(str(APT_HELPER), "-q", "download-file", address, f"{folder}/Release")
    if problem:
        remedy = "apt update says more; set a mirror in /etc/apt"
        return Finding("registries", name, f"{uri} cannot be reached: {problem}", True, remedy)
    return Finding("registries", name, f"{uri} answers")


async def _ask(*argv: str, given: str = "", env: dict[str, str] | None = None) -> tuple[str, str]:
    """("", output) of a program that ended well in time, else (what went wrong, "")."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=env,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return f"{argv[0]}: {error.strerror}", ""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            stdout, stderr = await process.communicate(given.encode())
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return f"no answer within {ANSWER_TIMEOUT_S:g} s", ""
    if process.returncode != 0:
        lines = stderr.decode("utf-8", "replace").strip().splitlines()
        return (lines[-1].rpartition(": ")[2].strip('"') if lines else f"exit status {process.returncode}"), ""
    return "", stdout.decode("utf-8", "replace")


# ---- what runs in them ---------------------------------------------------------------------------------------


def _pythons(data_dir: Path) -> list[Finding]:
    """Those that images can be given here; Aeolian's own is one of them."""
    found = find_interpreters(data_dir / "sdk/python")
    rows = []
    for name in sorted(found, key=_minor):
        if _minor(name)[0] < OLDEST_MINOR:
            continue
        interpreter = found[name]
        use = "" if interpreter.is_relocatable else "; cannot be copied into images (`add_python`)"
        rows.append(Finding("Python", name, f"{interpreter.version} at {interpreter.executable}{use}"))
    return rows


def _minor(series: str) -> tuple[int, str]:
    """`3.13t` comes after `3.13`."""
    return int(series.split(".")[1].rstrip("t")), series


async def _gpus() -> list[Finding]:
    nodes = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if shutil.which("nvidia-smi") is not None:
        problem, said = await _ask("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
        if not problem:
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            return [Finding("GPUs", str(number), line) for number, line in enumerate(lines)]
        return [Finding("GPUs", "NVIDIA", f"nvidia-smi fails: {problem}", True, "reinstall the driver")]
    if nodes:
        says = f"{', '.join(map(str, nodes))}, but no nvidia-smi"
        return [Finding("GPUs", "NVIDIA", says, True, "install the driver's programs (nvidia-smi)")]
    return [Finding("GPUs", "NVIDIA", "none")]


def _machine(data_dir: Path) -> list[Finding]:
    place = data_dir.absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    says = f"{free / GIB:.0f} GiB free for {data_dir}"
    is_low = free < LOW_DISK_BYTES
    return [
        Finding("machine", "CPUs", str(cpus)),
        Finding("machine", "memory", f"{psutil.virtual_memory().total / GIB:.0f} GiB"),
        Finding(
            "machine", "disk", says, is_low, "images take GiBs: free space, or use another --data-dir" if is_low else ""
        ),
    ]


def _distribution() -> str:
    with contextlib.suppress(OSError):
        release = platform.freedesktop_os_release()
        return release.get("PRETTY_NAME", release.get("NAME", "Linux"))
    return "an unknown distribution"
