"""How a worker asks the server about Volumes: requests and answers as bytes, errors by the name of their type.

Each request is one of three calls (`MANIFEST`, `COMMIT`, `MAKE_FOLDER`) and is safe to repeat. An answer is
either the call's value or an error of `domain.errors`, so whatever carries the bytes needs no notion of errors.
"""

from typing import Any

import msgspec

from aeolian.domain import errors
from aeolian.domain.volumes import VolumeChanges

MANIFEST, COMMIT, MAKE_FOLDER = "VolumeManifest", "VolumeCommitChanges", "VolumeMakeFolder"


class ManifestRequest(msgspec.Struct, frozen=True, array_like=True):
    """A page of a volume's entries: those that versions after `since` changed, after path `after`."""

    volume_id: str
    since: int = 0
    after: str = ""


class CommitRequest(msgspec.Struct, frozen=True, array_like=True):
    volume_id: str
    changes: VolumeChanges


class MakeFolderRequest(msgspec.Struct, frozen=True, array_like=True):
    volume_id: str
    path: str


class Failure(msgspec.Struct, frozen=True, array_like=True):
    kind: str
    message: str


encode = msgspec.msgpack.Encoder().encode


def encode_answer(value: Any) -> bytes:
    return b"\0" + encode(value)


def encode_error(error: errors.AeolianError) -> bytes:
    return b"\1" + encode(Failure(type(error).__name__, error.message))


def decode_answer(answer: bytes, kind: type) -> Any:
    """The value of an answer, of type `kind`. Raises the error that it carries."""
    if answer[:1] == b"\0":
        return msgspec.msgpack.decode(answer[1:], type=kind)
    failure = msgspec.msgpack.decode(answer[1:], type=Failure)
    error = getattr(errors, failure.kind, errors.AeolianError)
    raise error(failure.message)
