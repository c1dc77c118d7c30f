"""What the RPCs of Secrets, Dicts and Queues have in common."""

from modal_proto import api_pb2

from aeolian.domain.errors import InvalidArgument
from aeolian.storage.named_objects import NamedObject

IF_EXISTS = {
    api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING: "return",
    api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS: "fail",
    api_pb2.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS: "replace",
}
MAX_LISTED = 1000
DEFAULT_LISTED = 100


def page_of(pagination: api_pb2.ListPagination) -> tuple[float, int]:
    """(created before, limit)"""
    return pagination.created_before, min(pagination.max_objects or DEFAULT_LISTED, MAX_LISTED)


def check_anonymous(kind: int, app_id: str, title: str) -> str:
    """The app that is to own an anonymous object, "" for an ephemeral one."""
    if kind == api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL:
        return ""
    if kind != api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP:
        raise InvalidArgument(f"object creation type {kind} does not exist")
    if not app_id:
        raise InvalidArgument(f"an anonymous {title} owned by an app needs the app's id")
    return app_id


def creation_info(item: NamedObject) -> api_pb2.CreationInfo:
    return api_pb2.CreationInfo(created_at=item.created_at, created_by=item.workspace)
