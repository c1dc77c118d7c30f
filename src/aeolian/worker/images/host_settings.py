"""What a build step needs of this host to reach its registries: names, certificates, indexes, proxies.

All of it is shown below /__modal/build or by variables while the step runs, and is no part of the layer.
"""

import configparser
import io
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from aeolian.worker.images.apt_sources import network_options
from aeolian.worker.package_index import installer_env, pip_config_files

FOLDER = "/__modal/build"
CACHE = f"{FOLDER}/cache"
"""What installers keep for their next run goes here, and so stays out of the layer."""
CERTIFICATE_VARIABLES = (
    "SSL_CERT_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
)
OF_BUILDS = {
    "PIP_CACHE_DIR": f"{CACHE}/pip",
    "UV_CACHE_DIR": f"{CACHE}/uv",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}
NPM_VARIABLES = ("NPM_CONFIG_REGISTRY", "npm_config_registry")
PATH_LIKE = re.compile(r"(?<!\S)/[^\s,'\"]+")
LOCAL_INDEX = re.compile(r"file://[^\s,'\"]+")
MAX_FILE_BYTES = 1 << 20


class BuildSettings(NamedTuple):
    binds: list[tuple[str, str, bool]]
    """(on the host, in the step, read-only)"""
    env: dict[str, str]
    files: dict[str, str]
    """Written inside before the step, below /__modal/build."""


def build_settings(environ: Mapping[str, str] = os.environ) -> BuildSettings:
    binds = [
        (os.path.realpath(name), name, True) for name in ("/etc/resolv.conf", "/etc/hosts") if os.path.exists(name)
    ]
    files: dict[str, str] = {}
    env = {name: value for name, value in installer_env(environ).items() if not name.startswith("SSL_CERT_DIR")}
    env.update({name: environ[name] for name in NPM_VARIABLES if name in environ})
    certificates = _certificates(environ)
    if certificates is not None:
        inside = f"{FOLDER}/ca-certificates.crt"
        binds.append((str(certificates), inside, True))
        env.update(dict.fromkeys(CERTIFICATE_VARIABLES, inside))
    merged = _merged_pip_config(environ)
    for folder in _local_folders(merged, env):
        binds.append((folder, folder, True))
    if merged:
        files[f"{FOLDER}/pip.conf"] = _with_files_shown(merged, files)
        env["PIP_CONFIG_FILE"] = f"{FOLDER}/pip.conf"
    for name in [name for name in env if name.startswith(("PIP_", "UV_")) and name not in CERTIFICATE_VARIABLES]:
        env[name] = _with_files_shown(env[name], files)
    if apt := network_options():
        files[f"{FOLDER}/apt.conf"] = "\n".join(apt) + "\n"
        env["APT_CONFIG"] = f"{FOLDER}/apt.conf"
    return BuildSettings(binds, {**env, **OF_BUILDS}, files)


def _certificates(environ: Mapping[str, str]) -> Path | None:
    """The bundle that this host trusts, if somebody has set one."""
    for name in CERTIFICATE_VARIABLES:
        if (path := environ.get(name)) and os.path.isfile(path):
            return Path(path).resolve()
    default = ssl.get_default_verify_paths().openssl_cafile
    for path in ("/etc/ssl/certs/ca-certificates.crt", default):
        if os.path.isfile(path):
            return Path(path).resolve()
    return None


def _merged_pip_config(environ: Mapping[str, str]) -> str:
    """All of pip's configuration files as one, without paths of the host's certificates and caches."""
    merged = configparser.RawConfigParser(strict=False)
    for path in pip_config_files(environ):
        try:
            merged.read(path)
        except (OSError, configparser.Error):
            continue
    for section in merged.sections():
        for option in ("cert", "client-cert", "cache-dir", "target", "prefix", "user", "log"):
            merged.remove_option(section, option)
    out = io.StringIO()
    merged.write(out)
    return out.getvalue()


def _with_files_shown(text: str, files: dict[str, str]) -> str:
    """Files of the host that a setting names (constraints, say) are given to the step, and named as it sees them."""

    def replace(match: re.Match) -> str:
        path = Path(match[0])
        try:
            if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
                return match[0]
            inside = f"{FOLDER}/settings{path}"
            files[inside] = path.read_text()
        except (OSError, UnicodeDecodeError):
            return match[0]
        return inside

    return PATH_LIKE.sub(replace, text)


def _local_folders(pip_settings: str, env: Mapping[str, str]) -> list[str]:
    """Folders of this host that the settings name as package indexes."""
    texts = [pip_settings, *(value for name, value in env.items() if name.startswith(("PIP_", "UV_")))]
    found: dict[str, None] = {}
    for text in texts:
        for url in LOCAL_INDEX.findall(text):
            folder = unquote(urlsplit(url).path).rstrip("/")
            # An index named `simple` links to files beside itself.
            found[folder.removesuffix("/simple") or folder] = None
    for value in (env.get("UV_FIND_LINKS", ""), env.get("PIP_FIND_LINKS", "")):
        for part in re.split(r"[,\s]+", value):
            if part.startswith("/"):
                found[part.rstrip("/")] = None
    existing = [folder for folder in found if os.path.isdir(folder)]
    # One inside another is shown with it.
    return [one for one in existing if not any(one.startswith(other + "/") for other in existing)]
