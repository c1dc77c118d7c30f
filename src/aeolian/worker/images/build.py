"""One build of an image, instruction by instruction."""

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from aeolian.domain.errors import AeolianError, InvalidArgument
from aeolian.domain.images import ImageSpec, RegistryAccess
from aeolian.worker.images.bases import Bases
from aeolian.worker.images.configuration import absolute, configured
from aeolian.worker.images.context import BuildContext
from aeolian.worker.images.dockerfile import Heredoc, Instruction, expand, parse, words
from aeolian.worker.images.layers import MAX_LAYERS, LayerMaker, Work, digest_of
from aeolian.worker.images.references import own_architecture
from aeolian.worker.images.run_mounts import RunMount, parse_mount, secret_mount
from aeolian.worker.images.steps import INFO, OnLog
from aeolian.worker.images.store import EMPTY_LAYER, ImageStore, StoredImage
from aeolian.worker.images.workshop import PATH, CopyJob, RunJob, Workshop

MAX_LIST_AGE_S = 12 * 3600.0
"""Package lists name files that their archive deletes some time later."""
FETCHES_LISTS = re.compile(r"\b(apt|apt-get|apk|dnf|yum)\s+(-\S+\s+)*update\b")
MAX_SHOWN_CHARS = 160
COPY_FLAGS = frozenset(["from", "chown", "chmod", "link", "exclude"])
URL = re.compile(r"https?://")
KNOWN_RUN_FLAGS = frozenset(["mount", "network", "security"])


class Tools(NamedTuple):
    """What all builds of a worker share."""

    store: ImageStore
    layers: LayerMaker
    workshop: Workshop
    bases: Bases


class Build:
    """`secrets`: variables that RUN steps see and nothing keeps. `fresh`: no kept layer is good enough."""

    def __init__(self, tools: Tools, spec: ImageSpec, secrets: dict[str, str], on_log: OnLog, *, fresh: bool):
        self._tools = tools
        self._spec = spec
        self._secrets = secrets
        self._on_log = on_log
        self._fresh = fresh
        self._context = BuildContext(spec)
        self._stages: dict[str, StoredImage] = {}
        """By name and by number."""
        self._stage_names: list[str] = []
        self._image: StoredImage | None = None
        self._global_arguments: dict[str, str] = {}
        self._arguments: dict[str, str] = {}
        self._has_own_cmd = False

    async def run(self) -> StoredImage:
        """The image, still without a name. Raises AeolianError naming the instruction that failed."""
        instructions = parse(self._spec.dockerfile_commands)
        for number, instruction in enumerate(instructions, 1):
            shown = _shortened(str(instruction))
            self._say(f"Step {number}/{len(instructions)}: {shown}")
            try:
                await self._carry_out(instruction, instructions[number:])
            except AeolianError as error:
                raise type(error)(f"step {number}/{len(instructions)} ({shown}): {error.message}") from error
        if self._image is None:
            raise InvalidArgument("the image has no FROM line: it needs a base, or `FROM scratch`")
        return self._image

    async def _carry_out(self, instruction: Instruction, rest: Sequence[Instruction]) -> None:
        image = self._image
        if instruction.keyword == "FROM":
            await self._from(instruction, rest)
        elif instruction.keyword == "ARG":
            self._argument(instruction)
        elif image is None:
            raise InvalidArgument("it comes before FROM: only ARG may")
        elif instruction.keyword == "RUN":
            await self._run(image, instruction)
        elif instruction.keyword in ("COPY", "ADD"):
            await self._copy(image, instruction)
        else:
            await self._configure(image, instruction)

    def _say(self, text: str) -> None:
        self._on_log(INFO, text + "\n")

    # ---- FROM, ARG and what changes no files ------------------------------------------------------------

    async def _from(self, instruction: Instruction, rest: Sequence[Instruction]) -> None:
        parts = words(expand(instruction.rest, self._global_arguments))
        _check_platform(expand(instruction.flag("platform") or "", {**_predefined(), **self._global_arguments}))
        if len(parts) not in (1, 3) or (len(parts) == 3 and parts[1].upper() != "AS"):
            raise InvalidArgument("write FROM image, or FROM image AS name")
        commands = []
        for later in rest:
            if later.keyword == "FROM":
                break
            if later.keyword == "RUN":
                commands.append(later.rest)
        image = await self._base(parts[0], commands, self._spec.registry)
        image = msgspec.structs.replace(image, env={"PATH": PATH, **image.env})
        self._stage_names = [str(len(self._stages)), *(part.lower() for part in parts[2:])]
        self._arguments = {}
        self._has_own_cmd = False
        self._become(image)

    async def _base(self, name: str, commands: Sequence[str] = (), access: RegistryAccess | None = None) -> StoredImage:
        """What FROM, `COPY --from` and `--mount=from=` call by that name. Credentials are for FROM's registry alone."""
        if name.lower() == "scratch":
            return StoredImage("", layers=(EMPTY_LAYER,))
        if (stage := self._stages.get(name.lower())) is not None:
            return stage
        if (image_id := self._spec.base_image_ids.get(name)) is not None:
            return msgspec.structs.replace(self._tools.store.get(image_id), image_id="")
        return await self._tools.bases.find(name, access or RegistryAccess(), commands, self._on_log)

    def _become(self, image: StoredImage) -> None:
        self._image = image
        self._stages.update(dict.fromkeys(self._stage_names, image))

    def _argument(self, instruction: Instruction) -> None:
        known = {**_predefined(), **self._global_arguments, **self._spec.build_args}
        for word in words(instruction.rest):
            name, has_default, default = word.partition("=")
            value = known.get(name, expand(default, self._variables) if has_default else None)
            if value is not None:
                (self._global_arguments if self._image is None else self._arguments)[name] = value

    @property
    def _variables(self) -> dict[str, str]:
        """What `$NAME` means: ENV wins over ARG."""
        if self._image is None:
            return self._global_arguments
        return {**self._arguments, **self._image.env}

    async def _configure(self, image: StoredImage, instruction: Instruction) -> None:
        changed = configured(image, instruction, self._variables)
        if instruction.keyword == "CMD":
            self._has_own_cmd = True
        elif instruction.keyword == "ENTRYPOINT" and not self._has_own_cmd:
            changed = msgspec.structs.replace(changed, cmd=())  # the base's command was for the base's entry point
        elif instruction.keyword == "WORKDIR":
            job = CopyJob(sources=(), target=changed.workdir, into_folder=True)
            changed = await self._copied(changed, job)
        self._become(changed)

    # ---- what makes layers ------------------------------------------------------------------------------

    async def _run(self, image: StoredImage, instruction: Instruction) -> None:
        argv = instruction.exec_form or [*image.shell, _script(instruction)]
        env = {**self._arguments, **image.env, **self._secrets}
        for name in {name for name, _ in instruction.flags} - KNOWN_RUN_FLAGS:
            raise InvalidArgument(f"--{name} is not supported: RUN knows --mount")
        mounts = []
        for value in (value for name, value in instruction.flags if name == "mount"):
            mount, variables = await self._mount(image, expand(value, self._variables))
            mounts += [mount] if mount is not None else []
            env.update(variables)
        job = RunJob(tuple(argv), env, tuple(mounts))
        max_age_s = MAX_LIST_AGE_S if FETCHES_LISTS.search(instruction.rest) else 0.0

        async def work(folder: Path, on_log: OnLog) -> Path | None:
            return await self._tools.workshop.run(folder, image, job, self._context.own, on_log)

        self._become(await self._with_layer(image, ("run", job), work, max_age_s))

    async def _mount(self, image: StoredImage, text: str) -> tuple[RunMount | None, dict[str, str]]:
        """What `--mount` shows the step, and the variables that it adds."""
        fields = parse_mount(text, image.workdir)
        kind, target = fields["type"], fields["target"]
        is_writable = "rw" in fields or "readwrite" in fields
        if kind == "ssh":
            self._say("there is no SSH agent for builds: --mount=type=ssh is left out")
            return None, {}
        if kind == "secret":
            return secret_mount(fields, self._secrets)
        if kind == "cache":
            return RunMount("cache", target, cache_id=fields.get("id", "")), {}
        if kind == "tmpfs":
            return RunMount("tmpfs", target), {}
        source = fields.get("source") or fields.get("src") or ""
        if "from" in fields:
            origin = await self._base(fields["from"])
            return RunMount("bind", target, source, layers=origin.layers), {}
        return RunMount("bind", target, source, is_writable, files=self._context.selected([source or "."])), {}

    async def _copy(self, image: StoredImage, instruction: Instruction) -> None:
        unknown = {name for name, _ in instruction.flags} - COPY_FLAGS
        if unknown:
            raise InvalidArgument(f"--{unknown.pop()} is not supported: there are --from, --chown, --chmod, --exclude")
        *sources, target = words(expand(instruction.rest, self._variables))
        if not sources:
            raise InvalidArgument("it needs a source and a target")
        is_add = instruction.keyword == "ADD"
        job = CopyJob(
            sources=tuple(sources),
            target=absolute(image.workdir, target),
            into_folder=target.endswith("/") or target in (".", "..") or len(sources) > 1,
            chown=expand(instruction.flag("chown") or "", self._variables),
            chmod=expand(instruction.flag("chmod") or "", self._variables),
            exclude=tuple(value for name, value in instruction.flags if name == "exclude"),
            unpacks=is_add and not URL.match(sources[0]),
        )
        if (origin := instruction.flag("from")) is not None:
            base = await self._base(expand(origin, self._variables))
            self._become(await self._copied(image, job._replace(layers=base.layers)))
            return
        downloads = await asyncio.to_thread(self._tools.store.new_folder)
        try:
            paths = [await self._source(source, instruction.heredocs, downloads, is_add) for source in sources]
            job = job._replace(sources=tuple(paths), files=self._context.selected(paths))
            self._become(await self._copied(image, job))
        finally:
            await asyncio.to_thread(self._tools.store.discard, downloads)

    async def _source(self, source: str, heredocs: Sequence[Heredoc], downloads: Path, is_add: bool) -> str:
        """The path in the context that a source stands for."""
        for heredoc in heredocs:
            if source.lstrip("<-").strip("\"'") == heredoc.name:
                text = expand(heredoc.content, self._variables) if heredoc.expands else heredoc.content
                return self._context.add_text(heredoc.name, text)
        if is_add and URL.match(source):
            return await asyncio.to_thread(self._context.add_download, source, downloads)
        if is_add and source.startswith(("git@", "git://")):
            raise InvalidArgument(f"{source}: git repositories are not fetched by ADD; RUN git clone does")
        return source

    async def _copied(self, image: StoredImage, job: CopyJob) -> StoredImage:
        async def work(folder: Path, on_log: OnLog) -> Path | None:
            return await self._tools.workshop.copy(folder, image, job, self._context.own, on_log)

        return await self._with_layer(image, ("copy", job), work)

    async def _with_layer(self, image: StoredImage, step: tuple, work: Work, max_age_s: float = 0.0) -> StoredImage:
        key = digest_of(*step, image.layers, image.over_host, image.user, image.workdir)
        began = time.monotonic()
        if len(image.layers) >= MAX_LAYERS:
            raise InvalidArgument(f"an image has {MAX_LAYERS} layers at most: join RUN lines by &&, or use a stage")
        layer = await self._tools.layers.make(key, work, self._on_log, fresh=self._fresh, max_age_s=max_age_s)
        self._say("CACHED" if layer.is_cached else f"done in {time.monotonic() - began:.1f} s")
        return msgspec.structs.replace(image, layers=(*image.layers, layer.name)) if layer.name else image


def _script(instruction: Instruction) -> str:
    """What the shell is given: here-documents alone are the script itself, others are left to the shell."""
    if not instruction.heredocs:
        return instruction.rest
    contents = [heredoc.content for heredoc in instruction.heredocs]
    if re.fullmatch(r"(\d?<<-?[\"']?\w+[\"']?\s*)+", instruction.rest):
        return "".join(contents)
    ends = (f"{heredoc.content}{heredoc.name}\n" for heredoc in instruction.heredocs)
    return instruction.rest + "\n" + "".join(ends)


def _check_platform(wanted: str) -> None:
    """`--platform=linux/arm64`. Raises InvalidArgument where this machine is another."""
    if wanted and wanted.split("/")[:2] != ["linux", own_architecture()]:
        raise InvalidArgument(f"--platform={wanted}: this worker builds and runs linux/{own_architecture()} only")


def _predefined() -> dict[str, str]:
    """Arguments that every builder sets, for Dockerfiles that declare them."""
    architecture = own_architecture()
    place = {"PLATFORM": f"linux/{architecture}", "OS": "linux", "ARCH": architecture}
    return {f"{side}{name}": value for side in ("TARGET", "BUILD") for name, value in place.items()}


def _shortened(text: str) -> str:
    first = text.split("\n")[0]
    return first if len(first) <= MAX_SHOWN_CHARS else first[:MAX_SHOWN_CHARS] + " …"
