"""What a build step needs of this host to reach its registries: names, certificates, indexes, proxies.

All of it is shown below /__modal/build or by variables while the step runs, and is no part of the layer.
"""

import os
import re
import ssl
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from aeolian.worker.package_index import installer_env, pip_config_files

FOLDER = "/__modal/build"
CERTIFICATE_VARIABLES = (
    "SSL_CERT_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
)
NPM_VARIABLES = ("NPM_CONFIG_REGISTRY", "npm_config_registry")
LOCAL_INDEX = re.compile(r"file://[^\s,'\"]+")


class BuildSettings(NamedTuple):
    binds: list[tuple[str, str, bool]]
    """(on the host, in the step, read-only)"""
    env: dict[str, str]
    files: dict[str, str]
    """Written inside before the step, below /__modal/build."""
    mount_points: list[str]
    """Places outside /__modal that are made only to mount on."""


def build_settings(environ=os.environ) -> BuildSettings:
    binds: list[tuple[str, str, bool]] = []
    mount_points: list[str] = []
    for name in ("/etc/resolv.conf", "/etc/hosts"):
        if os.path.exists(name):
            binds.append((os.path.realpath(name), name, True))
            mount_points.append(name)
    env = {name: value for name, value in installer_env(environ).items() if not name.startswith("SSL_CERT_DIR")}
    env.update({name: environ[name] for name in NPM_VARIABLES if name in environ})
    certificates = _certificates(environ)
    if certificates is not None:
        inside = f"{FOLDER}/ca-certificates.crt"
        binds.append((str(certificates), inside, True))
        env.update(dict.fromkeys(CERTIFICATE_VARIABLES, inside))
    pip_settings = "\n".join(path.read_text(errors="replace") for path in pip_config_files(environ))
    for folder in _local_folders(pip_settings, env):
        binds.append((folder, folder, True))
        mount_points.append(folder)
    merged = _merged_pip_config(environ)
    files = {}
    if merged:
        files[f"{FOLDER}/pip.conf"] = merged
        env["PIP_CONFIG_FILE"] = f"{FOLDER}/pip.conf"
    return BuildSettings(binds, env, files, mount_points)


def _certificates(environ) -> Path | None:
    """The bundle that this host trusts, if somebody has set one."""
    for name in CERTIFICATE_VARIABLES:
        if (path := environ.get(name)) and os.path.isfile(path):
            return Path(path).resolve()
    default = ssl.get_default_verify_paths().openssl_cafile
    for path in ("/etc/ssl/certs/ca-certificates.crt", default):
        if os.path.isfile(path):
            return Path(path).resolve()
    return None


def _merged_pip_config(environ) -> str:
    """All of pip's configuration files as one, without paths of the host's certificates."""
    import configparser
    import io

    merged = configparser.RawConfigParser(strict=False)
    for path in pip_config_files(environ):
        try:
            merged.read(path)
        except (OSError, configparser.Error):
            continue
    for section in merged.sections():
        merged.remove_option(section, "cert")
    out = io.StringIO()
    merged.write(out)
    return out.getvalue()


def _local_folders(pip_settings: str, env: dict[str, str]) -> list[str]:
    """Folders of this host that the settings name as package indexes."""
    texts = [pip_settings, *(value for name, value in env.items() if name.startswith(("PIP_", "UV_")))]
    found: dict[str, None] = {}
    for text in texts:
        for url in LOCAL_INDEX.findall(text):
            found[unquote(urlsplit(url).path).rstrip("/")] = None
    for value in (env.get("UV_FIND_LINKS", ""), env.get("PIP_FIND_LINKS", "")):
        for part in re.split(r"[,\s]+", value):
            if part.startswith("/"):
                found[part.rstrip("/")] = None
    existing = [folder for folder in found if os.path.isdir(folder)]
    # One inside another is shown with it.
    return [one for one in existing if not any(one.startswith(other + "/") for other in existing)]
