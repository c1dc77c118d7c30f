import pytest

from aeolian.domain.errors import InvalidArgument
from aeolian.worker.images.references import StandIn, is_uv, parse_reference, stand_in_for


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python:3.12-slim", "docker.io/library/python:3.12-slim"),
        ("debian", "docker.io/library/debian:latest"),
        ("mambaorg/micromamba:2", "docker.io/mambaorg/micromamba:2"),
        ("ghcr.io/astral-sh/uv:latest", "ghcr.io/astral-sh/uv:latest"),
        ("localhost:5000/team/app", "localhost:5000/team/app:latest"),
        ("127.0.0.1:5000/app:1", "127.0.0.1:5000/app:1"),
        ("nvcr.io/nvidia/pytorch:24.01-py3", "nvcr.io/nvidia/pytorch:24.01-py3"),
        (f"debian@sha256:{'a' * 64}", f"docker.io/library/debian@sha256:{'a' * 64}"),
    ],
)
def test_names_of_images_are_written_out(text, expected):
    assert str(parse_reference(text)) == expected


@pytest.mark.parametrize("text", ["", "UPPER", "a b", "a:b:c", "../x", "-", "a@sha256:1"])
def test_what_is_no_name_is_refused(text):
    with pytest.raises(InvalidArgument):
        parse_reference(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python:3.11.12-slim-bookworm", StandIn("debian", "bookworm", "3.11.12")),
        ("python:3.13-slim-trixie", StandIn("debian", "trixie", "3.13")),
        ("python:3.12", StandIn("debian", "trixie", "3.12")),
        ("python:3.14.0rc2-slim-bookworm", StandIn("debian", "bookworm", "3.14.0rc2")),
        ("python:slim", StandIn("debian", "trixie", "3")),
        ("python", StandIn("debian", "trixie", "3")),
        ("debian:bookworm-slim", StandIn("debian", "bookworm")),
        ("debian:12", StandIn("debian", "bookworm")),
        ("debian:12.5-slim", StandIn("debian", "bookworm")),
        ("debian:bookworm-20250520-slim", StandIn("debian", "bookworm")),
        ("ubuntu:22.04", StandIn("ubuntu", "jammy")),
        ("ubuntu:noble", StandIn("ubuntu", "noble")),
        ("python:3.12-alpine", None),
        ("python:2.7", None),
        ("debian:sarge", None),
        ("alpine:3.20", None),
        ("ghcr.io/library/python:3.12", None),
        (f"python:3.12@sha256:{'a' * 64}", None),
        ("nvidia/cuda:12.4.0-devel-ubuntu22.04", None),
    ],
)
def test_well_known_images_have_a_stand_in(text, expected):
    assert stand_in_for(parse_reference(text)) == expected


def test_the_image_of_uv_is_known():
    assert is_uv(parse_reference("ghcr.io/astral-sh/uv:0.5.1"))
    assert not is_uv(parse_reference("ghcr.io/astral-sh/ruff"))
