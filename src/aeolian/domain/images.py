"""Images: what a worker needs to know to build one on top of others, and how Dockerfile lines become instructions."""

import msgspec

from aeolian.domain.containers import MountFile


class ContextFile(msgspec.Struct, frozen=True):
    """A small file that came with the definition itself."""

    path: str
    data: bytes


class RegistryAccess(msgspec.Struct, frozen=True):
    """Credentials for the registry of the base image."""

    username: str = ""
    password: str = ""


class ImageSpec(msgspec.Struct, frozen=True):
    """One image, as its client defined it."""

    dockerfile_commands: tuple[str, ...]
    base_image_ids: dict[str, str] = {}
    """Names that FROM may use -> images that exist."""
    context: tuple[MountFile, ...] = ()
    context_files: tuple[ContextFile, ...] = ()
    build_args: dict[str, str] = {}
    builder_version: str = ""
    gpu: str = ""
    registry: RegistryAccess = RegistryAccess()
    arch: str = ""
    ignore_cache: bool = False
