"""Where Python packages come from: this host's pip settings, said in uv's words.

uv reads neither pip's environment nor its configuration files, so a host that reaches its packages through
a mirror or local folders would look unreachable to it.
"""

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

PIP_SETTINGS = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
OWN_UV_SETTINGS = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX")
PASSED_ON = ("PIP_", "UV_", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def pip_config_files(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """pip's configuration files that exist, least important first."""
    home = Path(environ.get("HOME", "/"))
    paths = [
        Path("/etc/pip.conf"),
        Path("/etc/xdg/pip/pip.conf"),
        home / ".pip/pip.conf",
        home / ".config/pip/pip.conf",
    ]
    if "PIP_CONFIG_FILE" in environ:
        paths.append(Path(environ["PIP_CONFIG_FILE"]))
    return [path for path in paths if path.is_file()]


def installer_env(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables with which pip and uv reach the indexes that this host uses (certificates and proxies too)."""
    env = {name: value for name, value in environ.items() if name.startswith(PASSED_ON) or name.lower() in PROXIES}
    if any(name in environ for name in OWN_UV_SETTINGS):
        return env
    settings: dict[str, str] = {}
    for path in pip_config_files(environ):
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read(path)
        except (OSError, configparser.Error):
            continue
        for section in ("global", "install"):
            if parser.has_section(section):
                settings.update({name: value for name, value in parser.items(section) if name in PIP_SETTINGS})
    for name in PIP_SETTINGS:
        variable = "PIP_" + name.upper().replace("-", "_")
        if variable in environ:
            settings[name] = environ[variable]
    for name, value in settings.items():
        separator = "," if name == "find-links" else " "
        env[PIP_SETTINGS[name]] = separator.join(value.split())
    if "extra-index-url" in settings:
        env["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip: the best version over all indexes
    return env
