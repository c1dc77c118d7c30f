"""Messages between server and worker, over the one stream that the worker opens.

Commands go down, events go up. Both ends batch: one frame carries a list of messages. The stream may break
at any moment; the worker then dials again and says `Hello` with everything it holds, and each side repeats
what the other has not acknowledged. Every message is therefore safe to receive twice.
"""

import msgspec

from aeolian.domain import execs
from aeolian.domain.containers import ContainerSpec, ExitStatus, HookTiming


class HeldInput(msgspec.Struct, frozen=True, array_like=True):
    """An input that a container is working on."""

    input_id: str
    retry_count: int


class ContainerReport(msgspec.Struct, frozen=True):
    """What a worker says of one of its containers when it (re)connects.

    Of one that has exited the end itself follows, after the outputs that are not acknowledged yet.
    """

    task_id: str
    function_id: str
    state: str
    held: tuple[HeldInput, ...] = ()
    wants: "WantInputs | None" = None
    num_given: int = 0
    """How many inputs it was given in all."""


# ---- events: worker -> server ---------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    worker_id: str
    """Stable: a worker that starts again on the same data directory has the same."""
    life: str
    """New with each start of the worker: log deliveries are counted within it."""
    runtimes: tuple[str, ...]
    milli_cpu: int
    memory_mb: int
    num_gpus: int = 0
    containers: tuple[ContainerReport, ...] = ()
    image_ids: tuple[str, ...] = ()
    is_leaving: bool = False


class ContainerChanged(msgspec.Struct, frozen=True, tag="container"):
    """A container reached a state. `exit` is set with EXITED, which the worker repeats until `AckExit`."""

    task_id: str
    state: str
    at: float
    hooks: tuple[HookTiming, ...] = ()
    exit: ExitStatus | None = None
    task_result: bytes = b""
    """A serialized GenericResult when user code could not be imported or an enter/exit hook failed."""
    last_lines: tuple[str, ...] = ()
    """With EXITED, of a container that did not end well: what it wrote last."""


class WantInputs(msgspec.Struct, frozen=True, tag="want"):
    """A container asks for its next inputs. One request is open per container; `seq` counts them."""

    task_id: str
    seq: int
    max_items: int = 1
    linger_ms: int = 0


class ReturnInputs(msgspec.Struct, frozen=True, tag="return"):
    """Inputs that were assigned ahead and would wait too long for their container: give them to another one."""

    task_id: str
    held: tuple[HeldInput, ...]


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """Outputs of a container: serialized FunctionPutOutputsItem messages, kept by the worker until `AckOutputs`."""

    task_id: str
    seq: int
    items: tuple[bytes, ...]


class LogLine(msgspec.Struct, frozen=True, array_like=True):
    """One piece of output. `fd`: 1 stdout, 2 stderr, 3 info."""

    fd: int
    at: float
    data: str
    input_id: str = ""
    function_call_id: str = ""


class Logs(msgspec.Struct, frozen=True, tag="logs"):
    """Log lines of one container or one image build; kept by the worker until `AckLogs`."""

    seq: int
    task_id: str = ""
    image_id: str = ""
    lines: tuple[LogLine, ...] = ()


class ImageBuilt(msgspec.Struct, frozen=True, tag="image"):
    """A build came to its end. `error` is "" on success. `info`: what the server stores as the image's metadata."""

    image_id: str
    error: str = ""
    info: dict[str, str] = {}
    build_id: str = ""


class ContainerAnswer(msgspec.Struct, frozen=True, tag="answer"):
    """To a `ContainerRequest`, by its id. Lost with the connection: whoever asked asks again."""

    request_id: str
    answer: execs.Answer


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    """The worker is shutting down: its containers finish what they hold, and no new ones start."""


class Heartbeat(msgspec.Struct, frozen=True, tag="beat"):
    at: float


Event = (
    Hello
    | ContainerChanged
    | WantInputs
    | ReturnInputs
    | Outputs
    | Logs
    | ImageBuilt
    | ContainerAnswer
    | Leaving
    | Heartbeat
)

# ---- commands: server -> worker -------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The first answer to `Hello`: containers that the server does not know must be ended."""

    unknown_task_ids: tuple[str, ...] = ()


class StartContainer(msgspec.Struct, frozen=True, tag="start"):
    spec: ContainerSpec


class StopContainer(msgspec.Struct, frozen=True, tag="stop"):
    """End a container: graceful = SIGINT and the grace period, else SIGKILL at once.

    `drain`: let it finish the inputs it holds, then give it the kill switch.
    """

    task_id: str
    graceful: bool = True
    drain: bool = False
    reason: str = ""


class AssignInputs(msgspec.Struct, frozen=True, tag="assign"):
    """The answer to `WantInputs(seq)`: serialized FunctionGetInputsItem messages with their ids.

    There may be more than were wanted: the worker keeps those for the container's next requests.
    """

    task_id: str
    seq: int
    held: tuple[HeldInput, ...]
    items: tuple[bytes, ...]


class CancelInputs(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop working on these inputs; the container stays usable where user code lets it."""

    task_id: str
    input_ids: tuple[str, ...]
    terminate: bool = False


class AckOutputs(msgspec.Struct, frozen=True, tag="ack_outputs"):
    task_id: str
    seq: int


class AckLogs(msgspec.Struct, frozen=True, tag="ack_logs"):
    """This batch is stored; it says nothing of those before it."""

    seq: int


class AckExit(msgspec.Struct, frozen=True, tag="ack_exit"):
    """The end of this container was heard: the worker need not repeat it."""

    task_id: str


class BuildImage(msgspec.Struct, frozen=True, tag="build"):
    """Build one image layer on top of images that the worker has. See `domain/images.py`.

    `build_id` is new with each build: the same one again asks how that build went, or is going.
    """

    image_id: str
    spec: bytes
    env: dict[str, str] = {}
    force: bool = False
    build_id: str = ""


class CancelBuild(msgspec.Struct, frozen=True, tag="cancel_build"):
    """Nobody waits for this build any more."""

    image_id: str
    build_id: str


class PrepareImage(msgspec.Struct, frozen=True, tag="prepare"):
    """Containers of this image and SDK will be wanted soon: have what they start from ready."""

    image_id: str
    sdk_version: str
    builder_version: str


class ForgetVolumes(msgspec.Struct, frozen=True, tag="forget_volumes"):
    """These Volumes are gone or have lost much: what a worker keeps of older versions only holds the disk."""

    volume_ids: tuple[str, ...]


class ContainerRequest(msgspec.Struct, frozen=True, tag="request"):
    """Something that is asked of a running container, about commands in it: one `ContainerAnswer` follows."""

    task_id: str
    request_id: str
    request: execs.Request


Command = (
    Welcome
    | StartContainer
    | StopContainer
    | AssignInputs
    | CancelInputs
    | AckOutputs
    | AckLogs
    | AckExit
    | BuildImage
    | CancelBuild
    | PrepareImage
    | ForgetVolumes
    | ContainerRequest
)

encode = msgspec.msgpack.Encoder().encode
decode_events = msgspec.msgpack.Decoder(list[Event]).decode
decode_commands = msgspec.msgpack.Decoder(list[Command]).decode
