import pytest

from aeolian.worker.images.apt_sources import configured_uris, find_archive, sources_list

DEBIAN_SOURCES = """\
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://other.example/debian
Suites: bookworm
Enabled: no
"""
ONE_LINES = """\
# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://list.example/debian bookworm main contrib
deb-src http://source.example/debian bookworm main
deb http://list.example/debian-security/ bookworm-security main
"""
FOREIGN = """\
Types: deb
URIs: https://deb.nodesource.example/node_20.x
Suites: nodistro
Components: main
"""
UBUNTU = """\
Types: deb
URIs: http://ubuntu.example/ubuntu/
Suites: noble noble-updates
Components: main universe

Types: deb
URIs: http://security.example/ubuntu/
Suites: noble-security
Components: main universe
"""


@pytest.fixture
def apt(tmp_path):
    (tmp_path / "sources.list.d").mkdir()

    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path

    return write


def test_the_mirrors_of_this_host_are_taken(apt):
    folder = apt("sources.list.d/debian.sources", DEBIAN_SOURCES)
    archive = find_archive("debian", folder)
    assert (archive.main, archive.security) == ("http://mirror.example/debian", "http://mirror.example/debian-security")


def test_one_line_sources_are_read_too(apt):
    archive = find_archive("debian", apt("sources.list", ONE_LINES))
    assert (archive.main, archive.security) == ("http://list.example/debian", "http://list.example/debian-security/")


def test_other_peoples_archives_are_no_mirrors(apt):
    folder = apt("sources.list.d/node.sources", FOREIGN)
    assert find_archive("debian", folder).main == "http://deb.debian.org/debian"
    assert [uri for uri, _ in configured_uris(folder)] == ["https://deb.nodesource.example/node_20.x"]


def test_ubuntus_security_archive_is_told_by_its_suite(apt):
    archive = find_archive("ubuntu", apt("sources.list.d/ubuntu.sources", UBUNTU))
    assert (archive.main, archive.security) == ("http://ubuntu.example/ubuntu/", "http://security.example/ubuntu/")


def test_disabled_and_commented_sources_do_not_count(apt):
    apt("sources.list", ONE_LINES)
    folder = apt("sources.list.d/debian.sources", DEBIAN_SOURCES)
    uris = {uri for uri, _ in configured_uris(folder)}
    assert "http://other.example/debian" not in uris
    assert "http://commented.example/debian" not in uris
    assert "http://source.example/debian" not in uris


def test_a_host_without_apt_uses_the_distributions_own_archive(tmp_path):
    archive = find_archive("debian", tmp_path / "none")
    assert sources_list(archive, "trixie") == [
        "deb http://deb.debian.org/debian trixie main",
        "deb http://deb.debian.org/debian trixie-updates main",
        "deb http://deb.debian.org/debian-security trixie-security main",
    ]
