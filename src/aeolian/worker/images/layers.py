"""Makes layers: each once, also when several builds want it at the same time."""

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.images.steps import INFO, OnLog
from aeolian.worker.images.store import ImageStore

NAME_CHARS = 20
MAX_LAYERS = 127
"""One mount call takes the names of all layers of an image in 4095 bytes. Docker's limit is the same."""

Work = Callable[[Path, OnLog], Awaitable[Path | None]]
"""Makes a tree below the private folder that it is given; None = nothing has changed."""


class Layer(NamedTuple):
    name: str
    """"" = the step changed no file."""
    is_cached: bool


def digest_of(*parts: Any) -> str:
    """A name for what goes into a step."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


class LayerMaker:
    def __init__(self, store: ImageStore):
        self._store = store
        self._making: dict[str, _Making] = {}

    async def make(self, key: str, work: Work, on_log: OnLog, *, fresh: bool = False, max_age_s: float = 0) -> Layer:
        """The layer of the step with that digest: a kept one, unless `fresh` or older than `max_age_s`; else `work`'s.

        Who asks while it is being made gets its output and its end. It is given up when nobody waits any more.
        """
        making = self._making.get(key)
        if making is None:
            kept = None if fresh else self._store.made_by(key, max_age_s=max_age_s)
            if kept is not None:
                return Layer(kept, True)
            making = self._making[key] = _Making()
            making.task = asyncio.create_task(self._make(key, work, making), name=f"layer-{key[:NAME_CHARS]}")
        else:
            on_log(INFO, "another build is at this very step: waiting for it\n")
        making.listeners.append(on_log)
        try:
            return Layer(await asyncio.shield(making.task), False)
        finally:
            making.listeners.remove(on_log)
            if not making.listeners and not making.task.done():
                making.task.cancel()
                await asyncio.wait([making.task])

    async def _make(self, key: str, work: Work, making: "_Making") -> str:
        folder = await asyncio.to_thread(self._store.new_folder)
        try:
            tree = await work(folder, making.on_log)
            name = "" if tree is None else await asyncio.to_thread(self._commit, key, tree)
            await asyncio.to_thread(self._store.remember, key, name)
            return name
        finally:
            del self._making[key]
            await asyncio.to_thread(remove_tree, folder)

    def _commit(self, key: str, tree: Path) -> str:
        if not any(tree.iterdir()):
            return ""
        name = key[:NAME_CHARS]
        while self._store.has_layer(name):  # an older one may be in use
            name = f"{key[:NAME_CHARS]}-{secrets.token_hex(2)}"
        self._store.commit_layer(name, tree)
        return name


class _Making:
    """A layer that is being made, and who listens to it."""

    task: asyncio.Task[str]

    def __init__(self) -> None:
        self.listeners: list[OnLog] = []

    def on_log(self, fd: int, text: str) -> None:
        for listener in self.listeners:
            listener(fd, text)
