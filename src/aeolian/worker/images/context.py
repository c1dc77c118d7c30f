"""The build context: the files that COPY, ADD and `RUN --mount` may take from the client."""

import hashlib
import posixpath
import re
import tempfile
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from aeolian.domain.errors import InvalidArgument, Unavailable
from aeolian.domain.images import ImageSpec
from aeolian.worker.images import copying

MAX_DOWNLOAD_BYTES = 16 << 30
DOWNLOAD_TIMEOUT_S = 60
CHUNK_BYTES = 1 << 20
UNSAFE = re.compile(r"[^\w.+-]")


class ContextEntry(NamedTuple):
    """One file, known by its content."""

    path: str
    sha256_hex: str
    mode: int


class BuildContext:
    """Of one build. Contents lie in the content store by their SHA-256, or here in `own`."""

    def __init__(self, spec: ImageSpec):
        self._entries = {file.path.strip("/"): (file.sha256_hex, file.mode) for file in spec.context}
        self._apart: dict[str, tuple[str, int]] = {}
        """Sources of one COPY or ADD that are no part of the context."""
        self.own: dict[str, bytes | Path] = {}
        for file in spec.context_files:
            self._entries[file.path.strip("/")] = (self._keep(file.data), 0o644)

    def _keep(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.own[digest] = data
        return digest

    def add_text(self, name: str, text: str) -> str:
        """A here-document. Returns the path by which it can be selected."""
        self._apart[f".here/{name}"] = (self._keep(text.encode()), 0o644)
        return f".here/{name}"

    def add_download(self, url: str, folder: Path) -> str:
        """What `ADD https://…` names. Returns the path by which it can be selected. Raises Unavailable."""
        name = UNSAFE.sub("_", posixpath.basename(unquote(urlsplit(url).path))) or "index.html"
        path = Path(tempfile.mkdtemp(dir=folder)) / name
        sha256, size = hashlib.sha256(), 0
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as source, path.open("wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    size += len(chunk)
                    if size > MAX_DOWNLOAD_BYTES:
                        raise InvalidArgument(f"{url} is larger than {MAX_DOWNLOAD_BYTES} bytes")
                    sha256.update(chunk)
                    target.write(chunk)
        except (OSError, ValueError) as error:
            raise Unavailable(f"{url} could not be fetched: {error}") from None
        self.own[sha256.hexdigest()] = path
        self._apart[f".downloads/{name}"] = (sha256.hexdigest(), 0o600)
        return f".downloads/{name}"

    def selected(self, patterns: Iterable[str]) -> tuple[ContextEntry, ...]:
        """The files that these sources of COPY name. Raises InvalidArgument when one names none."""
        context = copying.Context((path, digest, mode) for path, (digest, mode) in self._entries.items())
        found: dict[str, ContextEntry] = {}
        for pattern in patterns:
            if pattern in self._apart:
                found[pattern] = ContextEntry(pattern, *self._apart[pattern])
                continue
            try:
                matches = copying.matches(context, pattern)
            except copying.Refused as error:
                raise InvalidArgument(f"{error}: it is not in the build context") from None
            for match in matches:
                below = [match] if not context.is_folder(match) else self._below(match)
                found.update((path, ContextEntry(path, *self._entries[path])) for path in below)
        return tuple(found[path] for path in sorted(found))

    def _below(self, folder: str) -> list[str]:
        prefix = folder + "/" if folder else ""
        return [path for path in self._entries if path.startswith(prefix)]
