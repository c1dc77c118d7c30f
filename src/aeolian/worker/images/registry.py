"""Images of registries, pulled by skopeo: their layers are unpacked once each, their configuration is taken over."""

import asyncio
import base64
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from aeolian.domain.errors import AeolianError, FailedPrecondition, NotFound, PermissionDenied
from aeolian.domain.images import RegistryAccess
from aeolian.worker.images.layers import LayerMaker, digest_of
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.images.references import Reference, own_architecture
from aeolian.worker.images.steps import INFO, OnLog, StepFailed, StepRunner
from aeolian.worker.images.store import EMPTY_LAYER, ImageStore, StoredImage

ANSWER_TIMEOUT_S = 15
PULL_TIMEOUT_S = 3600
REMEMBERED_S = 300.0
"""For so long a registry that did not answer is not asked again."""
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
NO_ANSWER = (
    "no such host", "connection refused", "i/o timeout", "deadline exceeded", "no route to host",
    "network is unreachable", "TLS handshake timeout", "server misbehaving", "connection reset", "EOF",
    "Temporary failure in name resolution", "certificate", "toomanyrequests", "gave HTTP response to HTTPS",
)  # fmt: skip


class RegistryUnreachable(FailedPrecondition):
    """Nobody answers there, or this host has no skopeo."""


class Pulled(msgspec.Struct, frozen=True):
    """What is kept of an image that was pulled, in case its registry is away next time."""

    digest: str
    image: StoredImage


class Registry:
    """`kept_folder`: descriptions of what was pulled."""

    def __init__(self, store: ImageStore, layers: LayerMaker, steps: StepRunner, kept_folder: Path):
        self._store = store
        self._layers = layers
        self._steps = steps
        self._kept_folder = kept_folder
        self._silent_until: dict[str, tuple[float, str]] = {}

    async def pull(self, reference: Reference, access: RegistryAccess, on_log: OnLog) -> StoredImage:
        """The image as it is there now; as it was, when its registry does not answer.

        Raises RegistryUnreachable, NotFound, PermissionDenied.
        """
        folder = await asyncio.to_thread(self._store.new_folder)
        try:
            skopeo = _Skopeo(self._steps, reference, access, folder)
            try:
                manifest, digest = await self._manifest(skopeo)
            except RegistryUnreachable as error:
                kept = None if access.username else self._kept(reference)
                if kept is None:
                    raise
                on_log(INFO, f"{error.message}: taking {reference} as it was pulled before ({kept.digest})\n")
                return kept.image
            config = json.loads(await skopeo.inspect(digest, "--config", "--raw"))
            if config.get("architecture", own_architecture()) != own_architecture():
                raise NotFound(
                    f"{reference} is not there for linux/{own_architecture()}, only for linux/{config['architecture']}"
                )
            on_log(INFO, f"{reference.name}@{digest}\n")
            names = await self._unpacked(skopeo, manifest, digest, folder, on_log)
            image = described(config.get("config") or {}, names)
            if not access.username:
                self._keep(reference, Pulled(digest, image))
            return image
        finally:
            await asyncio.to_thread(remove_tree, folder)

    async def _manifest(self, skopeo: "_Skopeo") -> tuple[dict[str, Any], str]:
        """(the manifest for this machine, its digest)."""
        registry = skopeo.reference.registry
        until, why = self._silent_until.get(registry, (0.0, ""))
        if time.monotonic() < until:
            raise RegistryUnreachable(why)
        try:
            raw = await skopeo.inspect("", "--raw")
        except RegistryUnreachable as error:
            self._silent_until[registry] = (time.monotonic() + REMEMBERED_S, error.message)
            raise
        manifest = json.loads(raw)
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        if manifest.get("mediaType") in INDEX_TYPES or "manifests" in manifest:
            digest = _for_this_machine(manifest, skopeo.reference)
            manifest = json.loads(await skopeo.inspect(digest, "--raw"))
        if "layers" not in manifest:
            raise FailedPrecondition(f"{skopeo.reference} is in a format of old that is not supported: push it again")
        return manifest, digest

    async def _unpacked(
        self, skopeo: "_Skopeo", manifest: dict[str, Any], digest: str, folder: Path, on_log: OnLog
    ) -> list[str]:
        """The names of its layers, those that are missing here downloaded. They are known by their blobs' digests,
        which skopeo verifies."""
        blobs = [(layer["digest"], layer["mediaType"]) for layer in manifest["layers"]]
        place = folder / "blobs"
        if any(self._store.made_by(digest_of("oci", blob)) is None for blob, _ in blobs):
            await skopeo.copy(digest, place, on_log)
        names = []
        for blob, media_type in blobs:

            async def work(folder: Path, on_log: OnLog, blob=blob, media_type=media_type) -> Path:
                tree = folder / "tree"
                tree.mkdir(mode=0o755)
                archive = str(place / blob.partition(":")[2])
                unpack = {"archive": archive, "media_type": media_type, "tree": str(tree)}
                await self._steps.run({"action": "unpack", "unpack": unpack}, f"unpacking {blob}", on_log)
                return tree

            names.append((await self._layers.make(digest_of("oci", blob), work, on_log)).name)
        return [name for name in names if name]

    def _kept(self, reference: Reference) -> Pulled | None:
        try:
            kept = msgspec.json.decode(self._kept_path(reference).read_bytes(), type=Pulled)
        except (OSError, msgspec.MsgspecError):
            return None
        return kept if all(self._store.has_layer(layer) for layer in kept.image.layers) else None

    def _keep(self, reference: Reference, pulled: Pulled) -> None:
        path = self._kept_path(reference)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
        fresh.write_bytes(msgspec.json.encode(pulled))
        fresh.replace(path)

    def _kept_path(self, reference: Reference) -> Path:
        return self._kept_folder / f"{digest_of(str(reference))}.json"


class _Skopeo:
    """skopeo, for one image."""

    def __init__(self, steps: StepRunner, reference: Reference, access: RegistryAccess, folder: Path):
        self._steps = steps
        self.reference = reference
        self._folder = folder
        self._auth = ["--authfile", str(_auth_file(reference, access, folder))] if access.username else []
        # Loopback registries have no certificates; skopeo tries TLS first all the same.
        self._tls = ["--tls-verify=false"] if reference.is_loopback else []

    async def inspect(self, digest: str, *options: str) -> bytes:
        """Raises RegistryUnreachable, NotFound, PermissionDenied."""
        return await self._run(ANSWER_TIMEOUT_S, ["inspect", *options, *self._auth, *self._tls, self._name(digest)])

    async def copy(self, digest: str, target: Path, on_log: OnLog) -> None:
        """All its blobs, as files named by their digests. Raises as `inspect`."""
        tls = [option.replace("--tls", "--src-tls") for option in self._tls]
        auth = [option.replace("--authfile", "--src-authfile") for option in self._auth]
        await self._run(PULL_TIMEOUT_S, ["copy", *auth, *tls, self._name(digest), f"dir:{target}"], on_log)

    def _name(self, digest: str) -> str:
        return f"docker://{self.reference.name}@{digest}" if digest else f"docker://{self.reference}"

    async def _run(self, timeout_s: float, arguments: list[str], on_log: OnLog | None = None) -> bytes:
        if shutil.which("skopeo") is None:
            raise RegistryUnreachable("skopeo, which pulls images, is not installed (run `apt install skopeo`)")
        argv = ["skopeo", "--insecure-policy", f"--command-timeout={timeout_s:g}s", *arguments]
        said: list[str] = []

        def listen(fd: int, text: str) -> None:
            said.append(text)
            if on_log is not None and "level=fatal" not in text:
                on_log(fd, text)

        job = {"action": "tool", "argv": argv, "env": dict(os.environ), "cwd": str(self._folder)}
        try:
            return await self._steps.run(job, "skopeo", listen, captures=on_log is None)
        except StepFailed:
            raise _told(self.reference, "".join(said)) from None


def described(config: dict[str, Any], layers: list[str]) -> StoredImage:
    """The image as its configuration in the registry has it (OCI image-spec, config.md)."""
    return StoredImage(
        "",
        layers=tuple(layers) or (EMPTY_LAYER,),
        env=dict(entry.partition("=")[::2] for entry in config.get("Env") or ()),
        workdir=config.get("WorkingDir") or "/",
        entrypoint=tuple(config.get("Entrypoint") or ()),
        cmd=tuple(config.get("Cmd") or ()),
        user=config.get("User") or "",
        shell=tuple(config.get("Shell") or ("/bin/sh", "-c")),
        labels=config.get("Labels") or {},
        ports=tuple(config.get("ExposedPorts") or ()),
        volumes=tuple(config.get("Volumes") or ()),
        stop_signal=config.get("StopSignal") or "",
    )


def _for_this_machine(index: dict[str, Any], reference: Reference) -> str:
    wanted = own_architecture()
    offered = []
    for entry in index.get("manifests", ()):
        place = entry.get("platform") or {}
        if place.get("os") == "linux" and place.get("architecture") == wanted:
            return entry["digest"]
        offered.append(f"{place.get('os')}/{place.get('architecture')}")
    raise NotFound(f"{reference} is not there for linux/{wanted}, only for {', '.join(offered)}")


def _auth_file(reference: Reference, access: RegistryAccess, folder: Path) -> Path:
    """Credentials go by a file: arguments can be seen by everybody."""
    path = folder / "auth.json"
    path.touch(mode=0o600)
    token = base64.b64encode(f"{access.username}:{access.password}".encode()).decode()
    path.write_text(json.dumps({"auths": {reference.registry: {"auth": token}}}))
    return path


def _told(reference: Reference, said: str) -> AeolianError:
    """skopeo's words as one of our errors."""
    lines = [line for line in said.strip().splitlines() if line]
    match = re.search(r'msg="((?:[^"\\]|\\.)*)"', lines[-1]) if lines else None
    why = match[1].replace('\\"', '"') if match else (lines[-1] if lines else "it did not say why")
    why = re.sub(r"^(Error parsing image name|initializing source) \\?\S+: ", "", why)
    if any(sign in why for sign in ("unauthorized", "denied", "authentication required", "forbidden")):
        return PermissionDenied(
            f"{reference.registry} does not let us have {reference.path}: {why}. Check its name, and pass credentials "
            "by `secret=` (REGISTRY_USERNAME and REGISTRY_PASSWORD)"
        )
    if any(sign in why for sign in ("manifest unknown", "name unknown", "not found", "not known to registry")):
        return NotFound(f"{reference.registry} has no image {reference.path}:{reference.tag}: {why}")
    if "level=" not in said or any(sign in why for sign in NO_ANSWER):
        return RegistryUnreachable(f"the registry {reference.registry} cannot be reached ({why.rpartition(': ')[2]})")
    return FailedPrecondition(f"{reference} cannot be pulled: {why}")
