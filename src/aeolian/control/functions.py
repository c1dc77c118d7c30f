"""Functions: what they are, at which definition, in which variants, and what their containers are told.

A Function has a stable id and, over time, several definitions. Which one is current follows from the live
layout of its app, set by `deployments`; a definition that was created but not published (a draft) changes
nothing for those who call the Function, but is what runs while the Function is in no layout yet.

    Function fu-1 --layout v1--> definition de-a          containers started then keep de-a
                  --layout v2--> definition de-b          new inputs, new containers
    variant fu-2 of fu-1 (parameters, options): the definition of fu-1 with the options on top
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from modal_proto import api_pb2

from aeolian.control import definitions, pool_settings, variants
from aeolian.control.apps import Apps
from aeolian.control.definition_store import Definition, DefinitionStore
from aeolian.control.definitions import AddressOf
from aeolian.control.function_index import FunctionIndex
from aeolian.control.unbuilt import unbuilt
from aeolian.domain.apps import Layout, LayoutFunction
from aeolian.domain.caller import Caller
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound
from aeolian.domain.functions import AutoscalerSettings, PoolSettings
from aeolian.storage import functions as storage
from aeolian.storage.database import Database
from aeolian.storage.functions import DefinitionRow, FunctionRow


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
    def __init__(self, database: Database, apps: Apps, address_of: AddressOf):
        self._database = database
        self._apps = apps
        self._address_of = address_of
        self._definitions = DefinitionStore(database)
        self._index = FunctionIndex(database)
        self._pools: dict[str, PoolSettings] = {}
        apps.when_stopped.append(self._forget_app)

    async def load(self) -> None:
        """Read the Functions of living apps and what is live of them. Needs loaded `apps`."""
        await self._index.load(self._apps.living_apps())

    # ---- asking -----------------------------------------------------------------------------------------

    def row(self, function_id: str, caller: Caller | None = None) -> FunctionRow:
        """Raises NotFound for unknown ids, for Functions of ended apps, and for those of another workspace."""
        row = self._index.row(function_id)
        if caller is not None and not self._is_seen(row, caller):
            raise NotFound(f"there is no Function {function_id!r}, or its App has been stopped")
        return row

    def has(self, function_id: str) -> bool:
        return self._index.get(function_id) is not None

    def check_callable(self, function_id: str, caller: Caller) -> FunctionRow:
        """The Function, if it takes new calls. Raises NotFound or FailedPrecondition."""
        row = self.row(function_id, caller)
        self._apps.living(row.app_id)
        if self._index.is_retired(function_id):
            raise NotFound(f"Function '{row.name}' ({function_id}) is not part of its App any more")
        return row

    def current(self, function_id: str) -> FunctionVersion:
        """What a container started now runs. Raises NotFound, or FailedPrecondition before FunctionCreate."""
        row = self.row(function_id)
        definition, revision = self.definition(row)
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
        return pool_settings.overridden(self.defined_autoscaler(function_id), override)

    def container_arguments(self, function_id: str, task_id: str) -> bytes:
        """The serialized ContainerArguments of a container started now."""
        row, version = self.row(function_id), self.current(function_id)
        app = self._apps.known(row.app_id)
        layout = self._layout_message(self._index.layout_of(row))
        listed = {item.object_id for item in layout.objects}
        base_id = row.base_function_id or function_id
        if base_id not in listed:  # not published: a function that builds an image
            layout.function_ids[row.name] = base_id
            layout.objects.add(object_id=base_id, function_handle_metadata=self.handle(base_id))
        definition, _ = self.definition(row)
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
            definition, _ = self.definition(row)
        except FailedPrecondition:
            return api_pb2.FunctionHandleMetadata.FromString(row.handle)
        return self.handle_at(row, definition)

    def function_data(self, function_id: str) -> api_pb2.FunctionData:
        """The definition as clients see it, without the code."""
        row = self.row(function_id)
        definition, _ = self.definition(row)
        return self.data_at(row, definition)

    def unbuilt(self, function_id: str) -> list[str]:
        """What it asks for in vain, as sentences for its user."""
        definition, _ = self.definition(self.row(function_id))
        return unbuilt(definition.functions[0])

    async def look_back(
        self, function_id: str, caller: Caller
    ) -> tuple[api_pb2.FunctionHandleMetadata, api_pb2.FunctionData]:
        """`handle` and `function_data`, also of a Function whose app has ended. Raises NotFound."""
        if self.has(function_id):
            self.row(function_id, caller)
            return self.handle(function_id), self.function_data(function_id)
        stored = await self._database.read(lambda c: storage.get_function(c, function_id))
        if stored is None:
            raise NotFound(f"there is no Function {function_id!r}")
        row = stored
        await self._apps.find(row.app_id, caller)  # of this workspace?
        base = row
        if row.base_function_id:
            found = await self._database.read(lambda c: storage.get_function(c, row.base_function_id))
            base = found or row
        if not base.draft_definition_id:
            raise FailedPrecondition(f"Function '{row.name}' ({function_id}) was announced but never created")
        definition = self._definitions.get(base.draft_definition_id)
        return self.handle_at(row, definition), self.data_at(row, definition)

    async def describe(self, function_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        """Those of these ids that the caller may call (see `dependencies`)."""
        return {
            function_id: api_pb2.Object(object_id=function_id, function_handle_metadata=self.handle(function_id))
            for function_id in function_ids
            if self.has(function_id) and self._is_seen(self.row(function_id), caller)
        }

    def layout(self, app_id: str) -> Layout:
        """The live layout of an app; empty before the first publication."""
        return self._index.layout(app_id)

    async def layout_at(self, app_id: str, version: int) -> Layout:
        """The layout of one version of an app. Raises NotFound."""
        return await self._index.layout_at(app_id, version)

    def layout_message(self, app_id: str) -> api_pb2.AppLayout:
        return self._layout_message(self.layout(app_id))

    def base_function_id(self, function_id: str) -> str:
        """The Function that this one is a variant of, or its own id."""
        row = self._index.get(function_id)
        return row.base_function_id or function_id if row else function_id

    def with_variants(self, function_id: str) -> list[str]:
        """The Function (of a variant: its base) and its variants, but for those of one version of the App."""
        base_id = self.base_function_id(function_id)
        variants_of_it = (self.row(variant_id) for variant_id in self._index.variants_of(base_id))
        return [base_id, *sorted(row.function_id for row in variants_of_it if not row.pinned_version)]

    def functions_of(self, app_id: str) -> set[str]:
        """All Functions and variants of a living app, drafts included."""
        return set(self._index.in_app(app_id))

    # ---- for deployments --------------------------------------------------------------------------------

    async def layout_for(
        self, app_id: str, function_ids: dict[str, str], class_ids: dict[str, str], definition_ids: dict[str, str]
    ) -> Layout:
        """The layout that a publication asks for. Raises InvalidArgument when it names what is not the app's."""
        for tag, function_id in function_ids.items():
            row = self._index.get(function_id)
            if row is None or row.app_id != app_id or row.base_function_id:
                raise InvalidArgument(f"'{tag}' cannot be {function_id!r}: App {app_id} has no such Function")
        named = {id for function_id, id in definition_ids.items() if id and self._index.get(function_id)}
        owners = await self._database.read(lambda c: storage.owners_of_definitions(c, named))
        functions = {}
        for tag, function_id in function_ids.items():
            definition_id = definition_ids.get(function_id, "")
            if owners.get(definition_id) != function_id:
                definition_id = self._index.row(function_id).draft_definition_id
            if not definition_id:
                raise FailedPrecondition(f"Function '{tag}' ({function_id}) was announced but never created")
            functions[tag] = LayoutFunction(function_id, definition_id)
        owners_of_classes = await self._database.read(lambda c: storage.apps_of_classes(c, class_ids.values()))
        for tag, class_id in class_ids.items():
            if owners_of_classes.get(class_id) != app_id:
                raise InvalidArgument(f"'{tag}' cannot be {class_id!r}: App {app_id} has no such class")
        return Layout(functions=functions, classes=dict(class_ids), generation=self.layout(app_id).generation)

    def overridden_in(self, app_id: str) -> list[str]:
        """Functions of the app whose autoscaler settings are overridden."""
        return self._index.overridden_in(app_id)

    def published(self, app_id: str, layout: Layout) -> set[str]:
        """A new layout is live. Returns the Functions (with their variants) that it has no more."""
        self._forget_pools(self._index.in_app(app_id))
        return self._index.publish(app_id, layout)

    async def environment_renamed(self, environment_id: str, name: str) -> None:
        """Containers started from now on see the new name."""
        for app in self._apps.living_apps():
            if app.environment_id == environment_id:
                self._forget_pools(self._index.in_app(app.app_id))

    # ---- inside -----------------------------------------------------------------------------------------

    def definition(self, row: FunctionRow) -> tuple[Definition, str]:
        """The current definition and its revision."""
        definition_id = self._index.definition_id(row)
        if not definition_id:
            raise FailedPrecondition(f"Function '{row.name}' ({row.function_id}) was announced but never created")
        return self._definitions.get(definition_id), f"{definition_id}.{self._index.layout_of(row).generation}"

    def handle_at(self, row: FunctionRow, definition: Definition) -> api_pb2.FunctionHandleMetadata:
        """As `handle`, at a definition that need not be current."""
        handle = definitions.handle_of(
            definition.functions[0],
            function_id=row.function_id,
            app_id=row.app_id,
            definition_id=definition.definition_id,
            address_of=self._address_of,
        )
        handle.base_function_id = row.base_function_id
        return handle

    def definition_at(self, definition_id: str) -> Definition:
        """A definition by its id. Raises NotFound."""
        return self._definitions.get(definition_id)

    def data_at(self, row: FunctionRow, definition: Definition) -> api_pb2.FunctionData:
        """As `function_data`, at a definition that need not be current."""
        functions = definition.functions
        if row.options:
            options = api_pb2.FunctionOptions.FromString(row.options)
            functions = [variants.with_options(function, options) for function in functions]
        handle = self.handle_at(row, definition)
        base_id = row.base_function_id or row.function_id
        return definitions.function_data(functions, handle, function_id=base_id, address_of=self._address_of)

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

    def defined_autoscaler(self, function_id: str) -> AutoscalerSettings:
        """As `autoscaler_settings`, without what was overridden."""
        pool, function = self.pool_settings(function_id), self.current(function_id).function
        defined = pool_settings.defined_autoscaler(function)
        return msgspec.structs.replace(defined, min_containers=pool.min_containers)

    def needs_parameters(self, function_id: str) -> bool:
        """Whether this is a class with parameters: only its variants, which have them bound, are ever called."""
        row = self.row(function_id)
        definition, _ = self.definition(row)
        return not row.base_function_id and bool(definition.functions[0].class_parameter_info.schema)

    def _is_seen(self, row: FunctionRow, caller: Caller) -> bool:
        app = self._apps.known(row.app_id)
        return app is not None and app.workspace == caller.workspace and caller.sees(app.environment_id)

    def keep(self, row: FunctionRow) -> None:
        """Take over a row that `function_changes` has stored."""
        self._index.keep(row)
        self._forget_pools([row.function_id, *self._index.variants_of(row.function_id)])

    def take_definition(self, row: DefinitionRow) -> Definition:
        """Keep a definition that was just stored at hand."""
        return self._definitions.take(row)

    def _forget_pools(self, function_ids: Iterable[str]) -> None:
        for function_id in function_ids:
            self._pools.pop(function_id, None)

    def _forget_app(self, app_id: str) -> None:
        self._forget_pools(self._index.forget_app(app_id))
