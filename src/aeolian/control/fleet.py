"""What Apps and deployments need of the containers: the lifeline between what is defined and what runs."""

from collections.abc import Set
from typing import Protocol


class Fleet(Protocol):
    """The containers, as far as the life of an App concerns them."""

    async def stop_app(self, app_id: str, *, graceful: bool) -> None:
        """End the app's containers and calls; return when they are gone and their last log lines are stored."""
        ...

    async def retire_functions(self, function_ids: Set[str]) -> None:
        """These Functions are in no live version any more: finish what is queued, then let their containers end."""
        ...

    async def definitions_changed(self, app_id: str) -> None:
        """New containers must run the new definitions; old ones take no new inputs, but finish what they hold."""
        ...

    def num_containers(self, app_id: str) -> int:
        """How many containers of the app are starting or running."""
        ...

    def is_idle(self, app_id: str) -> bool:
        """Whether no call of the app is unfinished."""
        ...


class NoFleet:
    """Where nothing runs: tests, and a server that is still being put together."""

    async def stop_app(self, app_id: str, *, graceful: bool) -> None:
        return None

    async def retire_functions(self, function_ids: Set[str]) -> None:
        return None

    async def definitions_changed(self, app_id: str) -> None:
        return None

    def num_containers(self, app_id: str) -> int:
        return 0

    def is_idle(self, app_id: str) -> bool:
        return True
