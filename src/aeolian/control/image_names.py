"""Names of images: `name:tag` in an environment, pointing at one image at a time, with a history."""

import re
from typing import NamedTuple

from sqlalchemy.engine import Connection

from aeolian.control.environments import Environments
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument, NotFound, PermissionDenied
from aeolian.domain.ids import new_id
from aeolian.storage import images as storage
from aeolian.storage.database import Database
from aeolian.storage.environments import Environment
from aeolian.storage.images import Image, ImageRevision, ImageTag

PART = re.compile(r"[a-zA-Z0-9-_.]{1,64}")
DEFAULT_TAG = "latest"
MAX_LISTED = 1000
DEFAULT_LISTED = 100


class Name(NamedTuple):
    environment: Environment
    tag: str
    """`name:tag`."""


class ImageNames:
    def __init__(self, database: Database, clock: Clock, environments: Environments):
        self._database = database
        self._clock = clock
        self._environments = environments

    def parse(self, text: str, environment_name: str, caller: Caller) -> Name:
        """`[environment/]name[:tag]`. Raises InvalidArgument, or NotFound for an unknown environment."""
        prefix, slash, rest = text.rpartition("/")
        name, colon, tag = rest.partition(":")
        if slash and environment_name and prefix != environment_name:
            raise InvalidArgument(f"image name {text!r} is in environment '{prefix}', not in '{environment_name}'")
        for what, part in (("name", name), ("tag", tag if colon else DEFAULT_TAG)):
            if not PART.fullmatch(part):
                raise InvalidArgument(
                    f"{text[:200]!r} cannot be the name of an image: its {what} needs 1 to 64 letters, digits, dashes, "
                    "underscores and periods, as in `name:tag`"
                )
        if name.startswith("im-"):
            raise InvalidArgument(f"image name {text!r} looks like the id of an image: choose one without 'im-'")
        environment = self._environments.resolve(prefix or environment_name, caller)
        return Name(environment, f"{name}:{tag if colon else DEFAULT_TAG}")

    async def publish(self, image: Image, name: Name, caller: Caller) -> str:
        """Point a name at an image. Returns the id of the revision."""
        self._check_own(name, caller)
        now = self._clock.now()
        tag = ImageTag(
            environment_id=name.environment.id,
            tag=name.tag,
            image_id=image.image_id,
            revision_id=new_id("image_revision"),
            created_at=now,
            updated_at=now,
            published_by=caller.who,
        )

        def write(connection: Connection) -> str:
            if storage.get(connection, image.image_id) is None:
                raise NotFound(f"image {image.image_id} was deleted meanwhile: build it again, then publish it")
            storage.publish(connection, tag)
            return tag.revision_id

        return await self._database.write(write, once=caller.once("ImagePublish"))

    async def find(self, name: Name) -> ImageTag:
        """Raises NotFound."""
        found = await self._database.read(lambda c: storage.get_tag(c, name.environment.id, name.tag))
        if found is None:
            raise NotFound(
                f"no image is published as '{name.tag}' in environment '{name.environment.name}': "
                "`modal image names list` shows those there are"
            )
        return found

    async def list_in(
        self, environment_name: str, caller: Caller, *, prefix: str, image_id: str, limit: int, page_token: str
    ) -> tuple[str, list[ImageTag], str]:
        """The environment's name, names in alphabetical order, and the token of the next page ("": no more)."""
        environment = self._environments.resolve(environment_name, caller)
        limit = _limit(limit)
        found = await self._database.read(
            lambda c: storage.list_tags(c, environment.id, prefix, image_id, page_token, limit + 1)
        )
        page = found[:limit]
        return environment.name, page, page[-1].tag if len(found) > limit else ""

    async def revisions(self, name: Name, *, limit: int, page_token: str) -> tuple[list[ImageRevision], str]:
        """The newest first, and the token of the next page. None at all for a name that was never published."""
        if page_token and not (page_token.isascii() and page_token.isdigit() and len(page_token) < 10):
            raise InvalidArgument(f"page token {page_token[:80]!r} is not one that this server gave out")
        before, limit = int(page_token) if page_token else None, _limit(limit)
        found = await self._database.read(
            lambda c: storage.list_revisions(c, name.environment.id, name.tag, before, limit + 1)
        )
        page = found[:limit]
        return page, str(page[-1].number) if len(found) > limit else ""

    async def delete(self, name: Name, caller: Caller) -> None:
        """The name and its history; the image stays. Raises NotFound."""
        self._check_own(name, caller)
        once = caller.once("ImageNameDelete")
        if not await self._database.write(lambda c: storage.delete_tag(c, name.environment.id, name.tag), once=once):
            raise NotFound(f"no image is published as '{name.tag}' in environment '{name.environment.name}'")

    async def delete_in(self, environment_id: str) -> None:
        """The environment goes."""
        await self._database.write(lambda c: storage.delete_tags_in(c, environment_id))

    def _check_own(self, name: Name, caller: Caller) -> None:
        if caller.is_container and name.environment.name != caller.environment_name:
            raise PermissionDenied(
                f"a container of environment '{caller.environment_name}' cannot change image names "
                f"of environment '{name.environment.name}'"
            )


def _limit(asked: int) -> int:
    return min(asked or DEFAULT_LISTED, MAX_LISTED)
