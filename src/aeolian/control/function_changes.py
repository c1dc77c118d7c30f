"""How Functions come to be: announced, defined, bound to parameters and options, rescaled.

What is made here is a draft until `deployments` publishes it. Everything is stored, then told to `functions`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from google.protobuf.message import DecodeError
from modal_proto import api_pb2

from aeolian.control import definitions, pool_settings, variants
from aeolian.control.apps import Apps
from aeolian.control.definition_store import Definition
from aeolian.control.definitions import WebAddress, WebFunction
from aeolian.control.functions import Functions
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import ClassNameUsed, InvalidArgument, NotFound
from aeolian.domain.functions import AutoscalerSettings
from aeolian.domain.ids import content_id, new_id
from aeolian.domain.suggestions import instead_of
from aeolian.storage import functions as storage
from aeolian.storage.database import Database
from aeolian.storage.functions import DefinitionRow, FunctionRow

MAX_PARAMS_BYTES = 2 << 20
MAX_RANKED_VARIANTS = 2000


class Dependencies(Protocol):
    """What other nouns know of the ids that a definition names."""

    async def describe(self, object_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        """An Object with its handle metadata for each id that exists and that the caller may use."""
        ...


class Addresses(Protocol):
    """Where web functions are reached (`web_urls.WebUrls`)."""

    async def claim(self, webs: Sequence[WebFunction]) -> None:
        """Give each of them its address."""
        ...

    def address_of(self, web: WebFunction) -> WebAddress: ...


class FunctionChanges:
    def __init__(
        self,
        database: Database,
        clock: Clock,
        apps: Apps,
        functions: Functions,
        dependencies: Dependencies,
        addresses: Addresses,
    ):
        self.when_rescaled: list[Callable[[str], None]] = []
        """Called with the id of a Function whose autoscaler settings were overridden."""
        self.num_containers_of: Callable[[str], int] = lambda function_id: 0
        """How many containers a Function (or a variant) has now."""
        self.offered_runtimes: Callable[[], Sequence[str]] = tuple
        """The names of runtimes that containers can have; empty: nobody can tell now."""
        self._database = database
        self._clock = clock
        self._apps = apps
        self._functions = functions
        self._dependencies = dependencies
        self._addresses = addresses

    async def named(self, app_name: str, tag: str, environment_name: str, version: int, caller: Caller) -> str:
        """The id of a deployed Function, or of its variant that is pinned to a version of the app."""
        app = self._apps.deployed(app_name, environment_name, caller)
        layout = self._functions.layout(app.app_id)
        if version:
            layout = await self._functions.layout_at(app.app_id, version)
        found = layout.functions.get(tag)
        if found is None:
            at = f" at version {version}" if version else ""
            if f"{tag}.*" in layout.functions:
                raise ClassNameUsed(f"'{tag}' is a class of App '{app_name}'{at}: look it up with modal.Cls.from_name")
            names = [name for name in layout.functions if not name.endswith(".*")]
            raise NotFound(f"App '{app_name}' has no Function '{tag}'{at}{instead_of(tag, names)}")
        if not version:
            return found.function_id
        return await self.bind(found.function_id, b"", api_pb2.FunctionOptions(), caller, pinned_version=version)

    async def precreate(
        self, request: api_pb2.FunctionPrecreateRequest, caller: Caller
    ) -> tuple[str, api_pb2.FunctionHandleMetadata]:
        """Give a Function its id before its code is known; nothing changes for one that is there."""
        await self._apps.find_living(request.app_id, caller)
        definitions.check_name(request.function_name)
        function_id, definition_id = request.existing_function_id or _id_for(caller, "FunctionPrecreate"), ""
        is_new = not (request.existing_function_id or self._functions.has(function_id))
        if not is_new:
            row = self._existing(function_id, request.app_id, caller)
            definition_id = row.draft_definition_id
        await self._addresses.claim(definitions.web_functions(request, function_id, request.app_id))
        handle = definitions.handle_of(
            request,
            function_id=function_id,
            app_id=request.app_id,
            definition_id=definition_id,
            address_of=self._addresses.address_of,
        )
        if is_new:
            row = FunctionRow(
                function_id=function_id,
                app_id=request.app_id,
                name=request.function_name,
                handle=handle.SerializeToString(),
                created_at=self._clock.now(),
            )
            await self._database.write(lambda c: storage.insert_function(c, row))
            self._functions.keep(row)
        return function_id, handle

    async def create(self, request: api_pb2.FunctionCreateRequest, caller: Caller) -> tuple[str, Definition]:
        """Store a definition, as a draft until it is published. Returns the Function's id and the definition."""
        await self._apps.find_living(request.app_id, caller)
        ranked = definitions.ranked_functions(request)
        for function in ranked:
            definitions.check(function)
            self._check_runtime(function)
        dependencies = await self._described(ranked[0], caller)
        content = definitions.canonical(ranked)
        function_id, now = request.existing_function_id or _id_for(caller, "FunctionCreate"), self._clock.now()
        row = None
        if request.existing_function_id or self._functions.has(function_id):
            row = self._existing(function_id, request.app_id, caller)
        await self._addresses.claim(definitions.web_functions(ranked[0], function_id, request.app_id))
        definition_id = definitions.definition_id(function_id, content, caller.sdk_version)
        definition = DefinitionRow(
            definition_id=definition_id,
            function_id=function_id,
            content=content,
            dependencies=api_pb2.AppLayout(objects=dependencies).SerializeToString(deterministic=True),
            sdk_version=caller.sdk_version,
            created_at=now,
        )
        if row is None:
            row = FunctionRow(
                function_id=function_id,
                app_id=request.app_id,
                name=ranked[0].function_name,
                draft_definition_id=definition_id,
                created_at=now,
            )
            new_row = row

            def store(connection) -> None:
                storage.put_definition(connection, definition)
                storage.insert_function(connection, new_row)

            await self._database.write(store)
        elif row.draft_definition_id != definition_id:

            def store(connection) -> None:
                storage.put_definition(connection, definition)
                storage.set_draft(connection, function_id, definition_id)

            await self._database.write(store)
            row = msgspec.structs.replace(self._functions.row(function_id), draft_definition_id=definition_id)
        self._functions.keep(row)
        return function_id, self._functions.take_definition(definition)

    def _check_runtime(self, function: api_pb2.Function) -> None:
        asked, offered = pool_settings.asked_runtime(function), self.offered_runtimes()
        if asked and offered and asked not in offered:
            raise InvalidArgument(
                f"'{function.function_name}' asks for the runtime '{asked}', and there is none of that name here: "
                f"take one of {', '.join(offered)}, or leave it out"
            )

    def created(
        self, function_id: str, definition: Definition
    ) -> tuple[api_pb2.FunctionHandleMetadata, api_pb2.FunctionData]:
        """What FunctionCreate answers: of the definition just made, live or not."""
        row = self._functions.row(function_id)
        return self._functions.handle_at(row, definition), self._functions.data_at(row, definition)

    async def bind(
        self,
        function_id: str,
        serialized_params: bytes,
        options: api_pb2.FunctionOptions,
        caller: Caller,
        *,
        pinned_version: int = 0,
    ) -> str:
        """The id of the variant with these parameters and options: always the same for the same ones."""
        row = self._functions.check_callable(function_id, caller)
        kept = variants.canonical_options(options)
        if row.base_function_id:  # a variant of a variant is a variant of the base
            kept = variants.stacked(row.options, kept)
            serialized_params = serialized_params or row.serialized_params
            pinned_version = pinned_version or row.pinned_version
            row = self._functions.row(row.base_function_id)
        variant_id = variants.variant_id(row.function_id, serialized_params, kept, pinned_version)
        if self._functions.has(variant_id):
            return variant_id
        definition, _ = self._functions.definition(row)
        self._check_params(row, definition, serialized_params)
        bound = variants.with_options(definition.functions[0], api_pb2.FunctionOptions.FromString(kept))
        definitions.check(bound)
        await self._described(bound, caller)
        variant = FunctionRow(
            function_id=variant_id,
            app_id=row.app_id,
            name=row.name,
            base_function_id=row.function_id,
            serialized_params=serialized_params,
            options=kept,
            pinned_version=pinned_version,
            created_at=self._clock.now(),
        )

        def store(connection) -> None:
            if storage.get_function(connection, variant_id) is None:
                storage.insert_function(connection, variant)

        await self._database.write(store)
        if not self._functions.has(variant_id):
            self._functions.keep(variant)
        return variant_id

    async def list_variants(
        self, function_id: str, before: tuple[float, str] | None, limit: int, caller: Caller
    ) -> list[FunctionRow]:
        """Variants of a Function, the newest first."""
        base_id = self._functions.base_function_id(self._functions.row(function_id, caller).function_id)
        return await self._database.read(lambda c: storage.list_variants(c, base_id, before, limit))

    async def busiest_variants(self, function_id: str, limit: int, caller: Caller) -> list[FunctionRow] | None:
        """The variants with most containers, the newest of equals first. None: there are too many to be compared."""
        rows = await self.list_variants(function_id, None, MAX_RANKED_VARIANTS + 1, caller)
        if len(rows) > MAX_RANKED_VARIANTS:
            return None
        return sorted(rows, key=lambda row: -self.num_containers_of(row.function_id))[:limit]

    async def override_autoscaler(
        self, function_id: str, override: api_pb2.AutoscalerSettings, caller: Caller
    ) -> AutoscalerSettings:
        """Override the fields that are set, until the next deployment. Returns the settings that hold now."""
        row = self._functions.check_callable(function_id, caller)
        merged = api_pb2.AutoscalerSettings.FromString(row.autoscaler_override)
        merged.MergeFrom(override)
        settings = pool_settings.overridden(self._functions.defined_autoscaler(function_id), merged)
        if settings.max_containers and settings.min_containers > settings.max_containers:
            raise InvalidArgument(
                f"min_containers ({settings.min_containers}) cannot be above max_containers ({settings.max_containers})"
            )
        if settings.min_containers and self._functions.needs_parameters(function_id):
            raise InvalidArgument(
                f"'{row.name}' has parameters, so no container of it can be kept without them: "
                "set min_containers on an instance, as in MyClass(x=1).update_autoscaler(min_containers=1)"
            )
        by = api_pb2.AutoscalerConfiguration.FromString(row.autoscaler_events or b"")
        for field, _ in override.ListFields():
            event = by.override_events[field.name]
            event.timestamp, event.user_id = self._clock.now(), caller.token_id or caller.task_id
            event.requested_by = caller.name or caller.task_id or caller.workspace
        stored, events = merged.SerializeToString(), by.SerializeToString()
        await self._database.write(lambda c: storage.set_autoscaler_override(c, [function_id], stored, events))
        self._functions.keep(
            msgspec.structs.replace(
                self._functions.row(function_id), autoscaler_override=stored, autoscaler_events=events
            )
        )
        for callback in self.when_rescaled:
            callback(function_id)
        return settings

    async def _described(self, function: api_pb2.Function, caller: Caller) -> list[api_pb2.Object]:
        """Objects for all ids that the definition names. Raises NotFound naming those that do not exist."""
        wanted = definitions.referenced_ids(function)
        found = await self._dependencies.describe(wanted, caller)
        if missing := sorted(wanted - found.keys()):
            raise NotFound(
                f"Function '{function.function_name}' uses objects that do not exist: {', '.join(missing)}. "
                "They may have been deleted: look them up or create them again"
            )
        return [found[dependency.object_id] for dependency in function.object_dependencies]

    def _check_params(self, row: FunctionRow, definition: Definition, serialized_params: bytes) -> None:
        if len(serialized_params) > MAX_PARAMS_BYTES:
            raise InvalidArgument(
                f"the parameters of '{row.name}' have {len(serialized_params)} bytes, the limit is {MAX_PARAMS_BYTES}"
            )
        info = definition.functions[0].class_parameter_info
        if info.format == api_pb2.ClassParameterInfo.PARAM_SERIALIZATION_FORMAT_PROTO:
            try:
                api_pb2.ClassParameterSet.FromString(serialized_params)
            except DecodeError as error:
                raise InvalidArgument(f"the parameters of '{row.name}' are not a valid ClassParameterSet") from error

    def _existing(self, function_id: str, app_id: str, caller: Caller) -> FunctionRow:
        row = self._functions.row(function_id, caller)
        if row.app_id != app_id or row.base_function_id:
            raise InvalidArgument(f"{function_id} is not a Function of App {app_id}: it cannot be redefined there")
        return row


def _id_for(caller: Caller, rpc: str) -> str:
    """For a new Function: the same for each repetition of the request."""
    once = caller.once(rpc)
    return content_id("function", once.encode()) if once else new_id("function")
