"""The token that `aeolian connect` hands out: made at the first start, kept readable in `D/keys` (the database has
only its hash)."""

import os
from pathlib import Path

import msgspec

from aeolian.cli.settings import Settings
from aeolian.domain.errors import FailedPrecondition


class ClientToken(msgspec.Struct, frozen=True):
    token_id: str
    token_secret: str


def path_of(settings: Settings) -> Path:
    return settings.keys_dir / "client.json"


def load(settings: Settings) -> ClientToken:
    """Raises FailedPrecondition when there is none, with what to do."""
    path = path_of(settings)
    try:
        return msgspec.json.decode(path.read_bytes(), type=ClientToken)
    except FileNotFoundError:
        raise FailedPrecondition(
            f"there is no token at {path}: `aeolian up --data-dir {settings.data_dir}` makes one when it starts"
        ) from None
    except (OSError, msgspec.MsgspecError) as error:
        raise FailedPrecondition(
            f"the token at {path} cannot be read: {error}. Delete the file and start Aeolian again to get a new one"
        ) from error


def save(settings: Settings, token: ClientToken) -> None:
    path = path_of(settings)
    fresh = path.with_suffix(".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(msgspec.json.encode(token))
    fresh.replace(path)
