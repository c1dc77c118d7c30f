"""Where Debian's (or Ubuntu's) packages come from on this host: its own apt's mirrors, keyrings and proxies."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

APT_FOLDER = Path("/etc/apt")
ONE_LINE = re.compile(r"deb\s+(?:\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+\S+")
NETWORK_OPTION = re.compile(
    r"Acquire::(?:https?|ftp)(?:::[^ :]+)*::(?:Proxy|Proxy-Auto-Detect|Verify-Peer|Verify-Host)"
)
CONFIG_TIMEOUT_S = 10


class Archive(NamedTuple):
    """One distribution's archive."""

    main: str
    security: str
    components: str
    keyring: Path


DEFAULTS = {
    "debian": Archive(
        "http://deb.debian.org/debian",
        "http://deb.debian.org/debian-security",
        "main",
        Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    ),
    "ubuntu": Archive(
        "http://archive.ubuntu.com/ubuntu",
        "http://archive.ubuntu.com/ubuntu",
        "main universe",
        Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
    ),
}


def find_archive(distribution: str, folder: Path = APT_FOLDER) -> Archive:
    """The mirrors that this host uses for that distribution, else the distribution's own."""
    archive = DEFAULTS[distribution]
    for uri, suite in configured_uris(folder):
        path = uri.rstrip("/").rpartition("/")[2]
        if distribution == "debian" and path == "debian-security":
            archive = archive._replace(security=uri)
        elif path == distribution:
            is_security = suite.endswith("-security")
            archive = archive._replace(security=uri) if is_security else archive._replace(main=uri)
    return archive


def configured_uris(folder: Path = APT_FOLDER) -> list[tuple[str, str]]:
    """(address, suite) of every source that apt has here; the first one of each suite's kind comes last."""
    found: list[tuple[str, str]] = []
    for path in _files(folder):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        found += _stanzas(text) if path.suffix == ".sources" else _lines(text)
    usable = [(uri, suite) for uri, suite in found if uri.startswith(("http://", "https://"))]
    return list(reversed(usable))


def sources_list(archive: Archive, suite: str) -> list[str]:
    """Lines for that suite and its updates."""
    return [
        f"deb {archive.main} {suite} {archive.components}",
        f"deb {archive.main} {suite}-updates {archive.components}",
        f"deb {archive.security} {suite}-security {archive.components}",
    ]


def network_options() -> list[str]:
    """How apt reaches the network here (proxies), as lines of its configuration."""
    try:
        dump = subprocess.run(
            ["apt-config", "dump"], capture_output=True, text=True, timeout=CONFIG_TIMEOUT_S, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in dump.splitlines() if NETWORK_OPTION.match(line) and not line.endswith('"";')]


def _files(folder: Path) -> Iterable[Path]:
    parts = folder / "sources.list.d"
    return [folder / "sources.list", *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]


def _lines(text: str) -> list[tuple[str, str]]:
    matches = (ONE_LINE.match(line.strip()) for line in text.splitlines())
    return [(match["uri"], match["suite"]) for match in matches if match]


def _stanzas(text: str) -> list[tuple[str, str]]:
    """The deb822 form: URIs and Suites, several of each."""
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
        if fields.get("Enabled", "yes") == "no" or "deb" not in fields.get("Types", "").split():
            continue
        found += [(uri, suite) for uri in fields.get("URIs", "").split() for suite in fields.get("Suites", "").split()]
    return found
