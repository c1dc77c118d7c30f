"""Which images nobody needs: read from the database alone, while no server runs."""

from collections.abc import Mapping

from modal_proto import api_pb2
from sqlalchemy.engine import Connection

from aeolian.domain.calls import Status
from aeolian.storage import apps, containers, functions, images
from aeolian.storage.images import Image


def unused_since(connection: Connection, before: float) -> list[tuple[Image, float]]:
    """Images that were used last before then, with that time; the one that has waited longest comes first.

    Needed are: what any version of an App that has not ended may run, what has a name, what is being built, and the
    images below those.
    """
    known = {image.image_id: image for image in images.list_all(connection)}
    used_at = {id: max(image.created_at, image.started_at, image.finished_at) for id, image in known.items()}
    needed = images.named(connection) | {id for id, image in known.items() if image.status is Status.PENDING}
    living = {app.app_id for app in apps.list_living(connection)}
    for app_id, created_at, content in functions.definitions_by_app(connection):
        for item in api_pb2.FunctionData.FromString(content).ranked_functions:
            if app_id in living:
                needed.add(item.function.image_id)
            _use(used_at, item.function.image_id, created_at)
    for row in containers.uses_of_images(connection):
        _use(used_at, row.image_id, row.last_at)
    needed.update(row.image_id for row in containers.unfinished(connection))
    needed.update(id for id, at in used_at.items() if at >= before)
    needed = _with_bases(needed, known)
    return sorted(((known[id], used_at[id]) for id in known.keys() - needed), key=lambda found: found[1])


def _use(used_at: dict[str, float], image_id: str, at: float) -> None:
    if image_id in used_at:
        used_at[image_id] = max(used_at[image_id], at)


def _with_bases(image_ids: set[str], known: Mapping[str, Image]) -> set[str]:
    found, wanted = set[str](), list(image_ids)
    while wanted:
        image_id = wanted.pop()
        if image_id not in found:
            found.add(image_id)
            wanted += known[image_id].base_image_ids if image_id in known else ()
    return found
