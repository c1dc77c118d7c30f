"""`RUN --mount=…`: what a step sees besides the image. Facts: https://docs.docker.com/reference/dockerfile/#run---mount."""

from collections.abc import Mapping
from typing import NamedTuple

from aeolian.domain.errors import InvalidArgument
from aeolian.worker.images.configuration import absolute
from aeolian.worker.images.context import ContextEntry

KINDS = frozenset(["bind", "cache", "secret", "ssh", "tmpfs"])
MOUNTED = ("bind", "cache", "secret", "tmpfs")


class RunMount(NamedTuple):
    """One mount. Of `files`, `layers` and `secret`, a bind has one of the first two, a secret the last."""

    kind: str
    target: str
    source: str = ""
    is_writable: bool = False
    cache_id: str = ""
    files: tuple[ContextEntry, ...] = ()
    layers: tuple[str, ...] = ()
    secret: str = ""


def parse_mount(text: str, workdir: str) -> dict[str, str]:
    """The fields of `type=cache,target=/x,…`. Raises InvalidArgument."""
    fields: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        fields[name.strip()] = value if equals else "true"
    fields.setdefault("type", "bind")
    target = fields.get("target") or fields.get("dst") or fields.get("destination") or ""
    if fields["type"] not in KINDS:
        raise InvalidArgument(f"--mount={text}: the type is one of {', '.join(sorted(KINDS))}")
    if not target and fields["type"] in ("bind", "cache", "tmpfs"):
        raise InvalidArgument(f"--mount={text}: target= is missing")
    fields["target"] = absolute(workdir, target) if target else ""
    return fields


def secret_mount(fields: Mapping[str, str], secrets: Mapping[str, str]) -> tuple[RunMount | None, dict[str, str]]:
    """A file of a secret's value, or (second) the variables that carry it. Nothing for an optional one that is missing.

    Raises InvalidArgument for a required one.
    """
    name = fields.get("id") or fields["target"].rpartition("/")[2]
    if name not in secrets:
        if fields.get("required") == "true":
            raise InvalidArgument(f"--mount=type=secret: no secret of this image has a value named {name!r}")
        return None, {}
    if "env" in fields:
        return None, {fields["env"]: secrets[name]}
    return RunMount("secret", fields["target"] or f"/run/secrets/{name}", secret=secrets[name]), {}
