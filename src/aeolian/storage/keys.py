"""Key files of the data directory: made once, mode 0600, never half written."""

import contextlib
import os
import secrets
from pathlib import Path

KEY_BYTES = 32


def load_or_create(folder: Path, name: str) -> bytes:
    """The key of that name below `folder`, made at the first call."""
    path = folder / name
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = folder / f"{name}.{os.getpid()}.new"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(secrets.token_bytes(KEY_BYTES))
        stream.flush()
        os.fsync(stream.fileno())
    try:
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink()
    return path.read_bytes()
