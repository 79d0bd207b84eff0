"""The API keys of the SFUs, and LiveKit's own key file."""

import pytest
from sfu_delegate.livekit.keys import KeyRing, SfuKey, parse_key_file

SECRET = "a-secret-that-nobody-may-read-in-a-log"


def test_finds_the_key_of_each_sfu() -> None:
    """Several SFUs with several keys each are told apart by the API key."""
    ring = KeyRing([SfuKey("north", "one", SECRET), SfuKey("north", "two", SECRET), SfuKey("south", "three", SECRET)])
    assert [ring[key].sfu for key in ("one", "two", "three")] == ["north", "north", "south"]
    assert ring.get("four") is None
    assert set(ring) == {"one", "two", "three"}


def test_replacing_takes_all_or_nothing() -> None:
    """After a reload only the new keys count, and a bad set of keys leaves the old ones in force."""
    ring = KeyRing([SfuKey("north", "one", SECRET)])
    ring.replace([SfuKey("north", "two", SECRET)])
    assert list(ring) == ["two"]
    with pytest.raises(ValueError, match="two SFUs"):
        ring.replace([SfuKey("north", "three", SECRET), SfuKey("south", "three", SECRET)])
    assert list(ring) == ["two"]


def test_a_key_cannot_belong_to_two_sfus() -> None:
    """A token names its API key only, so two SFUs with the same key could not be told apart."""
    with pytest.raises(ValueError, match="'north' and 'south'"):
        KeyRing([SfuKey("north", "devkey", SECRET), SfuKey("south", "devkey", SECRET)])


def test_a_key_cannot_have_two_secrets() -> None:
    """The same key twice is harmless; with different secrets it is an error that does not quote them."""
    assert len(KeyRing([SfuKey("north", "one", SECRET), SfuKey("north", "one", SECRET)])) == 1
    with pytest.raises(ValueError, match="different secrets") as error:
        KeyRing([SfuKey("north", "one", SECRET), SfuKey("north", "one", SECRET + "x")])
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(("key", "secret"), [("", SECRET), ("one", "")])
def test_empty_keys_are_refused(key: str, secret: str) -> None:
    """An empty secret would verify what anybody signed."""
    with pytest.raises(ValueError, match="must not be empty"):
        SfuKey("north", key, secret)


def test_no_repr_shows_a_secret() -> None:
    """Keys and rings can be logged by accident without telling the secret."""
    key = SfuKey("north", "one", SECRET)
    assert SECRET not in repr(key) + repr(KeyRing([key]))


def test_reads_livekits_key_file() -> None:
    """LiveKit's key file is a YAML map; what looks like a number is text all the same."""
    keys = parse_key_file("# ours\nAPIone: secret-one\n\n'two': \"se cret: two\"\n3: 0123456\nfour: yes\n", "north")
    assert [(key.sfu, key.key, key.secret) for key in keys] == [
        ("north", "APIone", "secret-one"),
        ("north", "two", "se cret: two"),
        ("north", "3", "0123456"),
        ("north", "four", "yes"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing but a comment\n", "is empty"),
        ("{}", "has no keys"),
        (f"one:{SECRET}", "not a map.*space after the colon"),
        (f"- {SECRET}", "not a map"),
        ("one:\n", "line 1 .* no secret"),
        (f"one: {SECRET}\ntwo: [{SECRET}]", "line 2 .* no secret"),
        (f": {SECRET}", "not YAML"),
        (f"'': {SECRET}", "line 1 .* no API key"),
        (f"? [a]\n: {SECRET}", "line 1 .* no API key"),
        (f"one: {SECRET}\none: {SECRET}x", "line 2 .* earlier line"),
        (f'one: "{SECRET}', "not YAML"),
        (f"one: *{SECRET}", "not YAML .in line 1"),
        (f"one: {SECRET}: x: y", "not YAML .in line 1"),
        (f"one: {SECRET}\n\ttwo: x", "not YAML"),
        (f"one: {SECRET}\x00", "not YAML"),
        (f"one: {SECRET}\n---\ntwo: x", "not YAML"),
    ],
)
def test_a_bad_key_file_is_explained_without_quoting_it(text: str, message: str) -> None:
    """The error says which line and what to do, and neither it nor its cause holds a piece of the file."""
    with pytest.raises(ValueError, match=message) as error:
        parse_key_file(text, "north")
    assert SECRET not in str(error.value)
    assert error.value.__context__ is None
