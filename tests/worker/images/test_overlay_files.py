import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from aeolian.worker.images.overlay_files import remove_tree

NOBODY = 65534


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """A folder of a user who is not root; the test acts as that user."""
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    if os.geteuid() != 0:
        yield folder
        return
    os.chown(folder, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        os.seteuid(0)
        remove_tree(folder)


def test_folders_that_their_owner_may_not_list_are_removed_with_what_they_hold(ordinary_user):
    tree = ordinary_user / "tree"
    inner = tree / "work" / "opt" / "work" / "incompat" / "volatile"
    inner.mkdir(parents=True)
    (inner / "dirty").touch()
    (tree / "read-only").mkdir(mode=0o700)
    (tree / "read-only" / "file").touch()
    (tree / "read-only").chmod(0o500)
    for folder in (inner, inner.parent, inner.parent.parent):
        folder.chmod(0)
    remove_tree(tree)
    assert not tree.exists()


def test_what_a_link_in_the_tree_names_is_left_as_it_is(ordinary_user):
    outside, tree = ordinary_user / "outside", ordinary_user / "tree"
    outside.mkdir(mode=0o500)
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    remove_tree(tree)
    assert not tree.exists()
    assert outside.stat().st_mode & 0o777 == 0o500
