"""Images without root: their layers lie over the host's own folders, and their Python is one of the host's.

The base of `debian_slim()` and `python:3.x` is then a virtual environment at /opt/python of the host's interpreter of
that series. What belongs to the system (apt) stays the host's.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from aeolian.domain.errors import FailedPrecondition, InvalidArgument
from aeolian.domain.images import RegistryAccess
from aeolian.worker.images.bases import uv_image
from aeolian.worker.images.layers import LayerMaker, digest_of
from aeolian.worker.images.references import is_uv, newest_series, parse_reference, series_of, stand_in_for
from aeolian.worker.images.run_mounts import RunMount
from aeolian.worker.images.steps import INFO, OnLog
from aeolian.worker.images.store import StoredImage
from aeolian.worker.images.workshop import PATH, CopyJob, RunJob, Workshop
from aeolian.worker.interpreters import Interpreter, Interpreters

ENVIRONMENT = "/opt/python"
UV = "/__modal/build/uv"
DISTRIBUTION_WHEELS = Path("/usr/share/python-wheels")
LEFT_TO_HOST = re.compile(
    r"apt-get update|apt-get install -y gcc gfortran build-essential|echo 'debconf .*' \| debconf-set-selections"
)
"""What debian_slim does to the system of its base."""
SYSTEM_COMMAND = re.compile(r"(?:^|[;&|(]|\bsudo)\s*(?P<name>apt|apt-get|aptitude|dpkg|apk|dnf|yum)\s")
REMEDY = "run Aeolian as root, with the right to mount, and images have root file systems of their own"


class HostBases:
    """`has_views`: False where not even namespaces exist."""

    def __init__(self, interpreters: Interpreters, layers: LayerMaker, workshop: Workshop, *, has_views: bool):
        self._interpreters = interpreters
        self._layers = layers
        self._workshop = workshop
        self._has_views = has_views

    async def find(self, name: str, access: RegistryAccess, commands: Sequence[str], on_log: OnLog) -> StoredImage:
        reference = parse_reference(name)
        if is_uv(reference):
            return await uv_image(self._layers, on_log)
        wanted = stand_in_for(reference)
        if wanted is None:
            raise FailedPrecondition(
                f"{reference} cannot be used: without root no image of a registry can be mounted. {REMEDY}"
            )
        image = StoredImage("", over_host=True, env={"PATH": PATH})
        on_log(INFO, f"images cannot be mounted here without root: this host's own folders stand in for {name}\n")
        if not wanted.python:
            return image
        newest = newest_series(await self._interpreters.all()) if wanted.python == "3" else None
        interpreter = await self._interpreters.get(newest or series_of(wanted.python))
        if wanted.python.count(".") > 1 and wanted.python != interpreter.version:
            on_log(INFO, f"Python {wanted.python} was asked for; this host offers {interpreter.version}\n")
        return await self._with_python(image, interpreter, on_log)

    async def _with_python(self, image: StoredImage, interpreter: Interpreter, on_log: OnLog) -> StoredImage:
        image = msgspec.structs.replace(
            image,
            cmd=("python3",),
            host_python=str(interpreter.executable),
            host_path=(f"{ENVIRONMENT.lstrip('/')}/lib/python{interpreter.series}/site-packages",),
            python_version=interpreter.version,
            env={"PATH": f"{ENVIRONMENT}/bin:{PATH}", "LANG": "C.UTF-8"},
        )
        if not self._has_views:
            return image
        uv = await uv_image(self._layers, on_log)
        make = f"{interpreter.executable} -m venv --without-pip {ENVIRONMENT}"
        # Ten times as fast as venv's own way of installing it, which distributions leave out, too.
        seed = f"{UV} pip install -q --python {ENVIRONMENT}/bin/python {_wheel_of_pip(interpreter) or 'pip'}"
        command = f"{make} && {seed}"
        mounts = (RunMount("bind", UV, "/uv", layers=uv.layers),)
        job = RunJob(("/bin/sh", "-c", command), image.env, mounts)

        async def work(folder: Path, on_log: OnLog) -> Path | None:
            return await self._workshop.run(folder, image, job, {}, on_log)

        key = digest_of("environment", str(interpreter.executable), interpreter.version, job)
        layer = await self._layers.make(key, work, on_log)
        return msgspec.structs.replace(image, layers=(layer.name,))


class CheckedWorkshop:
    """Refuses what needs root before it is tried, and leaves to the host what is the host's."""

    def __init__(self, workshop: Workshop):
        self._workshop = workshop

    async def run(
        self, folder: Path, image: StoredImage, job: RunJob, own: Mapping[str, bytes | Path], on_log: OnLog
    ) -> Path | None:
        if is_left_to_host(job, on_log):
            return None
        return await self._workshop.run(folder, image, job, own, on_log)

    async def copy(
        self, folder: Path, image: StoredImage, job: CopyJob, own: Mapping[str, bytes | Path], on_log: OnLog
    ) -> Path | None:
        return await self._workshop.copy(folder, image, job, own, on_log)

    async def inspect(self, folder: Path, image: StoredImage) -> str:
        return await self._workshop.inspect(folder, image)


def _wheel_of_pip(interpreter: Interpreter) -> Path | None:
    """The one that comes with the interpreter, or with the distribution."""
    bundled = (*interpreter.stdlib.glob("ensurepip/_bundled/pip-*.whl"), *DISTRIBUTION_WHEELS.glob("pip-*.whl"))
    return next(iter(bundled), None)


def is_left_to_host(job: RunJob, on_log: OnLog) -> bool:
    """Whether this is one of debian_slim's own system commands. Raises InvalidArgument for a user's."""
    command = job.argv[-1].strip()
    if LEFT_TO_HOST.fullmatch(command):
        on_log(INFO, "the system's packages stay those of this host: left out\n")
        return True
    if found := SYSTEM_COMMAND.search(command):
        raise InvalidArgument(
            f"{found['name']} changes the system, which this host's images cannot without root: {REMEDY}; or "
            "install the packages on the host itself and leave out this step"
        )
    return False
