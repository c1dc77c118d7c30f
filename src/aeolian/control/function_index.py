"""Functions in memory: rows, variants, live and pinned layouts. Which definition a Function has is decided here."""

from collections.abc import Iterable, Set

import msgspec

from aeolian.domain.apps import App, Layout, LayoutFunction
from aeolian.domain.errors import NotFound
from aeolian.storage import apps as apps_storage
from aeolian.storage import functions as storage
from aeolian.storage.database import Database
from aeolian.storage.functions import FunctionRow


class FunctionIndex:
    """All Functions of living apps. Changes are stored by others, then told to it."""

    def __init__(self, database: Database):
        self._database = database
        self._rows: dict[str, FunctionRow] = {}
        self._by_app: dict[str, set[str]] = {}
        self._variants: dict[str, set[str]] = {}
        self._layouts: dict[str, Layout] = {}
        self._places: dict[str, dict[str, LayoutFunction]] = {}
        self._retired: set[str] = set()
        self._pinned: dict[tuple[str, int], Layout] = {}

    async def load(self, apps: list[App]) -> None:
        living = {app.app_id: app for app in apps}
        for row in await self._database.read(storage.list_living_functions):
            self.keep(row)
        for app_id, layout in (await self._database.read(lambda c: apps_storage.live_layouts(c, living))).items():
            self._set_layout(app_id, layout)
            for function_id in self._by_app.get(app_id, ()):
                row = self._rows[function_id]
                if function_id not in self._places[app_id] and row.created_at < living[app_id].deployed_at:
                    self._retired.add(function_id)

    # ---- asking -----------------------------------------------------------------------------------------

    def get(self, function_id: str) -> FunctionRow | None:
        return self._rows.get(function_id)

    def row(self, function_id: str) -> FunctionRow:
        """Raises NotFound, also for Functions of ended apps."""
        row = self._rows.get(function_id)
        if row is None:
            raise NotFound(f"there is no Function {function_id!r}, or its App has been stopped")
        return row

    def in_app(self, app_id: str) -> Set[str]:
        """Functions and variants of an app, drafts included."""
        return self._by_app.get(app_id, set())

    def variants_of(self, function_id: str) -> Set[str]:
        return self._variants.get(function_id, set())

    def is_retired(self, function_id: str) -> bool:
        """Whether the Function (or the base of the variant) was in a published layout and is no more."""
        row = self.row(function_id)
        return (row.base_function_id or function_id) in self._retired

    def layout(self, app_id: str) -> Layout:
        """The live layout of an app; empty before the first publication."""
        return self._layouts.get(app_id, Layout())

    def layout_of(self, row: FunctionRow) -> Layout:
        """The layout that the Function runs in: the live one, or the one that it is pinned to."""
        if not row.pinned_version:
            return self.layout(row.app_id)
        key = (row.app_id, row.pinned_version)
        if key not in self._pinned:
            version = self._database.read_now(lambda c: apps_storage.get_version(c, *key))
            assert version is not None, f"{row.function_id} is pinned to a version that is gone"
            self._pinned[key] = version.layout
        return self._pinned[key]

    async def layout_at(self, app_id: str, version: int) -> Layout:
        """The layout of one version. Raises NotFound."""
        found = await self._database.read(lambda c: apps_storage.get_version(c, app_id, version))
        if found is None:
            raise NotFound(f"App {app_id} has no version {version}: `modal app history {app_id}` lists them")
        self._pinned[app_id, version] = found.layout
        return found.layout

    def definition_id(self, row: FunctionRow) -> str:
        """The current definition: the published one, else the draft; "" before FunctionCreate."""
        base = self.row(row.base_function_id) if row.base_function_id else row
        if row.pinned_version:
            places = {function.function_id: function for function in self.layout_of(row).functions.values()}
        else:
            places = self._places.get(row.app_id, {})
        place = places.get(base.function_id)
        return place.definition_id if place else base.draft_definition_id

    def overridden_in(self, app_id: str) -> list[str]:
        """Functions of the app whose autoscaler settings are overridden."""
        return [function_id for function_id in self.in_app(app_id) if self._rows[function_id].autoscaler_override]

    # ---- changing ---------------------------------------------------------------------------------------

    def keep(self, row: FunctionRow) -> None:
        self._rows[row.function_id] = row
        self._by_app.setdefault(row.app_id, set()).add(row.function_id)
        if row.base_function_id:
            self._variants.setdefault(row.base_function_id, set()).add(row.function_id)

    def publish(self, app_id: str, layout: Layout) -> set[str]:
        """This layout is live; overrides end. Returns the Functions (with their variants) that it has no more."""
        removed = self.layout(app_id).function_ids - layout.function_ids
        for function_id in self.overridden_in(app_id):
            self.keep(msgspec.structs.replace(self._rows[function_id], autoscaler_override=b"", autoscaler_events=None))
        self._set_layout(app_id, layout)
        self._retired |= removed
        self._retired -= layout.function_ids
        return self._with_variants(removed)

    def forget_app(self, app_id: str) -> Set[str]:
        """The app has ended. Returns what was in it."""
        function_ids = self._by_app.pop(app_id, set())
        for function_id in function_ids:
            self._rows.pop(function_id, None)
            self._variants.pop(function_id, None)
            self._retired.discard(function_id)
        self._layouts.pop(app_id, None)
        self._places.pop(app_id, None)
        for key in [key for key in self._pinned if key[0] == app_id]:
            del self._pinned[key]
        return function_ids

    def _set_layout(self, app_id: str, layout: Layout) -> None:
        self._layouts[app_id] = layout
        self._places[app_id] = {function.function_id: function for function in layout.functions.values()}

    def _with_variants(self, function_ids: Iterable[str]) -> set[str]:
        ids = set(function_ids)
        return ids.union(*(self.variants_of(function_id) for function_id in ids))
