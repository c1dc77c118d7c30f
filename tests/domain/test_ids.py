import re

from aeolian.domain.ids import PREFIXES, content_id, new_id


def test_ids_have_the_shape_that_clients_check():
    for noun in PREFIXES.keys() - {"container"}:
        assert re.fullmatch(PREFIXES[noun] + "-[0-9A-Za-z]{22}", new_id(noun))
    assert content_id("image", b"x") == content_id("image", b"x") != content_id("image", b"y")


def test_the_sdk_sees_by_a_container_id_that_a_frame_was_remote():
    for _ in range(50):
        assert re.fullmatch("ta-[0-9A-Z]{26}", task_id := new_id("container"))
        assert not task_id.endswith("V")
