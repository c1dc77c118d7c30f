import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "code_search.py"
SOURCE = b'''
"""A module."""

def copy_tree(source, target):
    """Copy a whole directory tree.

    Symbolic links stay links.
    """

def _hidden():
    """Copy."""

def undocumented(): ...

class HTTPServer:
    """Serves files."""

    def copy(self):
        """Copy one file."""
'''


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("code_search", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text", ["HTTPServer", "http_server", "the http servers", "httpServer"])
def test_the_spellings_of_a_name_have_the_same_words(example, text):
    assert example.words(text) == example.words("http server")


def test_documented_public_definitions_are_found_with_their_place(example):
    found = list(example.definitions("pkg/mod.py", SOURCE))
    assert [(item.name, item.place) for item in found] == [
        ("pkg.mod.copy_tree", "pkg/mod.py:4"),
        ("pkg.mod.HTTPServer", "pkg/mod.py:15"),
        ("pkg.mod.HTTPServer.copy", "pkg/mod.py:18"),
    ]
    assert found[0].summary == "Copy a whole directory tree."


def test_private_modules_and_broken_sources_hold_nothing(example):
    assert list(example.definitions("pkg/_mod.py", SOURCE)) == []
    assert list(example.definitions("pkg/mod.py", b"def (")) == []


def test_what_has_more_and_rarer_words_of_a_query_ranks_higher(example):
    found = list(example.definitions("pkg/mod.py", SOURCE))
    scores = example.score(example.words("copy directory trees"), example.weigh(found), len(found))
    assert max(scores, key=scores.get) == 0
    assert 0 < scores[2] < scores[0] <= 1
    assert 1 not in scores
