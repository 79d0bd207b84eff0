"""Server names, patterns and base URLs."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.matrix import names
from sfu_delegate.matrix.names import ServerName, checked_base_url, compile_pattern, is_pattern, is_server_name, server_of

hosts = st.one_of(
    st.text(string.ascii_letters + string.digits + "-.", min_size=1, max_size=255),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
)
ports = st.one_of(st.just(""), st.integers(1, 65535).map(lambda p: f":{p}"))


@given(hosts, ports)
def test_grammar(host: str, port: str) -> None:
    """Every host, IPv4 and [IPv6], with and without a port, is a server name."""
    assert is_server_name(host + port)


@given(hosts, st.characters(exclude_characters=string.ascii_letters + string.digits + "-."), hosts)
def test_foreign_characters(before: str, character: str, after: str) -> None:
    """One character outside the grammar, and it is no server name (a colon may begin a port)."""
    assert not is_server_name(before + character + after) or character == ":"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ":80",
        "a:",
        "a:0",
        "a:65536",
        "a:123456",
        "a:x",
        "[::1",
        "::1",
        "[]",
        "[zz]",
        "[1:2]",
        "[127.0.0.1]",
        "a b",
        "a/b",
        "a\n",
        "a_b",
        "ä.example",
        "a" * 256,
        "user@a",
        "a?b",
        "a#b",
        "a%2f",
        "a:٣",
    ],
)
def test_no_server_names(name: str) -> None:
    """What the Matrix grammar does not allow, or nobody could connect to, is refused."""
    assert not is_server_name(name)


@pytest.mark.parametrize("name", ["a" * (names.MAX_NAME + 1), "ä" * 100_000, "[" + ":" * 1000 + "]", "a" * 255 + ":" + "0" * 100_000])
def test_names_that_are_too_long_are_not_remembered(name: str) -> None:
    """Anybody can send any number of them, and each may be as long as a body."""
    before = names._is_server_name.cache_info()
    assert not is_server_name(name)
    assert server_of(f"@alice:{name}") is None
    with pytest.raises(ValueError, match="is not a valid Matrix server name"):
        ServerName.parse(name)
    assert names._is_server_name.cache_info() == before


def test_the_longest_names_are_names() -> None:
    """With their ports; and they are remembered."""
    longest = "a" * 255 + ":65535"
    assert len(longest) <= names.MAX_NAME
    names._is_server_name.cache_clear()
    assert is_server_name(longest)
    assert names._is_server_name.cache_info().currsize == 1


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*", "anything.example:8448", True),
        ("*.example.org", "a.example.org", True),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "a.exampleXorg", False),
        ("*.example.org", "a.example.org.evil", False),
        ("*.example.org", "a.example.org:8448", False),
        ("*.EXAMPLE.org", "a.example.org", True),
        ("hs-*.example.org", "hs-7.example.org", True),
        ("[2001:db8::*]", "[2001:db8::7]", True),
        ("[2001:db8::*]", "2", False),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    """`*` stands for any text, everything else for itself, and the whole name must match."""
    assert is_pattern(pattern)
    assert (compile_pattern(pattern).fullmatch(name) is not None) is matches


@pytest.mark.parametrize("pattern", ["", "a b", "a/*", "*\n", "?.example.org", "a_b"])
def test_no_patterns(pattern: str) -> None:
    """A pattern has the characters of server names and `*`, nothing else."""
    assert not is_pattern(pattern)


@pytest.mark.parametrize(
    ("url", "result"),
    [
        ("https://matrix.example.org", "https://matrix.example.org"),
        ("https://matrix.example.org/", "https://matrix.example.org"),
        ("https://matrix.example.org//", "https://matrix.example.org"),
        ("https://matrix.example.org:8443/base/", "https://matrix.example.org:8443/base"),
        ("https://[2001:db8::1]:443", "https://[2001:db8::1]:443"),
    ],
)
def test_base_urls(url: str, result: str) -> None:
    """A base URL may have a port and a path; slashes at its end go."""
    assert checked_base_url(url, allow_http=False) == result


@pytest.mark.parametrize(
    "url",
    [
        None,
        5,
        "",
        "matrix.example.org",
        "ftp://a",
        "file:///etc/passwd",
        "http://a",
        "https://",
        "https:///path",
        "https://user@a",
        "https://user:password@a",
        "https://a?x=1",
        "https://a?",
        "https://a/#x",
        "https://a b",
        "https://a\n",
        "https://a\\b",
        "https://a:0",
        "https://a:99999",
        "https://a:",
        "https://ä.example",
        "https://[::1",
        "https://a%2eb",
        "https://" + "a" * 3000,
    ],
)
def test_no_base_urls(url: object) -> None:
    """Anything but a plain https URL is refused, with a sentence that does not repeat it."""
    with pytest.raises(ValueError, match=r"^(is|has|does) ") as raised:
        checked_base_url(url, allow_http=False)
    assert "password" not in str(raised.value)


def test_http_where_allowed() -> None:
    """http is for those who ask for it."""
    assert checked_base_url("http://127.0.0.1:8008/", allow_http=True) == "http://127.0.0.1:8008"


@given(st.text())
def test_any_text(text: str) -> None:
    """No text makes the checks fail in any other way than they say."""
    is_pattern(text)
    if not is_server_name(text):
        return
    assert checked_base_url(f"https://{text}", allow_http=False) == f"https://{text}"
