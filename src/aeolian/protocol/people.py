"""RPCs about other people and programs: members, service users, and who has which role in an environment.

A member is a token: it has a name, and either manages everything or has roles.
"""

from collections import Counter

from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from modal_proto import api_pb2

from aeolian.control.environments import Environments
from aeolian.control.tokens import Tokens
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument, NotFound
from aeolian.domain.roles import Role, role_named
from aeolian.storage.environments import Environment
from aeolian.storage.tokens import Token

ROLES = {
    Role.NO_ACCESS: api_pb2.ENVIRONMENT_ROLE_NO_ACCESS,
    Role.VIEWER: api_pb2.ENVIRONMENT_ROLE_VIEWER,
    Role.CONTRIBUTOR: api_pb2.ENVIRONMENT_ROLE_CONTRIBUTOR,
    Role.MANAGER: api_pb2.ENVIRONMENT_ROLE_CUSTOM,
}
"""The protocol has no number for a manager; its name goes beside it."""
ROLES_BY_NUMBER = {number: role for role, number in ROLES.items() if role is not Role.MANAGER}


class PeopleRpcs:
    def __init__(self, tokens: Tokens, environments: Environments, clock: Clock):
        self._tokens = tokens
        self._environments = environments
        self._clock = clock

    # ---- members ----------------------------------------------------------------------------------------

    async def WorkspaceMembersList(self, request: Empty, caller: Caller) -> api_pb2.WorkspaceMembersListResponse:
        response = api_pb2.WorkspaceMembersListResponse()
        owner = True
        for token in await self._members(caller):
            role = api_pb2.MEMBER_ROLE_USER if token.is_limited else api_pb2.MEMBER_ROLE_MANAGER
            if owner and not token.is_limited:  # the first one was made with the server
                role, owner = api_pb2.MEMBER_ROLE_OWNER, False
            response.members.add(
                member_id=token.token_id,
                user_id=token.token_id,
                member_displayname=token.name,
                member_role=role,
                joined_at=token.created_at,
                last_active_at=token.last_used_at,
            )
        return response

    # ---- roles ------------------------------------------------------------------------------------------

    async def EnvironmentGetRoles(
        self, request: api_pb2.EnvironmentGetRolesRequest, caller: Caller
    ) -> api_pb2.EnvironmentGetRolesResponse:
        environment = self._environment(request.environment_id)
        response = api_pb2.EnvironmentGetRolesResponse(name=environment.name, created_at=environment.created_at)
        tokens = await self._tokens.all()
        names = Counter(token.name for token in tokens if not token.service_user_id)
        for token in tokens:
            if token.workspace != caller.workspace:
                continue
            role = token.role_in(environment.id)
            principal = response.principal_roles.add(
                role=ROLES[role],
                role_str=role.label,
                has_role_assignment=environment.id in token.roles,
            )
            if token.service_user_id:
                principal.service_user_id, principal.service_user_name = token.service_user_id, token.name
            else:
                principal.user_id = token.token_id
                principal.user_name = token.name if names[token.name] == 1 else f"{token.name} ({token.token_id})"
        return response

    async def EnvironmentRoleSet(self, request: api_pb2.EnvironmentRoleSetRequest, caller: Caller) -> Empty:
        """Without a role: as if none had been given."""
        if request.environment_id:
            environment = self._environment(request.environment_id)
        else:
            environment = self._environments.resolve(request.environment_name, caller)
        if request.role_str:
            role: Role | None = role_named(request.role_str)
        elif request.role == api_pb2.ENVIRONMENT_ROLE_UNSPECIFIED:
            role = None
        elif request.role in ROLES_BY_NUMBER:
            role = ROLES_BY_NUMBER[request.role]
        else:
            raise InvalidArgument(f"{request.role} is no role that can be given: viewer, contributor and no-access are")
        token_id = request.user_id
        if request.service_user_id or request.service_user_name:
            user = await self._tokens.service_user(user_id=request.service_user_id, name=request.service_user_name)
            token_id = user.token_id
        if not token_id:
            raise InvalidArgument("whose role is it to be? the request names neither a user nor a service user")
        await self._tokens.set_role(token_id, environment.id, role)
        await self._environments.refresh()
        return Empty()

    # ---- service users ----------------------------------------------------------------------------------

    async def ServiceUserCreate(
        self, request: api_pb2.ServiceUserCreateRequest, caller: Caller
    ) -> api_pb2.ServiceUserCreateResponse:
        lifetime_s = request.expires_in_seconds
        expires_at = self._clock.now() + lifetime_s if lifetime_s else 0.0
        user_id, token_id, secret = await self._tokens.create_service_user(
            request.name,
            caller.workspace,
            expires_at=expires_at,
            created_by=caller.name,
            once=caller.once("ServiceUserCreate"),
        )
        response = api_pb2.ServiceUserCreateResponse(service_user_id=user_id, token_id=token_id, token_secret=secret)
        if expires_at:
            response.expires_at.CopyFrom(Timestamp(seconds=int(expires_at)))
        return response

    async def ServiceUserList(self, request: Empty, caller: Caller) -> api_pb2.ServiceUserListResponse:
        tokens = [one for one in await self._tokens.all() if one.service_user_id and one.workspace == caller.workspace]
        return api_pb2.ServiceUserListResponse(service_users=[self._service_user(token) for token in tokens])

    async def ServiceUserInfo(
        self, request: api_pb2.ServiceUserInfoRequest, caller: Caller
    ) -> api_pb2.ServiceUserInfoResponse:
        token = await self._tokens.service_user(name=request.service_user_name)
        return api_pb2.ServiceUserInfoResponse(service_user=self._service_user(token))

    async def ServiceUserDelete(self, request: api_pb2.ServiceUserDeleteRequest, caller: Caller) -> Empty:
        await self._tokens.delete_service_user(
            user_id=request.service_user_id, name=request.service_user_name, once=caller.once("ServiceUserDelete")
        )
        return Empty()

    # ---- inside -----------------------------------------------------------------------------------------

    async def _members(self, caller: Caller) -> list[Token]:
        tokens = await self._tokens.all()
        return [token for token in tokens if not token.service_user_id and token.workspace == caller.workspace]

    def _environment(self, environment_id: str) -> Environment:
        found = self._environments.by_id(environment_id)
        if found is None:
            raise NotFound(
                f"there is no environment with the id {environment_id!r}: `modal environment list` shows them"
            )
        return found

    def _service_user(self, token: Token) -> api_pb2.ServiceUser:
        now = self._clock.now()
        message = api_pb2.ServiceUser(
            name=token.name,
            token_id=token.token_id,
            service_user_id=token.service_user_id,
            created_by=token.created_by,
            created_at=token.created_at,
            last_used_at=token.last_used_at,
            status="disabled" if token.is_disabled else "expired" if 0 < token.expires_at <= now else "active",
            scoped=True,
        )
        if token.expires_at:
            message.expires_at = token.expires_at
        for environment in self._environments.all():
            if (role := token.roles.get(environment.id)) is not None:
                message.environment_roles.add(environment_name=environment.name, role_str=role.label)
        return message
