"""A real registry on loopback (Debian's `docker-registry`), and images to push to it, made by hand."""

import gzip
import hashlib
import io
import json
import socket
import subprocess
import tarfile
import time
from pathlib import Path

CONFIG = """\
version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {root}}}, maintenance: {{uploadpurging: {{enabled: false}}}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""
START_TIMEOUT_S = 20


class LoopbackRegistry:
    """`htpasswd`: a line `user:bcrypt-hash`; "" = everybody may pull and push."""

    def __init__(self, folder: Path, htpasswd: str = ""):
        folder.mkdir()
        self.port = _free_port()
        auth = ""
        if htpasswd:
            (folder / "htpasswd").write_text(htpasswd + "\n")
            auth = f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}"
        (folder / "config.yml").write_text(CONFIG.format(root=folder / "data", port=self.port, auth=auth))
        self._process = subprocess.Popen(
            ["docker-registry", "serve", folder / "config.yml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _wait_for(self.port)

    def name(self, path: str) -> str:
        return f"127.0.0.1:{self.port}/{path}"

    def push(self, layout: Path, path: str, credentials: str = "") -> None:
        command = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false"]
        command += [f"--dest-creds={credentials}"] if credentials else []
        subprocess.run([*command, f"oci:{layout}", f"docker://{self.name(path)}"], check=True, capture_output=True)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def tar_layer(*entries: tuple) -> bytes:
    """(name, content | None for a folder | ("->", target), {other fields}) as an uncompressed layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content, *fields in entries:
            member = tarfile.TarInfo(name)
            member.mode = 0o755 if content is None else 0o644
            for field, value in (fields[0] if fields else {}).items():
                setattr(member, field, value)
            if content is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(content, tuple):
                member.type, member.linkname = (tarfile.SYMTYPE if content[0] == "->" else tarfile.LNKTYPE), content[1]
            elif isinstance(content, str):
                member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()) if isinstance(content, str) else None)
    return out.getvalue()


def write_layout(folder: Path, layers: list[bytes], config: dict, architecture: str = "amd64", compress="gzip") -> Path:
    """An OCI image layout that holds one image."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    kind = "application/vnd.oci.image"
    packed = []
    for layer in layers:
        if compress == "zstd":
            data = subprocess.run(["zstd", "-c"], input=layer, capture_output=True, check=True).stdout
        else:
            data = gzip.compress(layer, mtime=0)
        packed.append(blob(data, f"{kind}.layer.v1.tar+{compress}"))
    description = {
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": blob(json.dumps(description).encode(), f"{kind}.config.v1+json"),
        "layers": packed,
    }
    entry = blob(json.dumps(manifest).encode(), f"{kind}.manifest.v1+json")
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
