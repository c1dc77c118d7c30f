"""The one place where it is decided whether a caller may make a request: `domain/roles.py` says what each RPC needs.

Which environments a request is about is read from the message itself: the names of environments in it, and every id,
however deep, so that no RPC and no field can be forgotten.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from aeolian.control.access import Access
from aeolian.control.audit import AuditTrail
from aeolian.domain.caller import Caller
from aeolian.domain.errors import AeolianError, NotFound, PermissionDenied
from aeolian.domain.roles import RULES, Right, Rule

APP_ID = re.compile(r"ap-[a-zA-Z0-9]{22}")
NOT_IDS = frozenset(
    [
        "client_id",
        "last_entry_id",
        "checkpoint_id",
        "exec_id",
        "token_flow_id",
        "worker_id",
        "environment_role_definition_id",
    ]
)
"""Fields that are called ids and name no object of an environment."""


NAMES = (
    *("name", "deployment_name", "current_name", "app_name", "function_name", "sandbox_name", "service_user_name"),
    *("tag", "path", "role_str", "default_member_role_str"),
)
"""Fields whose text the audit trail shows."""
MAX_TARGETS = 5
MAX_LOOKED_AT = 50
PARTS = ("mo-", "im-")
"""Ids of mounts and images, which say little beside others."""


class Guard:
    def __init__(self, access: Access, trail: AuditTrail, call_of_ticket: Callable[[str], str]):
        """`call_of_ticket`: the id of the call that a JWT was given out for."""
        self._access = access
        self._trail = trail
        self._call_of_ticket = call_of_ticket

    async def check(self, name: str, request: Message, caller: Caller) -> None:
        """Of a caller with roles. Raises PermissionDenied, or NotFound for environments that are none."""
        rule = RULES[name]
        if rule.right in (Right.ANY, Right.CONTAINER):
            return
        if rule.right is Right.WORKSPACE:
            raise PermissionDenied(
                f"this needs a token that manages the whole workspace, and {caller.name or caller.task_id} has only roles"
            )
        right = right_for(rule, request)
        if rule.anywhere:
            self._access.check_anywhere(caller, right)
            return
        homes = await self._homes(rule, request, caller, ids_in(request))
        if not homes:
            if await self._access.was_done(caller.once(name)):
                return  # what it was about is gone by this very request
            raise NotFound(f"{name}: what the request names does not exist")
        self._access.check(caller, right, homes)
        if right is not Right.READ and not caller.is_container:
            await self._access.learn_of_restriction(homes)

    async def where(self, name: str, request: Message, caller: Caller) -> str:
        """Names of the environments that the request is about, for the audit trail."""
        try:
            homes = await self._homes(RULES[name], request, caller, itertools.islice(ids_in(request), MAX_TARGETS))
        except AeolianError:
            return ""
        return " ".join(sorted(filter(None, map(self._access.name_of, homes))))

    async def done(self, name: str, request: Message, reply: Message | bytes, caller: Caller, where: str) -> None:
        """It was carried out."""
        made = _made(reply) if isinstance(reply, Message) else []
        await self._trail.record(caller, name, where, [*_targets(request), *made])

    async def refused(self, name: str, request: Message, caller: Caller) -> None:
        """The caller may not do this."""
        where = await self.where(name, request, caller)
        await self._trail.record(caller, name, where, _targets(request), "refused")

    async def _homes(self, rule: Rule, request: Message, caller: Caller, ids: Iterable[str]) -> set[str]:
        """Ids of the environments that the request is about, by these of its ids."""
        object_ids = list(dict.fromkeys(ids))
        if ticket := getattr(request, "function_call_jwt", ""):
            object_ids.append(self._call_of_ticket(ticket))
        found = {await self._access.home_of(object_id, caller) for object_id in object_ids}
        for text in environment_names(rule, request, has_ids=bool(object_ids)):
            found.add(self._access.environment(text, caller))
        return {home for home in found if home is not None}


def check_kind(name: str, rule: Rule | None, caller: Caller) -> None:
    """What holds for callers of this kind, whatever the request says. Raises PermissionDenied."""
    if rule is None:
        raise PermissionDenied(f"nobody has said who may call {name}")
    if caller.is_container:
        if caller.is_restricted and not rule.for_restricted:
            raise PermissionDenied(
                f"this container may not use {name}: its function was defined with `restrict_modal_access=True`"
            )
        if rule.right in (Right.MANAGE, Right.WORKSPACE):
            raise PermissionDenied(f"a container may not use {name}: that is for people with a token")
    elif rule.right is Right.CONTAINER:
        raise PermissionDenied(f"only a container may use {name}")


def ids_in(request: Message) -> Iterator[str]:
    """Every value of a field that holds ids of objects, however deep."""
    for field in _fields_of(request.DESCRIPTOR):
        if field.is_message:
            if field.is_map:
                for item in getattr(request, field.name).values():
                    yield from ids_in(item)
            elif field.is_repeated:
                for item in getattr(request, field.name):
                    yield from ids_in(item)
            elif request.HasField(field.name):
                yield from ids_in(getattr(request, field.name))
        elif field.is_map:
            yield from getattr(request, field.name).values()
        elif field.is_repeated:
            yield from filter(None, getattr(request, field.name))
        elif (value := getattr(request, field.name)) and (field.name != "app_name" or APP_ID.fullmatch(value)):
            yield value


class _Field(NamedTuple):
    name: str
    is_message: bool
    is_repeated: bool
    is_map: bool


_FIELDS: dict[str, tuple[_Field, ...]] = {}


def _fields_of(message: Descriptor) -> tuple[_Field, ...]:
    """The fields of a message in which ids may be."""
    kept = _FIELDS.get(message.full_name)
    if kept is None:
        found = (_field(field) for field in message.fields)
        kept = _FIELDS[message.full_name] = tuple(field for field in found if field is not None)
    return kept


def _field(field: FieldDescriptor) -> _Field | None:
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    value = field.message_type.fields_by_name["value"] if is_map else field
    if value.message_type is not None:
        if value.message_type.file.name.startswith("google/"):
            return None
        return _Field(field.name, True, field.is_repeated, is_map)
    if value.type == FieldDescriptor.TYPE_STRING and is_id(field.name):
        return _Field(field.name, False, field.is_repeated, is_map)
    return None


def is_id(field_name: str) -> bool:
    """Whether a field of that name holds ids, or names that may be ids."""
    return (field_name.endswith(("_id", "_ids")) or field_name == "app_name") and field_name not in NOT_IDS


def _targets(request: Message) -> list[str]:
    """Names and ids of what the request is about: a few, and not what that is made of."""
    known = request.DESCRIPTOR.fields_by_name
    names = [getattr(request, name) for name in NAMES if name in known]
    if "function" in known and request.HasField("function"):
        names.append(request.function.function_name)  # type: ignore[attr-defined]
    found = [text for text in names if isinstance(text, str) and text]
    ids = list(itertools.islice(ids_in(request), MAX_LOOKED_AT))
    chief = [text for text in ids if not text.startswith(PARTS)] or ids
    return list(dict.fromkeys([*found, *chief[:MAX_TARGETS]]))


def _made(reply: Message) -> list[str]:
    """Ids that the reply gives, of what was made."""
    fields = [field.name for field in reply.DESCRIPTOR.fields if field.name.endswith("_id")]
    return [text for name in fields if isinstance(text := getattr(reply, name), str) and text]


def right_for(rule: Rule, request: Message) -> Right:
    """What this request needs: many RPCs only look up, or make what is missing."""
    if rule.writes_if and rule.writes_if in request.DESCRIPTOR.fields_by_name:
        return max(rule.right, Right.WRITE) if getattr(request, rule.writes_if) else Right.READ
    return rule.right


def environment_names(rule: Rule, request: Message, *, has_ids: bool) -> Iterator[str]:
    """As the request gives them; "" is the default one."""
    known = request.DESCRIPTOR.fields_by_name
    for field in rule.image_names:
        prefix, slash, _ = getattr(request, field).rpartition("/")
        yield prefix if slash else getattr(request, "environment_name", "")
    for field in rule.environments:
        if field in known and ((text := getattr(request, field)) or not (rule.ids_decide and has_ids)):
            yield text
