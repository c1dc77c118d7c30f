import stat
from urllib.parse import parse_qsl, urlsplit

import pytest

from aeolian.control.signed_urls import SignedUrls, load_key
from aeolian.domain.clock import ManualClock
from aeolian.domain.errors import PermissionDenied


def check(urls: SignedUrls, method: str, url: str, path: str | None = None):
    parts = urlsplit(url)
    return urls.check(method, path or parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)))


def test_a_url_carries_its_parameters_until_it_expires():
    clock = ManualClock()
    urls = SignedUrls(b"k" * 32, "http://127.0.0.1:1/", clock, lifetime_s=60)
    url = urls.make("PUT", "/blobs/x", length=5, md5="")
    assert url.startswith("http://127.0.0.1:1/blobs/x?")
    assert check(urls, "PUT", url) == {"length": "5", "md5": ""}
    clock.advance(61)
    with pytest.raises(PermissionDenied, match="expired"):
        check(urls, "PUT", url)


def test_nothing_of_a_url_can_be_changed():
    urls = SignedUrls(b"k" * 32, "http://h", ManualClock())
    url = urls.make("GET", "/a", length=5)
    assert check(urls, "HEAD", url) == {"length": "5"}
    for attempt in (
        lambda: check(urls, "PUT", url),
        lambda: check(urls, "GET", url, path="/b"),
        lambda: check(urls, "GET", url.replace("length=5", "length=6")),
        lambda: check(urls, "GET", url + "&more=1"),
        lambda: check(urls, "GET", "http://h/a"),
        lambda: check(SignedUrls(b"l" * 32, "http://h", ManualClock()), "GET", url),
    ):
        with pytest.raises(PermissionDenied, match="signature"):
            attempt()


@pytest.mark.parametrize(
    ("host", "is_plain"),
    [("127.0.0.1", True), ("localhost", True), ("10.1.2.3", True), ("8.8.8.8", False), ("files.example.com", False)],
)
def test_hosts_that_clients_accept_single_uploads_to(host, is_plain):
    assert SignedUrls(b"", f"http://{host}:8001", ManualClock()).is_plain_host is is_plain


def test_the_key_is_made_once_and_private(tmp_path):
    key = load_key(tmp_path / "keys")
    assert len(key) == 32 and load_key(tmp_path / "keys") == key
    assert stat.S_IMODE((tmp_path / "keys/urls.key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["urls.key"]
