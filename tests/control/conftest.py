import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aeolian.storage import migrate
from aeolian.storage.database import Database
from aeolian.storage.tables import metadata

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An open database with all tables, of each kind that Aeolian can use."""
    database = Database(migrate.normalized(database_url))
    metadata.create_all(database.engine)
    database.open()
    yield database
    await database.close()
