"""What a container is: its specification, as the server sends it to a worker, and its states."""

from enum import StrEnum

import msgspec


class ContainerState(StrEnum):
    """States of a container (a running task, `ta-…`).

    ::

        PENDING --> STARTING --> RUNNING --> STOPPING --> EXITED
            \\___________\\____________\\____________________/
    """

    PENDING = "pending"  # wanted; the worker has not answered yet
    STARTING = "starting"  # hooks are running, or user code is being imported
    RUNNING = "running"  # has asked for inputs
    STOPPING = "stopping"  # told to end; takes no more inputs
    EXITED = "exited"


TRANSITIONS: dict[ContainerState, frozenset[ContainerState]] = {
    ContainerState.PENDING: frozenset({ContainerState.STARTING, ContainerState.STOPPING, ContainerState.EXITED}),
    ContainerState.STARTING: frozenset({ContainerState.RUNNING, ContainerState.STOPPING, ContainerState.EXITED}),
    ContainerState.RUNNING: frozenset({ContainerState.STOPPING, ContainerState.EXITED}),
    ContainerState.STOPPING: frozenset({ContainerState.EXITED}),
    ContainerState.EXITED: frozenset(),
}


class VolumeMountSpec(msgspec.Struct, frozen=True):
    """A Volume inside a container. The worker mounts it at /__modal/volumes/<volume_id> and binds it to `path`."""

    volume_id: str
    path: str
    read_only: bool = False
    sub_path: str = ""
    allow_background_commits: bool = True


class MountFile(msgspec.Struct, frozen=True):
    """One file of a Mount: content by SHA-256 in the content store, at an absolute path of the container."""

    path: str
    sha256_hex: str
    size_bytes: int
    mode: int = 0o644


class MountSpec(msgspec.Struct, frozen=True):
    """A Mount: a set of files, read-only in the container, immutable, shared by content (`mount_id`)."""

    mount_id: str
    files: tuple[MountFile, ...] = ()


class Resources(msgspec.Struct, frozen=True):
    """What a container asks for, and what it may use at most (0 = no limit)."""

    milli_cpu: int = 125
    milli_cpu_max: int = 0
    memory_mb: int = 128
    memory_mb_max: int = 0
    ephemeral_disk_mb: int = 0
    gpu_count: int = 0


class ContainerSpec(msgspec.Struct, frozen=True):
    """Everything a worker needs to start one container."""

    task_id: str
    app_id: str
    function_id: str
    environment_name: str
    image_id: str
    argv: tuple[str, ...] = ("python", "-m", "modal._container_entrypoint")
    """The command; `python` is resolved by the runtime to the image's interpreter."""
    arguments: bytes = b""
    """A serialized `ContainerArguments`, put into a file that MODAL_CONTAINER_ARGUMENTS_PATH names."""
    env: dict[str, str] = {}
    """Variables of secrets, then MODAL_*: on top of the image's own environment."""
    cwd: str = "/root"
    mounts: tuple[MountSpec, ...] = ()
    volumes: tuple[VolumeMountSpec, ...] = ()
    resources: Resources = Resources()
    sdk_version: str = ""
    """Version of the `modal` package that the container runs (the caller's own); "" for none (sandboxes)."""
    builder_version: str = "2025.06"
    mount_client_dependencies: bool = True
    block_network: bool = False
    allowed_cidrs: tuple[str, ...] | None = None
    """The only networks that it may connect to; None: no such list."""
    runtime: str = ""
    """"" = the worker's own choice, else `native`, `process` or `gvisor`."""
    input_timeout_s: float = 300.0
    startup_timeout_s: float = 300.0
    max_concurrent_inputs: int = 1
    is_server: bool = False
    """An `@app.server` container: no ContainerHello, no heartbeat, no inputs."""
    server_port: int = 0
    """Where such a container serves HTTP."""
    exit_grace_s: float = 0.0
    """How long the requests that it works on may take when it is to end."""
    save_image_as: str = ""
    """For `Image.run_function`: the image id under which the container's file system is kept when it ends well."""
    build_id: str = ""
    """The build that this image id is made by."""


class HookTiming(msgspec.Struct, frozen=True):
    """How long one step of a container's start took."""

    name: str
    seconds: float


class ExitStatus(msgspec.Struct, frozen=True):
    """How a container ended."""

    exit_code: int
    """The process's exit status; negative: the signal that ended it."""
    oom_killed: bool = False
    reason: str = ""
    """Why the worker ended it, or why it could not start; "" when it ended by itself."""
    disk_full: str = ""
    """That it "wrote so much, and may write …": it was killed for it."""
