"""Server names, patterns of them, user IDs, and base URLs: what is well-formed. Never looks anything up."""

import ipaddress
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

MAX_URL = 2048
MAX_USER_ID = 255  # bytes (the specification's appendices, "User Identifiers")
MAX_DNS_NAME = 253
MAX_LABEL = 63
MAX_NAME = 270  # characters, more than any name has with its port: what is longer is not remembered
REMEMBERED = 1000  # names whose form is known: most requests are about few

_NAME = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<host>[0-9A-Za-z.-]{1,255}))(?::(?P<port>[0-9]{1,5}))?")
_PATTERN = re.compile(r"[0-9A-Za-z.:\[\]*-]{1,270}")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")
_URL_CHARACTERS = re.compile(r"[!-~]+")


def is_server_name(name: str) -> bool:
    """Does the name follow the Matrix grammar of server names (host, IPv4 or [IPv6], each with an optional port)?

    Stricter than the grammar in two points: what stands in brackets is an IPv6 address, and a port is one that can be connected to.
    """
    return len(name) <= MAX_NAME and _is_server_name(name)


@lru_cache(maxsize=REMEMBERED)
def _is_server_name(name: str) -> bool:
    found = _NAME.fullmatch(name)
    if found is None:
        return False
    if found["port"] is not None and not 0 < int(found["port"]) < 65536:
        return False
    if found["v6"] is None:
        return True
    try:
        ipaddress.IPv6Address(found["v6"])
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class ServerName:
    """A server name that can be looked for, in lower case."""

    host: str  # as in a URL: IPv6 addresses in brackets
    port: int | None
    literal: bool  # the host is an IP address

    @classmethod
    @lru_cache(maxsize=REMEMBERED)
    def parse(cls, name: str) -> "ServerName":
        """Raises ValueError where `is_server_name` is false, and for hosts that are neither IP addresses nor names of the DNS.

        Such are those with empty or overlong labels, and those that end in a number without being IPv4 addresses: the system's resolver
        takes `127.1` and `0x7f000001` for addresses, the DNS cannot have them.
        """
        found = _NAME.fullmatch(name)
        if found is None or not is_server_name(name):
            raise ValueError("is not a valid Matrix server name")
        port = None if found["port"] is None else int(found["port"])
        if found["v6"] is not None:
            return cls(f"[{found['v6'].lower()}]", port, literal=True)
        host = found["host"].lower()
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            bare = host.removesuffix(".")
            labels = bare.split(".")
            if len(bare) > MAX_DNS_NAME or not all(0 < len(label) <= MAX_LABEL for label in labels) or _NUMERIC.fullmatch(labels[-1]):
                raise ValueError("is neither an IP address nor a name that the DNS can have") from None
            return cls(host, port, literal=False)
        return cls(host, port, literal=True)

    def __str__(self) -> str:
        return self.host if self.port is None else f"{self.host}:{self.port}"


def server_of(user_id: object) -> str | None:
    """The server name in a Matrix user ID, to the letter; None where it is no user ID.

    `@localpart:server`, 255 bytes at most. Localparts are the historical ones: any character but the colon, controls (NUL with them) and
    surrogates.
    """
    if not isinstance(user_id, str) or not user_id.startswith("@"):
        return None
    localpart, colon, server = user_id[1:].partition(":")
    if not localpart or not colon:
        return None
    if not localpart.isprintable() and any(unicodedata.category(character) in {"Cc", "Cs"} for character in localpart):
        return None
    if not is_server_name(server) or len(user_id.encode()) > MAX_USER_ID:
        return None
    return server


def is_pattern(pattern: str) -> bool:
    """Is it a server name, or a pattern of server names, in which `*` stands for any text?"""
    return _PATTERN.fullmatch(pattern) is not None if "*" in pattern else is_server_name(pattern)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern as an expression for lower-case names, to be used with `fullmatch`. Brackets mean themselves: IPv6 literals have them."""
    return re.compile(".*".join(re.escape(part) for part in pattern.lower().split("*")))


def checked_base_url(text: object, *, allow_http: bool) -> str:
    """The base URL of a client-server API, without trailing slashes.

    https, or http where that is allowed; a host, perhaps a port and a path; no credentials, no query, no fragment.
    Raises ValueError with a sentence that continues "the base URL …".
    """
    if not isinstance(text, str) or not text:
        raise ValueError("is not a text")
    if len(text) > MAX_URL:
        raise ValueError(f"is longer than {MAX_URL} characters")
    if not _URL_CHARACTERS.fullmatch(text) or "\\" in text:
        raise ValueError("has characters that a URL cannot have")
    try:
        parts = urlsplit(text)
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in {"https", "http"}:
        raise ValueError("does not begin with https://")
    if parts.scheme == "http" and not allow_http:
        raise ValueError("is http, and only https is allowed")
    if "@" in parts.netloc:
        raise ValueError("has credentials in it")
    if "?" in text or "#" in text:
        raise ValueError("has a query or a fragment")
    if not is_server_name(parts.netloc.replace("_", "-")):  # names of containers have underscores
        raise ValueError("has no valid host and port")
    return text.rstrip("/")
