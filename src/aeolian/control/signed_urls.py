"""URLs that carry their own permission: method, path, parameters and expiry, signed with the server's key.

Clients and containers send no headers to them. What a URL allows is decided when it is made.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from aeolian.domain.clock import Clock
from aeolian.domain.errors import PermissionDenied

LIFETIME_S = 24 * 3600.0
KEY_BYTES = 32


class SignedUrls:
    def __init__(self, key: bytes, base_url: str, clock: Clock, lifetime_s: float = LIFETIME_S):
        """`base_url`: how clients and containers reach the gateway (`http://127.0.0.1:8001`)."""
        self.base_url = base_url.rstrip("/")
        self._key = key
        self._clock = clock
        self._lifetime_s = lifetime_s

    def make(self, method: str, path: str, **parameters: str | int) -> str:
        """A URL that allows `method` on `path` with exactly these parameters, for a day."""
        query = {name: str(value) for name, value in parameters.items()}
        query["expires"] = str(int(self._clock.now() + self._lifetime_s))
        query["signature"] = self._sign(method, path, query)
        return f"{self.base_url}{path}?{urlencode(query)}"

    def check(self, method: str, path: str, query: Mapping[str, str]) -> dict[str, str]:
        """The parameters of a signed URL. Raises PermissionDenied unless it allows exactly this, now."""
        parameters = dict(query)
        signature = parameters.pop("signature", "")
        expected = self._sign("GET" if method == "HEAD" else method, path, parameters)
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            raise PermissionDenied(f"the URL's signature does not allow {method} {path}: ask for a new URL")
        if int(parameters.pop("expires")) < self._clock.now():
            raise PermissionDenied(f"the URL for {path} has expired: ask for a new one")
        return parameters

    @property
    def is_plain_host(self) -> bool:
        """Whether clients accept single uploads to this host: they refuse names that they do not know."""
        host = urlsplit(self.base_url).hostname or ""
        if host == "localhost":
            return True
        try:
            address = ip_address(host)
        except ValueError:
            return False
        return address.is_private or address.is_loopback

    def _sign(self, method: str, path: str, parameters: Mapping[str, str]) -> str:
        text = "\n".join([method, path, urlencode(sorted(parameters.items()))])
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


def load_key(folder: Path) -> bytes:
    """The signing key in `folder` (`D/keys`), made on first use, readable by its owner only."""
    path = folder / "urls.key"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = folder / f".urls.key.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # the first of two starters wins
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return path.read_bytes()
