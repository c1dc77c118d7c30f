"""Object ids in Modal's shape: a prefix that decides the client's class, one dash, 22 base62 characters.

Containers' have 26 of Crockford's base 32: by that the SDK tells a remote frame of a traceback from a local one.
"""

import hashlib
import secrets

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_LENGTH = 22
BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
CONTAINER_LENGTH = 26

PREFIXES = {
    "app": "ap",
    "function": "fu",
    "function_call": "fc",
    "input": "in",
    "class": "cs",
    "container": "ta",
    "image": "im",
    "image_revision": "ir",
    "mount": "mo",
    "volume": "vo",
    "secret": "st",
    "dict": "di",
    "queue": "qu",
    "environment": "en",
    "workspace": "ac",
    "blob": "bl",
    "service_user": "su",
    "token": "ak",
    "token_secret": "as",
    "worker": "wo",
    "definition": "de",
    "token_flow": "tf",
    "proxy_token": "wk",
    "proxy_token_secret": "ws",
}


def new_id(noun: str) -> str:
    """A fresh random id for `noun` (a key of `PREFIXES`), with about 130 bits of randomness."""
    if noun == "container":
        # The last one tells the SDK that it is none of a second-version sandbox, whose task ids end in V.
        return f"{PREFIXES[noun]}-{''.join(secrets.choice(BASE32) for _ in range(CONTAINER_LENGTH - 1))}0"
    return f"{PREFIXES[noun]}-{random_base62(ID_LENGTH)}"


def content_id(noun: str, content: bytes) -> str:
    """The id that `content` always gets: ids of content-addressed objects (images, mounts)."""
    number = int.from_bytes(hashlib.sha256(content).digest(), "big")
    digits = []
    for _ in range(ID_LENGTH):
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    return f"{PREFIXES[noun]}-{''.join(digits)}"


def random_base62(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def has_prefix(object_id: str, noun: str) -> bool:
    return object_id.startswith(PREFIXES[noun] + "-")
