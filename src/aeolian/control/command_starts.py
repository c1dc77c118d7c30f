"""What a client wants run in a container, checked and completed: arguments, variables of Secrets, a terminal."""

from collections.abc import Sequence

from modal_proto import api_pb2
from modal_proto import task_command_router_pb2 as router_pb2

from aeolian.control.apps import Apps
from aeolian.control.command_access import Access
from aeolian.control.containers import Containers
from aeolian.control.secrets import Secrets
from aeolian.domain.caller import Caller
from aeolian.domain.errors import InvalidArgument, NotFound, Unimplemented
from aeolian.domain.execs import Command, StartExec, TerminalSize

UNATTENDED_S = 300.0
"""A shell whose client has gone for so long is ended."""
MAX_ARGUMENT_BYTES = 128 << 10
"""What Linux takes for one argument or variable."""
MAX_BYTES = 1 << 20
"""All of them together."""


class CommandStarts:
    def __init__(self, containers: Containers, apps: Apps, secrets: Secrets):
        self._containers = containers
        self._apps = apps
        self._secrets = secrets

    async def make(self, request: router_pb2.TaskExecStartRequest, access: Access) -> StartExec:
        """Raises InvalidArgument, NotFound (a Secret), Unimplemented (containers beside the main one)."""
        if request.container_id:
            raise Unimplemented(f"a task has one container here: there is no {request.container_id!r} beside it")
        if not request.command_args:
            raise InvalidArgument("a command needs at least the name of a program")
        env = await self._env(request, access)
        _check(request.command_args, env)
        terminal = request.pty_info if request.HasField("pty_info") else None
        return StartExec(
            request.exec_id,
            Command(tuple(request.command_args), env, request.workdir, _size(terminal) if terminal else None),
            keeps_stdout=request.stdout_config == router_pb2.TASK_EXEC_STDOUT_CONFIG_PIPE,
            keeps_stderr=request.stderr_config == router_pb2.TASK_EXEC_STDERR_CONFIG_PIPE,
            joins_stderr=request.stderr_config == router_pb2.TASK_EXEC_STDERR_CONFIG_STDOUT,
            timeout_s=float(request.timeout_secs),
            unattended_s=UNATTENDED_S if terminal is not None and _is_shell(terminal) else 0.0,
        )

    async def _env(self, request: router_pb2.TaskExecStartRequest, access: Access) -> dict[str, str]:
        """Later ones win."""
        env: dict[str, str] = {}
        if request.HasField("pty_info"):
            shown = request.pty_info
            names = {"TERM": shown.env_term, "COLORTERM": shown.env_colorterm, "TERM_PROGRAM": shown.env_term_program}
            env.update({name: value for name, value in names.items() if value})
        if request.secret_sources:
            if request.secret_ids or request.env:
                raise InvalidArgument("name variables by secret_sources, or by secret_ids and env, not by both")
            for source in request.secret_sources:
                if source.WhichOneof("source") == "secret_id":
                    env.update(await self._secret([source.secret_id], access))
                else:
                    env.update(source.env.contents)
            return env
        return {**env, **await self._secret(request.secret_ids, access), **request.env}

    async def _secret(self, secret_ids: Sequence[str], access: Access) -> dict[str, str]:
        """Only Secrets of the container's own environment: whoever may run commands there may know them."""
        if not secret_ids:
            return {}
        container = self._containers.get_lately(access.task_id)
        app = self._apps.known(container.app_id) if container is not None else None
        caller = Caller(workspace=access.workspace, token_id=access.token_id)
        for secret_id in secret_ids:
            found = await self._secrets.objects.get(secret_id, caller)
            if app is None or found.environment_id != app.environment_id:
                raise NotFound(f"there is no Secret {secret_id!r} in the environment of container {access.task_id}")
        return await self._secrets.env_of(secret_ids)


def _is_shell(terminal: api_pb2.PTYInfo) -> bool:
    """Of somebody at a terminal, not of a program."""
    return terminal.pty_type == api_pb2.PTYInfo.PTY_TYPE_SHELL and not terminal.no_terminate_on_idle_stdin


def _size(terminal: api_pb2.PTYInfo) -> TerminalSize:
    """Clients that do not know theirs say 0."""
    usual = TerminalSize()
    rows, columns = terminal.winsz_rows or usual.rows, terminal.winsz_cols or usual.columns
    return TerminalSize(min(rows, 0xFFFF), min(columns, 0xFFFF))


def _check(argv: Sequence[str], env: dict[str, str]) -> None:
    """Raises InvalidArgument for what no Linux process can be given."""
    for name in env:
        if not name or "=" in name:
            raise InvalidArgument(f"{name!r} cannot be an environment variable")
    texts = [*argv, *(f"{name}={value}" for name, value in env.items())]
    if any("\0" in text for text in texts):
        raise InvalidArgument("arguments and variables of a command cannot contain null characters")
    sizes = [len(text.encode(errors="surrogateescape")) for text in texts]
    if max(sizes) >= MAX_ARGUMENT_BYTES or sum(sizes) > MAX_BYTES:
        raise InvalidArgument(
            f"arguments and variables of a command have {sum(sizes):,} bytes, the longest {max(sizes):,}: "
            f"{MAX_BYTES:,} and {MAX_ARGUMENT_BYTES - 1:,} are the limits, so hand over large data by stdin"
        )
