"""What a worker is told to start: everything of a Function's current definition that its container needs."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from aeolian.control.functions import Functions
from aeolian.domain.containers import ContainerSpec, MountSpec
from aeolian.domain.functions import PoolSettings

DEFAULT_BUILDER_VERSION = "2025.06"
LAST_WITH_DEPENDENCIES = "2024.10"
"""Images of later builder versions do not hold what the SDK depends on."""


class Mounts(Protocol):
    async def spec(self, mount_id: str) -> MountSpec: ...


class Secrets(Protocol):
    async def env_of(self, secret_ids: Sequence[str]) -> dict[str, str]:
        """The variables of these secrets; those of later ones win."""
        ...


class Images(Protocol):
    def builder_version_of(self, image_id: str) -> str: ...

    async def wait_built(self, image_id: str) -> None: ...

    def saved_from(self, function_id: str) -> tuple[str, str]:
        """Of a build function: the image that its container is kept as, and the build; empty: none."""
        ...


class ContainerSpecs:
    def __init__(self, functions: Functions, mounts: Mounts, secrets: Secrets, images: Images, *, workspace: str):
        self._functions = functions
        self._mounts = mounts
        self._secrets = secrets
        self._images = images
        self._workspace = workspace

    async def make(self, function_id: str, task_id: str) -> tuple[ContainerSpec, PoolSettings]:
        """Raises what says why it cannot be started: a secret or an image that is gone, a build that failed."""
        settings = self._functions.pool_settings(function_id)
        arguments = self._functions.container_arguments(function_id, task_id)
        mounts = await asyncio.gather(*(self._mounts.spec(mount_id) for mount_id in settings.mount_ids))
        env = dict(await self._secrets.env_of(settings.secret_ids)) if settings.secret_ids else {}
        if settings.image_id:
            await self._images.wait_built(settings.image_id)
        env.update(self._own_env(settings, task_id))
        builder_version = self.builder_version(settings)
        saved = self._images.saved_from(function_id) if settings.is_builder_function else ("", "")
        return (
            ContainerSpec(
                task_id=task_id,
                app_id=settings.app_id,
                function_id=function_id,
                environment_name=settings.environment_name,
                image_id=settings.image_id,
                arguments=arguments,
                env=env,
                mounts=tuple(mounts),
                volumes=settings.volumes,
                resources=settings.resources,
                sdk_version=settings.sdk_version,
                builder_version=builder_version,
                # Clients that know an image only by its name or id do not know what it brings.
                mount_client_dependencies=settings.mount_client_dependencies
                or builder_version > LAST_WITH_DEPENDENCIES,
                runtime=settings.runtime,
                block_network=settings.block_network,
                allowed_cidrs=settings.allowed_cidrs,
                input_timeout_s=settings.timeout_s,
                startup_timeout_s=settings.startup_timeout_s,
                max_concurrent_inputs=settings.max_concurrent_inputs,
                is_server=settings.is_server,
                server_port=settings.server_port,
                exit_grace_s=settings.exit_grace_s,
                save_image_as=saved[0],
                build_id=saved[1],
            ),
            settings,
        )

    def builder_version(self, settings: PoolSettings) -> str:
        """The image builder version that decides which dependencies its containers are shown."""
        if settings.builder_version:
            return settings.builder_version
        found = self._images.builder_version_of(settings.image_id) if settings.image_id else ""
        return found or DEFAULT_BUILDER_VERSION

    def _own_env(self, settings: PoolSettings, task_id: str) -> dict[str, str]:
        return {
            "MODAL_IS_REMOTE": "1",
            "MODAL_TASK_ID": task_id,
            "MODAL_IMAGE_ID": settings.image_id,
            "MODAL_ENVIRONMENT": settings.environment_name,
            "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_UNSPECIFIED",
            "MODAL_REGION": self._workspace,
            "PYTHONUNBUFFERED": "1",
        }
