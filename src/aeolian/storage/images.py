"""Tables and queries of Images: what they are made of, how their builds went, and the names they are published under."""

from collections.abc import Iterable

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.domain.calls import Status
from aeolian.storage.database import metadata

images = sa.Table(
    "images",
    metadata,
    sa.Column("image_id", sa.String, primary_key=True),
    sa.Column("recipe", sa.String, nullable=False, index=True),
    sa.Column("is_current", sa.Boolean, nullable=False),
    sa.Column("becomes_current", sa.Boolean, nullable=False),
    sa.Column("workspace", sa.String, nullable=False),
    sa.Column("builder_version", sa.String, nullable=False),
    sa.Column("base_image_ids", sa.JSON, nullable=False),
    sa.Column("status", sa.Integer, nullable=False, index=True),
    sa.Column("error", sa.String, nullable=False),
    sa.Column("details", sa.LargeBinary, nullable=False),
    sa.Column("function_id", sa.String, nullable=False),
    sa.Column("app_id", sa.String, nullable=False),
    sa.Column("build_id", sa.String, nullable=False),
    sa.Column("num_losses", sa.Integer, nullable=False),
    sa.Column("is_fresh", sa.Boolean, nullable=False),
    sa.Column("logs_after", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("finished_at", sa.Float, nullable=False),
    sa.Column("definition", sa.LargeBinary, nullable=False),
)

image_tags = sa.Table(
    "image_tags",
    metadata,
    sa.Column("environment_id", sa.String, primary_key=True),
    sa.Column("tag", sa.String, primary_key=True),
    sa.Column("image_id", sa.String, nullable=False, index=True),
    sa.Column("revision_id", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("updated_at", sa.Float, nullable=False),
    sa.Column("published_by", sa.String, nullable=False),
)

image_revisions = sa.Table(
    "image_revisions",
    metadata,
    sa.Column("environment_id", sa.String, primary_key=True),
    sa.Column("tag", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("revision_id", sa.String, nullable=False),
    sa.Column("image_id", sa.String, nullable=False, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("published_by", sa.String, nullable=False),
)
"""Every publication under a name, numbered from 1."""


class Image(msgspec.Struct, frozen=True):
    """An image and its newest build."""

    image_id: str
    recipe: str
    """Digest of the definition: equal for images that are made in the same way."""
    is_current: bool
    """It is the one that is given to those who ask for the recipe."""
    becomes_current: bool
    """It replaces the current one when its build succeeds."""
    workspace: str
    builder_version: str
    base_image_ids: tuple[str, ...]
    function_id: str
    """The Function that makes it (`run_function`), or ""."""
    app_id: str
    """The App that asked for the build, and whose logs hold its output."""
    build_id: str
    """New with each build; a container id in shape, since clients ask for a build's output by it."""
    status: Status = Status.PENDING
    error: str = ""
    details: bytes = b""
    """A serialized ImageMetadata."""
    num_losses: int = 0
    """How often what the Function had made was lost before it was kept."""
    is_fresh: bool = False
    """The build takes no layer from the cache."""
    logs_after: int = 0
    """Number of the App's last line before this build's output."""
    created_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0


class ImageTag(msgspec.Struct, frozen=True):
    """A name in an environment: `name:tag`."""

    environment_id: str
    tag: str
    image_id: str
    revision_id: str
    created_at: float
    updated_at: float
    published_by: str


class ImageRevision(msgspec.Struct, frozen=True):
    number: int
    revision_id: str
    image_id: str
    created_at: float
    published_by: str


_COLUMNS = [column for column in images.c if column.name != "definition"]


def insert(connection: Connection, image: Image, definition: bytes) -> None:
    connection.execute(images.insert(), {**_values(image), "definition": definition})


def get(connection: Connection, image_id: str) -> Image | None:
    return next(iter(get_many(connection, [image_id])), None)


def get_many(connection: Connection, image_ids: Iterable[str]) -> list[Image]:
    query = sa.select(*_COLUMNS).where(images.c.image_id.in_(list(image_ids)))
    return [_image(row) for row in connection.execute(query)]


def list_all(connection: Connection) -> list[Image]:
    return [_image(row) for row in connection.execute(sa.select(*_COLUMNS))]


def named(connection: Connection) -> set[str]:
    """Images that a name leads to, or led to in one of its revisions."""
    both = sa.union(sa.select(image_tags.c.image_id), sa.select(image_revisions.c.image_id))
    return set(connection.execute(both).scalars())


def current(connection: Connection, recipe: str) -> Image | None:
    query = sa.select(*_COLUMNS).where(images.c.recipe == recipe, images.c.is_current)
    row = connection.execute(query).first()
    return None if row is None else _image(row)


def unfinished(connection: Connection) -> list[Image]:
    query = sa.select(*_COLUMNS).where(images.c.status == int(Status.PENDING)).order_by(images.c.started_at)
    return [_image(row) for row in connection.execute(query)]


def get_definition(connection: Connection, image_id: str) -> bytes | None:
    """The serialized Image message."""
    return connection.execute(sa.select(images.c.definition).where(images.c.image_id == image_id)).scalar()


def begin(connection: Connection, image: Image, definition: bytes | None) -> None:
    """A new build of an image that is there."""
    values = _values(image)
    if definition is not None:
        values["definition"] = definition
    connection.execute(images.update().where(images.c.image_id == image.image_id).values(values))


def lost(connection: Connection, image_id: str, num_losses: int) -> None:
    connection.execute(images.update().where(images.c.image_id == image_id).values(num_losses=num_losses))


def finish(connection: Connection, image: Image) -> Image | None:
    """Keep how a build ended. None: that build is over already, or the image is deleted."""
    is_current = image.is_current
    if image.status is Status.SUCCESS and image.becomes_current:
        is_current = True
        connection.execute(images.update().where(images.c.recipe == image.recipe).values(is_current=False))
    done = msgspec.structs.replace(image, is_current=is_current)
    updated = connection.execute(
        images.update()
        .where(
            images.c.image_id == image.image_id,
            images.c.build_id == image.build_id,
            images.c.status == int(Status.PENDING),
        )
        .values(
            status=int(done.status),
            error=done.error,
            details=done.details,
            finished_at=done.finished_at,
            is_current=is_current,
        )
    )
    return done if updated.rowcount else None


def delete(connection: Connection, image_id: str) -> None:
    """With the names that lead to it."""
    for table in (image_tags, image_revisions, images):
        connection.execute(table.delete().where(table.c.image_id == image_id))


# ---- names ----------------------------------------------------------------------------------------------


def get_tag(connection: Connection, environment_id: str, tag: str) -> ImageTag | None:
    query = sa.select(image_tags).where(image_tags.c.environment_id == environment_id, image_tags.c.tag == tag)
    row = connection.execute(query).first()
    return None if row is None else ImageTag(**row._mapping)


def publish(connection: Connection, tag: ImageTag) -> None:
    """Point the name at an image, and remember that."""
    where = sa.and_(image_tags.c.environment_id == tag.environment_id, image_tags.c.tag == tag.tag)
    values = msgspec.structs.asdict(tag)
    update = image_tags.update().where(where)
    if not connection.execute(update.values({k: v for k, v in values.items() if k != "created_at"})).rowcount:
        connection.execute(image_tags.insert(), values)
    revisions = image_revisions.c
    last = connection.execute(
        sa.select(sa.func.max(revisions.number)).where(
            revisions.environment_id == tag.environment_id, revisions.tag == tag.tag
        )
    ).scalar()
    connection.execute(
        image_revisions.insert(),
        {
            "environment_id": tag.environment_id,
            "tag": tag.tag,
            "number": (last or 0) + 1,
            "revision_id": tag.revision_id,
            "image_id": tag.image_id,
            "created_at": tag.updated_at,
            "published_by": tag.published_by,
        },
    )


def list_tags(
    connection: Connection, environment_id: str, prefix: str, image_id: str, after: str, limit: int
) -> list[ImageTag]:
    """Names in alphabetical order, those after `after`."""
    query = sa.select(image_tags).where(image_tags.c.environment_id == environment_id, image_tags.c.tag > after)
    if prefix:
        query = query.where(image_tags.c.tag.startswith(prefix, autoescape=True))
    if image_id:
        query = query.where(image_tags.c.image_id == image_id)
    return [ImageTag(**row._mapping) for row in connection.execute(query.order_by(image_tags.c.tag).limit(limit))]


def list_revisions(
    connection: Connection, environment_id: str, tag: str, before: int | None, limit: int
) -> list[ImageRevision]:
    """The newest first, those before number `before`."""
    columns = [image_revisions.c[name] for name in ImageRevision.__struct_fields__]
    query = sa.select(*columns).where(image_revisions.c.environment_id == environment_id, image_revisions.c.tag == tag)
    if before is not None:
        query = query.where(image_revisions.c.number < before)
    query = query.order_by(image_revisions.c.number.desc()).limit(limit)
    return [ImageRevision(**row._mapping) for row in connection.execute(query)]


def delete_tag(connection: Connection, environment_id: str, tag: str) -> bool:
    """With its revisions. False: there is no such name."""
    found = False
    for table in (image_revisions, image_tags):
        where = sa.and_(table.c.environment_id == environment_id, table.c.tag == tag)
        found = connection.execute(table.delete().where(where)).rowcount > 0
    return found


def delete_tags_in(connection: Connection, environment_id: str) -> None:
    for table in (image_tags, image_revisions):
        connection.execute(table.delete().where(table.c.environment_id == environment_id))


def _values(image: Image) -> dict:
    return {**msgspec.structs.asdict(image), "status": int(image.status), "base_image_ids": list(image.base_image_ids)}


def _image(row) -> Image:
    values = dict(row._mapping)
    values["status"] = Status(values["status"])
    values["base_image_ids"] = tuple(values["base_image_ids"])
    return Image(**values)
