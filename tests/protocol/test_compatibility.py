from pathlib import Path

import pytest

from aeolian.protocol import compatibility
from aeolian.protocol.compatibility import OUT_OF_SCOPE, SERVICES, built_rpcs, entries, page

DOCS = Path(__file__).parents[2] / "docs"


def test_every_rpc_is_listed_once_with_a_status():
    built = built_rpcs()
    assert [len(entries(service, built)) for service in SERVICES] == [285, 23]
    assert "FunctionCreate" in built


def test_what_a_worker_answers_for_its_containers_is_built():
    assert {"FunctionGetInputs", "FunctionPutOutputs", "ContainerHello", "TaskResult", "VolumeCommit"} <= built_rpcs()


def test_what_is_out_of_scope_exists_has_one_reason_and_is_not_built_after_all():
    names = [name for group in OUT_OF_SCOPE.values() for name in group]
    assert len(names) == len(set(names))
    assert set(names) <= {method.name for method in SERVICES[0].methods}
    assert not set(names) & built_rpcs(), "built after all: take it off OUT_OF_SCOPE"


def test_the_page_is_current():
    if (DOCS / "compatibility.md").read_text() != page():
        pytest.fail("docs/compatibility.md is not what the code says: run `make docs` and commit it")


def test_an_rpc_that_nobody_defines_is_not_called_built(monkeypatch):
    monkeypatch.setattr(compatibility, "built_rpcs", set)
    assert "| built |" not in compatibility.page()
