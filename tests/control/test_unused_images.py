import pytest
from modal_proto import api_pb2

from aeolian.control.unused_images import unused_since
from aeolian.domain.apps import App, AppState
from aeolian.domain.calls import Status
from aeolian.storage import apps, containers, functions, images
from aeolian.storage.functions import DefinitionRow, FunctionRow
from aeolian.storage.images import Image, ImageTag

OLD, NOW = 1000.0, 9000.0


def image(image_id: str, *bases: str, status: Status = Status.SUCCESS, at: float = OLD) -> Image:
    return Image(
        image_id,
        recipe=image_id,
        is_current=True,
        becomes_current=False,
        workspace="local",
        builder_version="2025.06",
        base_image_ids=bases,
        function_id="",
        app_id="ap-1",
        build_id=f"ta-{image_id}",
        status=status,
        created_at=at,
    )


class World:
    """An App that lives and one that has ended, with Functions on images."""

    def __init__(self, connection):
        self.connection = connection
        for app_id, state in (("ap-living", AppState.DEPLOYED), ("ap-ended", AppState.STOPPED)):
            apps.insert_app(connection, App(app_id, "local", "en-1", "main", state))

    def has(self, *found: Image) -> None:
        for one in found:
            images.insert(self.connection, one, b"")

    def defines(self, app_id: str, image_id: str, at: float = OLD) -> None:
        function_id = f"fu-{app_id}-{image_id}"
        row = FunctionRow(function_id, app_id, "f")
        if functions.get_function(self.connection, function_id) is None:
            functions.insert_function(self.connection, row)
        data = api_pb2.FunctionData(ranked_functions=[{"function": {"image_id": image_id}}])
        content = data.SerializeToString()
        definition = DefinitionRow(f"de-{function_id}-{at}", function_id, content, b"", "1.6.4", at)
        functions.put_definition(self.connection, definition)

    def ran(self, image_id: str, enqueued_at: float, finished_at: float) -> None:
        times = {"enqueued_at": enqueued_at, "started_at": enqueued_at, "finished_at": finished_at}
        row = dict.fromkeys((column.name for column in containers.containers.c), "")
        row |= {
            "task_id": f"ta-{image_id}",
            "image_id": image_id,
            "resources": b"",
            "hooks": b"",
            "exit_code": 0,
            **times,
        }
        self.connection.execute(containers.insert, row)

    def unused(self) -> list[tuple[str, float]]:
        return [(found.image_id, at) for found, at in unused_since(self.connection, NOW - 2000)]


@pytest.fixture
def world(database):
    with database.engine.begin() as connection:
        yield World(connection)


async def test_an_image_that_nothing_has_used_for_long_is_unused(world):
    world.has(image("im-old", at=500.0), image("im-older", at=400.0), image("im-new", at=NOW))
    assert world.unused() == [("im-older", 400.0), ("im-old", 500.0)]


async def test_what_a_living_app_may_run_is_needed_in_any_of_its_versions_and_with_the_images_below(world):
    world.has(image("im-base"), image("im-top", "im-base"), image("im-ended"), image("im-lately"))
    world.defines("ap-living", "im-top")
    world.defines("ap-living", "im-top", at=OLD + 1)
    world.defines("ap-ended", "im-ended")
    world.defines("ap-ended", "im-lately", at=NOW)
    assert world.unused() == [("im-ended", OLD)]


async def test_what_has_a_name_or_is_being_built_is_needed(world):
    world.has(image("im-named"), image("im-building", status=Status.PENDING), image("im-failed", status=Status.FAILURE))
    images.publish(world.connection, ImageTag("en-1", "mine:latest", "im-named", "r-1", OLD, OLD, "me"))
    assert [image_id for image_id, _ in world.unused()] == ["im-failed"]


async def test_an_image_counts_as_used_as_long_as_containers_run_on_it(world):
    world.has(image("im-runs"), image("im-ran-lately"), image("im-ran"))
    world.ran("im-runs", enqueued_at=OLD, finished_at=0.0)
    world.ran("im-ran-lately", enqueued_at=OLD, finished_at=NOW)
    world.ran("im-ran", enqueued_at=OLD + 5, finished_at=OLD + 10)
    assert world.unused() == [("im-ran", OLD + 10)]
