"""Where web functions are on the network, as their clients see it. Pure values."""

import msgspec

MAX_PORTS = 2000
"""Of web functions without a domain."""


class Site(msgspec.Struct, frozen=True):
    """How clients reach web functions: below `domain`, or where there is none at ports of `host` from `first_port`."""

    scheme: str
    host: str
    domain: str = ""
    port: int = 0
    """Of the domain's URLs; 0 = the scheme's own."""
    first_port: int = 0

    def url(self, label: str, port: int) -> str:
        if not self.domain:
            return f"{self.scheme}://{self.host}:{port}"
        return f"{self.scheme}://{label}.{self.domain}{f':{self.port}' if self.port else ''}"
