"""A container as the server sees it."""

from typing import NamedTuple

from aeolian.control.call_state import Input
from aeolian.domain.calls import InputKey
from aeolian.domain.containers import TRANSITIONS, ContainerState, Resources
from aeolian.domain.link import StopContainer


class Want(NamedTuple):
    """The container's open request for inputs."""

    seq: int
    max_items: int
    linger_ms: int


class Container:
    __slots__ = (
        "app_id",
        "attempt",
        "enqueued_at",
        "environment_name",
        "function_id",
        "held",
        "hooks",
        "idle_since",
        "image_id",
        "is_last",
        "is_sent",
        "is_shut_off",
        "max_inputs",
        "num_given",
        "num_requests",
        "num_waits",
        "resources",
        "revision",
        "sdk_version",
        "started_at",
        "state",
        "stop",
        "task_id",
        "want",
        "worker_id",
    )

    def __init__(
        self,
        task_id: str,
        *,
        app_id: str,
        function_id: str,
        revision: str,
        environment_name: str,
        worker_id: str,
        image_id: str,
        sdk_version: str,
        resources: Resources,
        enqueued_at: float,
        max_inputs: int = 0,
        attempt: int = 0,
    ):
        """`attempt`: how many of its pool had died at their start, in a row, when it was started."""
        self.task_id = task_id
        self.app_id = app_id
        self.function_id = function_id
        self.revision = revision
        self.environment_name = environment_name
        self.worker_id = worker_id
        self.image_id = image_id
        self.sdk_version = sdk_version
        self.resources = resources
        self.enqueued_at = enqueued_at
        self.max_inputs = max_inputs
        self.attempt = attempt
        self.is_shut_off = False
        """It may do nothing but its own work (`restrict_modal_access`)."""
        self.state = ContainerState.PENDING
        self.started_at = 0.0
        """When it first asked for inputs."""
        self.held: dict[InputKey, Input] = {}
        self.want: Want | None = None
        self.idle_since = 0.0
        """Since when it waits for inputs with nothing to do; 0: it does not."""
        self.num_given = 0
        self.num_requests = 0
        """Of a server: those that it works on."""
        self.num_waits = 0
        """How many polls for outputs of other inputs it has open."""
        self.is_last = False
        """It was given as many inputs as it may have."""
        self.is_sent = False
        """Its worker was told to start it."""
        self.stop: StopContainer | None = None
        """What its worker was told, and is told again when it comes back."""
        self.hooks: tuple = ()

    @property
    def is_starting(self) -> bool:
        return self.state in (ContainerState.PENDING, ContainerState.STARTING)

    @property
    def takes_inputs(self) -> bool:
        return self.state is ContainerState.RUNNING and not self.is_last

    @property
    def is_blocked(self) -> bool:
        """Everything that it works on waits for outputs of other inputs: it needs no core meanwhile."""
        return bool(self.held) and self.num_waits >= len(self.held)

    def move_to(self, state: ContainerState) -> bool:
        """Whether that is a step; repetitions and steps back are none."""
        if state not in TRANSITIONS[self.state]:
            return False
        self.state = state
        return True
