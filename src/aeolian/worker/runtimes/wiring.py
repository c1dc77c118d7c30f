"""Where a container finds its worker's socket and its arguments: variables and binds that every runtime adds."""

from collections.abc import Sequence

from aeolian.worker.hooks.base import Bind, Start

SOCKET_TARGET = "/__modal/worker.sock"
ARGUMENTS_TARGET = "/__modal/arguments.pb"
EVERYWHERE = {"PYTHONUNBUFFERED": "1"}
"""Variables of all containers."""


def wired(start: Start) -> tuple[dict[str, str], list[Bind]]:
    """The container's whole environment and its binds, outer ones first."""
    env = {
        **EVERYWHERE,
        "MODAL_SERVER_URL": f"unix://{SOCKET_TARGET}",
        "MODAL_CONTAINER_ARGUMENTS_PATH": ARGUMENTS_TARGET,
        **start.env,
    }
    binds = list(start.binds)
    socket_target = env["MODAL_SERVER_URL"].removeprefix("unix://")
    if env["MODAL_SERVER_URL"].startswith("unix://") and not is_shown(socket_target, binds):
        binds.append(Bind(start.socket_path, socket_target, read_only=False))
    if start.spec.arguments and not is_shown(env["MODAL_CONTAINER_ARGUMENTS_PATH"], binds):
        arguments = start.folder / "arguments.pb"
        arguments.write_bytes(start.spec.arguments)
        binds.append(Bind(arguments, env["MODAL_CONTAINER_ARGUMENTS_PATH"]))
    return env, sorted(binds, key=lambda bind: bind.target.rstrip("/").count("/"))


def is_shown(target: str, binds: Sequence[Bind]) -> bool:
    return any(target == bind.target or target.startswith(bind.target + "/") for bind in binds)
