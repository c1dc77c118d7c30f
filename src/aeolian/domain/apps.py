"""What an App is: its states, its published layout, and when silence ends it. Pure values and decisions."""

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from aeolian.domain.errors import FailedPrecondition

HEARTBEAT_TIMEOUT_S = 120.0
"""Clients beat every 15 s; an app that only a client keeps alive ends after this much silence."""


class AppState(StrEnum):
    """States of an App.

    ::

        INITIALIZING --publish--> DEPLOYED -----------------------------stop--+
              \\__failed deploy, silence__________________________________     |
        EPHEMERAL --disconnect, silence, stop-------------------------------\\-+--> STOPPING --> STOPPED
        DETACHED --disconnect, silence--> DETACHED_DISCONNECTED --idle, stop--/
    """

    INITIALIZING = "initializing"  # created for the first deployment of a name; nothing is live yet
    EPHEMERAL = "ephemeral"  # lives as long as its client
    DETACHED = "detached"  # a client is there, but the app outlives it
    DETACHED_DISCONNECTED = "detached_disconnected"  # lives until its calls are finished
    DEPLOYED = "deployed"
    STOPPING = "stopping"  # containers are ending
    STOPPED = "stopped"


TRANSITIONS: dict[AppState, frozenset[AppState]] = {
    AppState.INITIALIZING: frozenset({AppState.DEPLOYED, AppState.STOPPING}),
    AppState.EPHEMERAL: frozenset({AppState.STOPPING}),
    AppState.DETACHED: frozenset({AppState.DETACHED_DISCONNECTED, AppState.STOPPING}),
    AppState.DETACHED_DISCONNECTED: frozenset({AppState.STOPPING}),
    AppState.DEPLOYED: frozenset({AppState.STOPPING}),
    AppState.STOPPING: frozenset({AppState.STOPPED}),
    AppState.STOPPED: frozenset(),
}

ENDED = frozenset({AppState.STOPPING, AppState.STOPPED})
KEPT_BY_CLIENT = frozenset({AppState.INITIALIZING, AppState.EPHEMERAL, AppState.DETACHED})
"""States in which missing heartbeats mean something."""


class DeploymentType(StrEnum):
    STANDARD = "standard"
    ROLLBACK = "rollback"
    ROLLOVER = "rollover"
    PROMOTION = "promotion"
    STAGED = "staged"


class LayoutFunction(msgspec.Struct, frozen=True, array_like=True):
    """Which code a tag stands for: a Function at one of its definitions."""

    function_id: str
    definition_id: str


class Layout(msgspec.Struct, frozen=True):
    """What one version of an App contains: tag -> Function (with its definition), tag -> Class."""

    functions: dict[str, LayoutFunction] = {}
    classes: dict[str, str] = {}
    generation: int = 0
    """The version at which a rollover last asked for fresh containers."""

    @property
    def function_ids(self) -> set[str]:
        return {function.function_id for function in self.functions.values()}


class App(msgspec.Struct, frozen=True):
    """An App as everybody sees it. Times are epoch seconds; 0 = has not happened."""

    app_id: str
    workspace: str
    environment_id: str
    environment_name: str
    state: AppState
    description: str = ""
    name: str = ""
    """The deployment name; "" for an ephemeral app."""
    tags: dict[str, str] = {}
    created_at: float = 0.0
    created_by: str = ""
    deployed_at: float = 0.0
    deployed_by: str = ""
    stopped_at: float = 0.0
    stopped_by: str = ""
    """Who stopped it by hand; "" when it ended by itself."""
    version: int = 0
    """The live version; 0 = nothing was published."""

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def outlives_its_client(self) -> bool:
        return self.state in (AppState.DETACHED, AppState.DETACHED_DISCONNECTED)

    def moved_to(self, state: AppState, **changes) -> "App":
        """This app in `state`. Raises FailedPrecondition when TRANSITIONS has no such step."""
        if state is not self.state and state not in TRANSITIONS[self.state]:
            raise FailedPrecondition(f"App {self.app_id} is {self.state}: it cannot become {state}")
        return msgspec.structs.replace(self, state=state, **changes)


class AppVersion(msgspec.Struct, frozen=True):
    """One entry of an App's deployment history."""

    app_id: str
    version: int
    layout: Layout
    deployment_type: DeploymentType = DeploymentType.STANDARD
    deployed_at: float = 0.0
    deployed_by: str = ""
    client_version: str = ""
    deployment_tag: str = ""
    commit_info: bytes = b""
    """A serialized CommitInfo, or b""."""
    source_version: int = 0
    """Of a rollback, rollover or promotion: the version that it repeats."""


def silent_apps(apps: Iterable[App], last_heard_at: dict[str, float], now: float) -> list[App]:
    """Apps whose client has not been heard of for HEARTBEAT_TIMEOUT_S, of those that a client keeps."""
    return [
        app
        for app in apps
        if app.state in KEPT_BY_CLIENT and now - last_heard_at.get(app.app_id, app.created_at) > HEARTBEAT_TIMEOUT_S
    ]
