"""Functions: what they are, at which definition, in which variants, and what their containers are told.

A Function has a stable id and, over time, several definitions. Which one is current follows from the live
layout of its app, set by `deployments`; a definition that was created but not published (a draft) changes
nothing for those who call the Function, but is what runs while the Function is in no layout yet.

    Function fu-1 --layout v1--> definition de-a          containers started then keep de-a
                  --layout v2--> definition de-b          new inputs, new containers
    variant fu-2 of fu-1 (parameters, options): the definition of fu-1 with the options on top
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import msgspec
from google.protobuf.message import DecodeError
from modal_proto import api_pb2

from aeolian.control import definitions, pool_settings, variants
from aeolian.control.apps import Apps
from aeolian.control.definition_store import Definition, DefinitionStore
from aeolian.control.definitions import WebUrlOf
from aeolian.domain.apps import Layout, LayoutFunction
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import ClassNameUsed, FailedPrecondition, InvalidArgument, NotFound
from aeolian.domain.functions import AutoscalerSettings, PoolSettings
from aeolian.domain.ids import new_id
from aeolian.storage import apps as apps_storage
from aeolian.storage import functions as storage
from aeolian.storage.database import Database
from aeolian.storage.functions import DefinitionRow, FunctionRow

MAX_PARAMS_BYTES = 2 << 20


class Dependencies(Protocol):
    """What other nouns know of the ids that a definition names."""

    async def describe(self, object_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        """An Object with its handle metadata for each id that exists and that the caller may use."""
        ...


class FunctionVersion(NamedTuple):
    """A Function, or a variant of one, as a container started now would run it."""

    function_id: str
    base_function_id: str
    """"" unless this is a variant."""
    app_id: str
    definition_id: str
    revision: str
    """Equal for containers that are as good as new ones."""
    serialized_params: bytes
    function: api_pb2.Function
    """With the variant's options applied. Do not change it."""
    sdk_version: str


class Functions:
    def __init__(self, database: Database, clock: Clock, apps: Apps, dependencies: Dependencies, web_url_of: WebUrlOf):
        self.when_rescaled: list[Callable[[str], None]] = []
        """Called with the id of a Function whose autoscaler settings were overridden."""
        self._database = database
        self._clock = clock
        self._apps = apps
        self._dependencies = dependencies
        self._web_url_of = web_url_of
        self._definitions = DefinitionStore(database)
        self._rows: dict[str, FunctionRow] = {}
        self._by_app: dict[str, set[str]] = {}
        self._variants: dict[str, set[str]] = {}
        self._layouts: dict[str, Layout] = {}
        self._places: dict[str, dict[str, LayoutFunction]] = {}
        self._retired: set[str] = set()
        self._pinned: dict[tuple[str, int], Layout] = {}
        self._pools: dict[str, PoolSettings] = {}
        apps.when_stopped.append(self._forget_app)

    async def load(self) -> None:
        """Read the Functions of living apps and what is live of them. Needs loaded `apps`."""
        for row in await self._database.read(storage.list_living_functions):
            self._keep(row)
        living = {app.app_id: app for app in self._apps.living_apps()}
        layouts = await self._database.read(lambda c: apps_storage.live_layouts(c, living))
        for app_id, layout in layouts.items():
            self._set_layout(app_id, layout)
            for function_id in self._by_app.get(app_id, ()):
                row = self._rows[function_id]
                if function_id not in self._places[app_id] and row.created_at < living[app_id].deployed_at:
                    self._retired.add(function_id)

    # ---- asking -----------------------------------------------------------------------------------------

    def row(self, function_id: str, caller: Caller | None = None) -> FunctionRow:
        """Raises NotFound for unknown ids, for Functions of ended apps, and for those of another workspace."""
        row = self._rows.get(function_id)
        if row is None or (caller is not None and self._workspace(row) != caller.workspace):
            raise NotFound(f"there is no Function {function_id!r}, or its App has been stopped")
        return row

    def check_callable(self, function_id: str, caller: Caller) -> FunctionRow:
        """The Function, if it takes new calls. Raises NotFound or FailedPrecondition."""
        row = self.row(function_id, caller)
        self._apps.living(row.app_id)
        if (row.base_function_id or function_id) in self._retired:
            raise NotFound(f"Function '{row.name}' ({function_id}) is not part of its App any more")
        return row

    def current(self, function_id: str) -> FunctionVersion:
        """What a container started now runs. Raises NotFound, or FailedPrecondition before FunctionCreate."""
        row = self.row(function_id)
        definition, revision = self._definition(row)
        function = definition.functions[0]
        if row.options:
            function = variants.with_options(function, api_pb2.FunctionOptions.FromString(row.options))
        return FunctionVersion(
            function_id=function_id,
            base_function_id=row.base_function_id,
            app_id=row.app_id,
            definition_id=definition.definition_id,
            revision=revision,
            serialized_params=row.serialized_params,
            function=function,
            sdk_version=definition.sdk_version,
        )

    def pool_settings(self, function_id: str) -> PoolSettings:
        """What the pool of this Function (or variant) needs to know, at its current definition."""
        kept = self._pools.get(function_id)
        if kept is not None:
            return kept
        row, version = self.row(function_id), self.current(function_id)
        app = self._apps.known(row.app_id)
        options = api_pb2.FunctionOptions.FromString(row.options)
        pool = pool_settings.pool_settings(
            version.function,
            function_id=function_id,
            definition_id=version.definition_id,
            revision=version.revision,
            app_id=row.app_id,
            environment_name=app.environment_name if app else "",
            sdk_version=version.sdk_version,
            base_function_id=row.base_function_id,
            serialized_params=row.serialized_params,
            own_min_containers=options.HasField("warm_pool_size"),
        )
        self._pools[function_id] = pool
        return pool

    def autoscaler_settings(self, function_id: str) -> AutoscalerSettings:
        """How many containers there may be: as defined, with what was overridden since the last deployment."""
        override = api_pb2.AutoscalerSettings.FromString(self.row(function_id).autoscaler_override)
        return pool_settings.overridden(self._defined_autoscaler(function_id), override)

    def container_arguments(self, function_id: str, task_id: str) -> bytes:
        """The serialized ContainerArguments of a container started now."""
        row, version = self.row(function_id), self.current(function_id)
        app = self._apps.known(row.app_id)
        layout = self._layout_message(self._layout_of(row))
        listed = {item.object_id for item in layout.objects}
        base_id = row.base_function_id or function_id
        if base_id not in listed:  # not published: a function that builds an image
            layout.function_ids[row.name] = base_id
            layout.objects.add(object_id=base_id, function_handle_metadata=self.handle(base_id))
        definition, _ = self._definition(row)
        layout.objects.extend(item for item in definition.dependencies if item.object_id not in listed)
        return api_pb2.ContainerArguments(
            task_id=task_id,
            function_id=function_id,
            app_id=row.app_id,
            function_def=version.function,
            serialized_params=row.serialized_params,
            environment_name=app.environment_name if app else "",
            app_layout=layout,
        ).SerializeToString()

    def handle(self, function_id: str) -> api_pb2.FunctionHandleMetadata:
        """What clients must know to call it."""
        row = self.row(function_id)
        try:
            definition, _ = self._definition(row)
        except FailedPrecondition:
            return api_pb2.FunctionHandleMetadata.FromString(row.handle)
        return self._handle(row, definition)

    def function_data(self, function_id: str) -> api_pb2.FunctionData:
        """The definition as clients see it, without the code."""
        row = self.row(function_id)
        definition, _ = self._definition(row)
        functions = definition.functions
        if row.options:
            options = api_pb2.FunctionOptions.FromString(row.options)
            functions = [variants.with_options(function, options) for function in functions]
        return definitions.function_data(functions, self._handle(row, definition))

    def layout(self, app_id: str) -> Layout:
        """The live layout of an app; empty before the first publication."""
        return self._layouts.get(app_id, Layout())

    def layout_message(self, app_id: str) -> api_pb2.AppLayout:
        return self._layout_message(self.layout(app_id))

    def base_function_id(self, function_id: str) -> str:
        """The Function that this one is a variant of, or its own id."""
        row = self._rows.get(function_id)
        return row.base_function_id or function_id if row else function_id

    def with_variants(self, function_ids: Iterable[str]) -> set[str]:
        """These Functions and all variants of them."""
        ids = set(function_ids)
        return ids.union(*(self._variants.get(function_id, ()) for function_id in ids))

    def functions_of(self, app_id: str) -> set[str]:
        """All Functions and variants of a living app, drafts included."""
        return set(self._by_app.get(app_id, ()))

    async def named(self, app_name: str, tag: str, environment_name: str, version: int, caller: Caller) -> str:
        """The id of a deployed Function, or of its variant that is pinned to a version of the app."""
        app = self._apps.deployed(app_name, environment_name, caller)
        layout = self.layout(app.app_id)
        if version:
            layout = await self.layout_at(app.app_id, version)
        found = layout.functions.get(tag)
        if found is None:
            at = f" at version {version}" if version else ""
            if f"{tag}.*" in layout.functions:
                raise ClassNameUsed(f"'{tag}' is a class of App '{app_name}'{at}: look it up with modal.Cls.from_name")
            names = ", ".join(sorted(layout.functions)[:10]) or "none"
            raise NotFound(f"App '{app_name}' has no Function '{tag}'{at} (it has: {names})")
        if not version:
            return found.function_id
        return await self.bind(found.function_id, b"", api_pb2.FunctionOptions(), caller, pinned_version=version)

    # ---- creating ---------------------------------------------------------------------------------------

    async def precreate(
        self, request: api_pb2.FunctionPrecreateRequest, caller: Caller
    ) -> tuple[str, api_pb2.FunctionHandleMetadata]:
        """Give a Function its id before its code is known; nothing changes for one that is there."""
        await self._apps.find_living(request.app_id, caller)
        if not request.function_name:
            raise InvalidArgument("a Function needs a name")
        function_id, definition_id = request.existing_function_id, ""
        if function_id:
            row = self._existing(function_id, request.app_id, caller)
            definition_id = row.draft_definition_id
        else:
            function_id = new_id("function")
        handle = definitions.handle_of(
            request,
            function_id=function_id,
            app_id=request.app_id,
            definition_id=definition_id,
            web_url_of=self._web_url_of,
        )
        if not request.existing_function_id:
            row = FunctionRow(
                function_id=function_id,
                app_id=request.app_id,
                name=request.function_name,
                handle=handle.SerializeToString(),
                created_at=self._clock.now(),
            )
            await self._database.write(lambda c: storage.insert_function(c, row))
            self._keep(row)
        return function_id, handle

    async def create(self, request: api_pb2.FunctionCreateRequest, caller: Caller) -> tuple[str, Definition]:
        """Store a definition, as a draft until it is published. Returns the Function's id and the definition."""
        await self._apps.find_living(request.app_id, caller)
        ranked = definitions.ranked_functions(request)
        for function in ranked:
            definitions.check(function)
        dependencies = await self._described(ranked[0], caller)
        content = definitions.canonical(ranked)
        existing, now = request.existing_function_id, self._clock.now()
        row = self._existing(existing, request.app_id, caller) if existing else None
        function_id = existing or new_id("function")
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
            row = msgspec.structs.replace(self._rows[function_id], draft_definition_id=definition_id)
        self._keep(row)
        self._forget_pools(row.app_id)
        return function_id, self._definitions.take(definition)

    def created(
        self, function_id: str, definition: Definition
    ) -> tuple[api_pb2.FunctionHandleMetadata, api_pb2.FunctionData]:
        """What FunctionCreate answers: of the definition just made, live or not."""
        handle = self._handle(self.row(function_id), definition)
        return handle, definitions.function_data(definition.functions, handle)

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
        row = self.check_callable(function_id, caller)
        kept = variants.canonical_options(options)
        if row.base_function_id:  # a variant of a variant is a variant of the base
            kept = variants.stacked(row.options, kept)
            serialized_params = serialized_params or row.serialized_params
            pinned_version = pinned_version or row.pinned_version
            row = self.row(row.base_function_id)
        variant_id = variants.variant_id(row.function_id, serialized_params, kept, pinned_version)
        if variant_id in self._rows:
            return variant_id
        definition, _ = self._definition(row)
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
        if variant_id not in self._rows:
            self._keep(variant)
        return variant_id

    async def list_variants(
        self, function_id: str, before: tuple[float, str] | None, limit: int, caller: Caller
    ) -> list[FunctionRow]:
        """Variants of a Function, the newest first."""
        base_id = self.base_function_id(self.row(function_id, caller).function_id)
        return await self._database.read(lambda c: storage.list_variants(c, base_id, before, limit))

    async def override_autoscaler(
        self, function_id: str, override: api_pb2.AutoscalerSettings, caller: Caller
    ) -> AutoscalerSettings:
        """Override the fields that are set, until the next deployment. Returns the settings that hold now."""
        row = self.check_callable(function_id, caller)
        merged = api_pb2.AutoscalerSettings.FromString(row.autoscaler_override)
        merged.MergeFrom(override)
        settings = pool_settings.overridden(self._defined_autoscaler(function_id), merged)
        if settings.max_containers and settings.min_containers > settings.max_containers:
            raise InvalidArgument(
                f"min_containers ({settings.min_containers}) cannot be above max_containers ({settings.max_containers})"
            )
        stored = merged.SerializeToString()
        await self._database.write(lambda c: storage.set_autoscaler_override(c, [function_id], stored))
        self._keep(msgspec.structs.replace(self.row(function_id), autoscaler_override=stored))
        for callback in self.when_rescaled:
            callback(function_id)
        return settings

    # ---- for deployments --------------------------------------------------------------------------------

    async def layout_for(
        self, app_id: str, function_ids: dict[str, str], class_ids: dict[str, str], definition_ids: dict[str, str]
    ) -> Layout:
        """The layout that a publication asks for. Raises InvalidArgument when it names what is not the app's."""
        for tag, function_id in function_ids.items():
            row = self._rows.get(function_id)
            if row is None or row.app_id != app_id or row.base_function_id:
                raise InvalidArgument(f"'{tag}' cannot be {function_id!r}: App {app_id} has no such Function")
        named = {id for function_id, id in definition_ids.items() if id and function_id in self._rows}
        owners = await self._database.read(lambda c: storage.owners_of_definitions(c, named))
        functions = {}
        for tag, function_id in function_ids.items():
            definition_id = definition_ids.get(function_id, "")
            if owners.get(definition_id) != function_id:
                definition_id = self._rows[function_id].draft_definition_id
            if not definition_id:
                raise FailedPrecondition(f"Function '{tag}' ({function_id}) was announced but never created")
            functions[tag] = LayoutFunction(function_id, definition_id)
        for tag, class_id in class_ids.items():
            owner = await self._database.read(lambda c, class_id=class_id: storage.app_of_class(c, class_id))
            if owner != app_id:
                raise InvalidArgument(f"'{tag}' cannot be {class_id!r}: App {app_id} has no such class")
        return Layout(functions=functions, classes=dict(class_ids), generation=self.layout(app_id).generation)

    def overridden_in(self, app_id: str) -> list[str]:
        """Functions of the app whose autoscaler settings are overridden."""
        return [id for id in self._by_app.get(app_id, ()) if self._rows[id].autoscaler_override]

    def published(self, app_id: str, layout: Layout) -> set[str]:
        """A new layout is live. Returns the Functions (with their variants) that it has no more."""
        removed = self.layout(app_id).function_ids - layout.function_ids
        for function_id in self.overridden_in(app_id):
            self._keep(msgspec.structs.replace(self._rows[function_id], autoscaler_override=b""))
        self._set_layout(app_id, layout)
        self._retired |= removed
        self._retired -= layout.function_ids
        return self.with_variants(removed)

    # ---- inside -----------------------------------------------------------------------------------------

    def _definition(self, row: FunctionRow) -> tuple[Definition, str]:
        """The current definition and its revision."""
        base = self.row(row.base_function_id) if row.base_function_id else row
        layout = self._layout_of(row)
        place = (
            self._places.get(row.app_id, {}).get(base.function_id)
            if not row.pinned_version
            else next((item for item in layout.functions.values() if item.function_id == base.function_id), None)
        )
        definition_id = place.definition_id if place else base.draft_definition_id
        if not definition_id:
            raise FailedPrecondition(f"Function '{row.name}' ({row.function_id}) was announced but never created")
        return self._definitions.get(definition_id), f"{definition_id}.{layout.generation}"

    def _handle(self, row: FunctionRow, definition: Definition) -> api_pb2.FunctionHandleMetadata:
        handle = definitions.handle_of(
            definition.functions[0],
            function_id=row.function_id,
            app_id=row.app_id,
            definition_id=definition.definition_id,
            web_url_of=self._web_url_of,
        )
        handle.base_function_id = row.base_function_id
        return handle

    def _layout_of(self, row: FunctionRow) -> Layout:
        if not row.pinned_version:
            return self.layout(row.app_id)
        key = (row.app_id, row.pinned_version)
        if key not in self._pinned:
            version = self._database.read_now(lambda c: apps_storage.get_version(c, *key))
            assert version is not None, f"{row.function_id} is pinned to a version that is gone"
            self._pinned[key] = version.layout
        return self._pinned[key]

    async def layout_at(self, app_id: str, version: int) -> Layout:
        found = await self._database.read(lambda c: apps_storage.get_version(c, app_id, version))
        if found is None:
            raise NotFound(f"App {app_id} has no version {version}: `modal app history {app_id}` lists them")
        self._pinned[app_id, version] = found.layout
        return found.layout

    def _layout_message(self, layout: Layout) -> api_pb2.AppLayout:
        message = api_pb2.AppLayout(
            function_ids={tag: function.function_id for tag, function in layout.functions.items()},
            class_ids=layout.classes,
        )
        for function in layout.functions.values():
            message.objects.add(
                object_id=function.function_id, function_handle_metadata=self.handle(function.function_id)
            )
        for class_id in layout.classes.values():
            message.objects.add(object_id=class_id, class_handle_metadata=api_pb2.ClassHandleMetadata())
        return message

    def _defined_autoscaler(self, function_id: str) -> AutoscalerSettings:
        pool, function = self.pool_settings(function_id), self.current(function_id).function
        defined = pool_settings.defined_autoscaler(function)
        return msgspec.structs.replace(defined, min_containers=pool.min_containers)

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
        row = self.row(function_id, caller)
        if row.app_id != app_id or row.base_function_id:
            raise InvalidArgument(f"{function_id} is not a Function of App {app_id}: it cannot be redefined there")
        return row

    def _workspace(self, row: FunctionRow) -> str:
        app = self._apps.known(row.app_id)
        return app.workspace if app else ""

    def _keep(self, row: FunctionRow) -> None:
        self._rows[row.function_id] = row
        self._by_app.setdefault(row.app_id, set()).add(row.function_id)
        if row.base_function_id:
            self._variants.setdefault(row.base_function_id, set()).add(row.function_id)
        self._pools.pop(row.function_id, None)

    def _set_layout(self, app_id: str, layout: Layout) -> None:
        self._layouts[app_id] = layout
        self._places[app_id] = {function.function_id: function for function in layout.functions.values()}
        self._forget_pools(app_id)

    def _forget_pools(self, app_id: str) -> None:
        for function_id in self._by_app.get(app_id, ()):
            self._pools.pop(function_id, None)

    def _forget_app(self, app_id: str) -> None:
        for function_id in self._by_app.pop(app_id, set()):
            self._rows.pop(function_id, None)
            self._variants.pop(function_id, None)
            self._pools.pop(function_id, None)
            self._retired.discard(function_id)
        self._layouts.pop(app_id, None)
        self._places.pop(app_id, None)
        for key in [key for key in self._pinned if key[0] == app_id]:
            del self._pinned[key]
