"""Every table of the database: importing this module fills `metadata`."""

import importlib
import pkgutil

import aeolian.storage
from aeolian.storage.database import metadata

__all__ = ["metadata"]

# Each noun keeps its tables beside its queries, so all modules of the room are imported.
for _module in pkgutil.iter_modules(aeolian.storage.__path__):
    if not _module.ispkg and _module.name not in ("tables", "migrate"):
        importlib.import_module(f"aeolian.storage.{_module.name}")
