"""The API keys of the SFUs: which secret verifies a token, and to which SFU it belongs.

A secret must never appear in a log, an exception's text or a repr.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import yaml


@dataclass(frozen=True, slots=True)
class SfuKey:
    """One API key of one SFU. Raises ValueError when the key or the secret is empty: an empty secret would verify anybody's token."""

    sfu: str
    key: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.key or not self.secret:
            raise ValueError(f"SFU {self.sfu!r}: an API key and its secret must not be empty")


class KeyRing(Mapping[str, SfuKey]):
    """API key → SfuKey, of all SFUs, each of which may have several.

    `replace` puts all keys in place at once, so that a token is verified by the old keys or by the new ones, never by half of each.
    """

    def __init__(self, keys: Iterable[SfuKey] = ()) -> None:
        """Raises ValueError as `replace` does."""
        self._keys: dict[str, SfuKey] = {}
        self.replace(keys)

    def replace(self, keys: Iterable[SfuKey]) -> None:
        """Take these keys instead of the former ones.

        Raises ValueError, and keeps the former ones, when two SFUs share an API key or a key has two secrets: a token names only its
        API key (`iss`), so it could not be told which SFU signed it.
        """
        new: dict[str, SfuKey] = {}
        for key in keys:
            other = new.setdefault(key.key, key)
            if other.sfu != key.sfu:
                raise ValueError(f"API key {key.key!r} is given for two SFUs, {other.sfu!r} and {key.sfu!r}: each needs a key of its own")
            if other.secret != key.secret:
                raise ValueError(f"API key {key.key!r} of SFU {key.sfu!r} is given twice, with different secrets")
        self._keys = new

    def __getitem__(self, key: str) -> SfuKey:
        return self._keys[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"KeyRing({list(self._keys.values())!r})"


def parse_key_file(text: str, sfu: str) -> tuple[SfuKey, ...]:
    """The keys in LiveKit's own key file: a YAML map of API key to secret, as `livekit-server --key-file` reads it.

    Values are taken as they are written, so a secret of digits only needs no quotes. Raises ValueError with the line and a remedy, and
    never with a piece of the file: what does not parse may be the secret.
    """
    where: str | None
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        where = f"in line {error.problem_mark.line + 1}" if error.problem_mark is not None else "somewhere"
    except yaml.YAMLError:
        where = "because of a character that YAML does not allow"
    else:
        where = None
    if where is not None:  # raised out here: the parser's error, which quotes the line, must not travel along as the context
        raise ValueError(f"the key file is not YAML ({where}): it must have one `key: secret` in each line, with a space after the colon")
    if root is None:
        raise ValueError("the key file is empty: it must have one `key: secret` in each line")
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("the key file is not a map: it must have one `key: secret` in each line, with a space after the colon")
    keys: dict[str, SfuKey] = {}
    for name, secret in root.value:
        line = name.start_mark.line + 1
        if not (isinstance(name, yaml.ScalarNode) and name.value):
            raise ValueError(f"line {line} of the key file has no API key before the colon")
        if not (isinstance(secret, yaml.ScalarNode) and secret.value):
            raise ValueError(f"line {line} of the key file has no secret: it must be text after the colon")
        if name.value in keys:
            raise ValueError(f"line {line} of the key file has an API key that an earlier line has, too")
        keys[name.value] = SfuKey(sfu, name.value, secret.value)
    if not keys:
        raise ValueError("the key file has no keys: it must have one `key: secret` in each line")
    return tuple(keys.values())
