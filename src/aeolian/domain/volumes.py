"""What a Volume is: its entries, what a commit changes, and which paths are allowed. No I/O.

A Volume is a set of entries by path. Each commit gives the volume its next version (1, 2, …); an entry knows
the version that changed it last, and an entry that is gone stays as a tombstone, so that "what changed since
version 7" is one query. File content is kept apart, by content id.
"""

import hashlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum

import msgspec

from aeolian.domain.errors import InvalidArgument

BLOCK_BYTES = 8 << 20
"""Size of the blocks in which clients upload and download (the last block of a file is shorter)."""
MAX_PATH_BYTES = 4095
MAX_COMPONENT_BYTES = 255
CONTENT_ID = re.compile(r"[sb][0-9a-f]{64}")


class EntryKind(IntEnum):
    GONE = 0
    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3


class VolumeEntry(msgspec.Struct, frozen=True, array_like=True):
    """One path of a volume. Paths are relative to its root, without a leading slash."""

    path: str
    kind: int
    mode: int = 0o644
    """Permission bits (12 bits)."""
    mtime_ns: int = 0
    size_bytes: int = 0
    content: str = ""
    """FILE: its content id. SYMLINK: its target."""


class VolumeManifest(msgspec.Struct, frozen=True):
    """A volume at a version: all entries (`since` 0), or those changed after `since`, tombstones included.

    `next_path` is "" on the last page; else ask again with `after=next_path`.
    """

    volume_id: str
    version: int
    since: int
    entries: tuple[VolumeEntry, ...]
    next_path: str = ""


class Removal(msgspec.Struct, frozen=True, array_like=True):
    """A path that a container removed. What is below it goes too, as far as the container had seen it."""

    path: str
    children_only: bool = False


class VolumeChanges(msgspec.Struct, frozen=True):
    """One commit of a container: removals first, then puts; all or nothing.

    The container saw version `base_version` and wrote `own_versions` itself. Content must be stored before.
    """

    commit_id: str
    base_version: int
    own_versions: tuple[int, ...] = ()
    removals: tuple[Removal, ...] = ()
    puts: tuple[VolumeEntry, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.removals or self.puts)


class Committed(msgspec.Struct, frozen=True):
    """The volume's version after a commit, and whether this commit made it (False: it changed nothing)."""

    version: int
    is_new: bool


def clean_path(path: str) -> str:
    """A client's path as a path below the volume's root ("" is the root itself).

    One leading and one trailing slash are allowed, as clients write `/dir/`. Raises InvalidArgument for paths
    that climb out or hide something.
    """
    decoded = path
    for _ in range(2):
        decoded = urllib.parse.unquote(decoded)
    if ".." in decoded.split("/") and ".." not in path.split("/"):
        raise InvalidArgument(f"path {path!r} hides '..' behind percent-encoding: write volume paths as they are")
    return check_path(path.removeprefix("/").removesuffix("/"), path)


def check_path(path: str, shown: str | None = None) -> str:
    """`path` when it names something below the volume's root, without tricks; else InvalidArgument."""
    shown = path if shown is None else shown
    if path in ("", "."):
        return ""
    if "\0" in path:
        raise InvalidArgument(f"path {shown!r} contains a NUL character")
    components = [component for component in path.split("/") if component != "."]
    if ".." in components:
        raise InvalidArgument(f"path {shown!r} contains '..': paths must stay inside the volume")
    if "" in components:
        raise InvalidArgument(f"path {shown!r} has an empty component: write single slashes")
    try:
        sizes = [len(component.encode()) for component in components]
    except UnicodeEncodeError:
        raise InvalidArgument(f"path {shown!r} is not valid UTF-8") from None
    if sum(sizes) + len(sizes) > MAX_PATH_BYTES or max(sizes, default=0) > MAX_COMPONENT_BYTES:
        raise InvalidArgument(
            f"path {shown[:80]!r}… is too long: at most {MAX_PATH_BYTES} bytes, {MAX_COMPONENT_BYTES} a component"
        )
    return "/".join(components)


def parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def ancestors(path: str) -> Iterator[str]:
    """Every folder above `path`, the nearest first, without the root."""
    while path := parent_of(path):
        yield path


def resolve_link(path: str, target: str) -> str:
    """Where the symlink at `path` points, inside the volume. Raises InvalidArgument when it climbs out."""
    if target.startswith("/"):
        raise InvalidArgument(f"path {path!r} is a symbolic link to {target!r}, outside the volume")
    components = parent_of(path).split("/") if "/" in path else []
    for component in target.split("/"):
        if component == "..":
            if not components:
                raise InvalidArgument(f"path {path!r} is a symbolic link to {target!r}, outside the volume")
            components.pop()
        elif component not in ("", "."):
            components.append(component)
    return "/".join(components)


def content_of_bytes(sha256_hex: str) -> str:
    """Content id of a file whose whole SHA-256 is known."""
    return "s" + sha256_hex


def content_of_blocks(size_bytes: int, block_sha256s: Sequence[bytes]) -> str:
    """Content id of a file that is known by the SHA-256 of its blocks (trailing zeros left out)."""
    digest = hashlib.sha256(b"aeolian volume blocks\0" + size_bytes.to_bytes(8, "big"))
    for block in block_sha256s:
        digest.update(block)
    return "b" + digest.hexdigest()


def num_blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES)


def block_slices(start: int, length: int) -> list[tuple[int, int]]:
    """`(offset, length)` of each part of a byte range, cut at the file's block boundaries."""
    slices = []
    end = start + length
    while start < end:
        stop = min(end, (start // BLOCK_BYTES + 1) * BLOCK_BYTES)
        slices.append((start, stop - start))
        start = stop
    return slices


def merge_pages(entries: dict[str, VolumeEntry], changed: Iterable[VolumeEntry]) -> None:
    """Bring `entries` up to date with what changed later."""
    for entry in changed:
        if entry.kind == EntryKind.GONE:
            entries.pop(entry.path, None)
        else:
            entries[entry.path] = entry
