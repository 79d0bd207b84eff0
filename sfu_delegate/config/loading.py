"""From a YAML file, the environment laid over it and the files that hold secrets to a checked Config, or to all problems at once.

It must never read the process's environment by itself, and never quote what a file or a variable holds where that may be a secret.
"""

import difflib
import os
import re
import ssl
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError

from sfu_delegate.config.checking import FERNET_REMEDY, contradictions, validate
from sfu_delegate.config.model import Admin, Config, Homeserver, Sfu, type_at
from sfu_delegate.config.problems import HIDDEN, ConfigInvalid, KeyPath, Problem, dotted, kind_of, located, place_of, related, unique
from sfu_delegate.config.registration import MAKE_ONE, NotARegistration, judge, parse
from sfu_delegate.config.risks import warnings
from sfu_delegate.config.values import MAKE_A_TOKEN, ODD_REMEDY, odd_character
from sfu_delegate.config.yaml_text import NOTHING, parse_yaml
from sfu_delegate.livekit.keys import parse_key_file
from sfu_delegate.sealing import key_bytes, parse_keys

PREFIX: Final = "SFU_DELEGATE_"
CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"
"""Where a service manager puts the credentials of a service (systemd's LoadCredential=): a key that names a file may begin with ${…} of it."""
_A_CREDENTIAL: Final = f"${{{CREDENTIALS}}}/"
_MOST_FILE_BYTES: Final = 4 * 1024 * 1024
_OPEN_ALREADY: Final = re.compile(r"/dev/(?:stdin|fd/\d+)|/proc/self/fd/\d+", re.ASCII)  # the latter two are what a shell makes of <(…)
_NULL_DEVICE: Final = os.makedev(1, 3)  # /dev/null, which is as good as an empty file


def load(path: Path, environ: Mapping[str, str] = MappingProxyType({}), *, registrations_needed: bool = True) -> Config:
    """Read and check a file, with the environment laid over it. Raises ConfigInvalid with all problems.

    `registrations_needed`: is a `registration_file` that is not there a problem? Otherwise that homeserver is left without its tokens.
    """
    text, problems = read_text(path, "", "the configuration file", piped=True)
    if text is None:
        raise ConfigInvalid(problems)
    config = from_text(text, environ, registrations_needed=registrations_needed)
    inline = [f"sfus.{name}.keys" for name, sfu in config.sfus.items() if sfu.keys and sfu.key_file is None]
    for number, homeserver in enumerate(config.homeservers):
        tokens = ((homeserver.token_key, homeserver.as_token), (homeserver.hs_token_key, homeserver.hs_token))
        inline += [f"homeservers[{number}].{key}" for key, token in tokens if token and not key.endswith("_file")]
    inline += ["encryption.keys"] if config.encryption.keys and config.encryption.keys_file is None else []
    inline += ["admin.token"] if config.admin.token and config.admin.token_file is None else []
    inline += ["postgresql.password"] if config.postgresql.password and config.postgresql.password_file is None else []
    if inline and _world_readable(path):
        config._risks += (
            Problem("", str(path), f"holds secrets ({', '.join(inline)}) and every user of this machine may read it", f"chmod o= {path}"),
        )
    return config


def load_admin(path: Path, environ: Mapping[str, str] = MappingProxyType({})) -> Admin:
    """The section `admin` alone, for those who ask a running daemon: they need not be able to read its secrets. Raises ConfigInvalid.

    Other sections are not looked at. A `token_file` that cannot be read leaves the token away: over the socket nobody asks for it.
    """
    text, problems = read_text(path, "", "the configuration file", piped=True)
    if text is None:
        raise ConfigInvalid(problems)
    parsed = parse_yaml(text)
    if not isinstance(parsed.data, dict):
        raise ConfigInvalid(
            parsed.problems or [Problem("", kind_of(parsed.data), "must be keys with values", "begin with the output of example-config")]
        )
    where: dict[KeyPath, str] = {path: f"line {line}" for path, line in parsed.lines.items()}
    plain = _plain({key: value for key, value in parsed.data.items() if key == "admin"}, (), frozenset(), problems, where)
    prefix = f"{PREFIX}ADMIN"
    plain, _ = _overlay(plain, {name: value for name, value in environ.items() if name.upper().split("__")[0] == prefix}, problems, where)
    if directory := environ.get(CREDENTIALS):
        plain = _with_credentials(plain, (), directory)
    config, _ = validate(plain, problems, where)
    if config is None or problems:
        raise ConfigInvalid(unique(problems))
    admin = config.admin
    if admin.token is None and admin.token_file is not None:
        token, _ = read_text(admin.token_file, "admin.token_file", "the token's file")
        if token and token.strip():
            admin = admin.model_copy(update={"token": SecretStr(token.strip())})
    return admin


def from_text(text: str, environ: Mapping[str, str] = MappingProxyType({}), *, registrations_needed: bool = True) -> Config:
    """Check the text of a file, with the environment laid over it. Raises ConfigInvalid with all problems."""
    parsed = parse_yaml(text)
    if parsed.data is NOTHING:
        raise ConfigInvalid(parsed.problems)
    return from_mapping(parsed.data, environ, lines=parsed.lines, before=parsed.problems, registrations_needed=registrations_needed)


def from_mapping(
    data: object,
    environ: Mapping[str, str] = MappingProxyType({}),
    *,
    lines: Mapping[KeyPath, int] = MappingProxyType({}),
    before: Sequence[Problem] = (),
    registrations_needed: bool = True,
) -> Config:
    """Check plain data, with the environment laid over it. Raises ConfigInvalid with all problems, those from `before` included.

    `lines` gives the line of each key in the file, for the problems; `registrations_needed` is as for `load`.
    """
    problems = list(before)
    where: dict[KeyPath, str] = {path: f"line {line}" for path, line in lines.items()}
    try:
        plain = _plain(data, (), frozenset(), problems, where)
    except RecursionError:
        raise ConfigInvalid([*problems, Problem("", "", "is nested too deeply", "write it as in the example-config")]) from None
    if plain is None:
        plain = {}
    if not isinstance(plain, dict):
        raise ConfigInvalid([*problems, Problem("", kind_of(plain), "must be keys with values", "begin with the output of example-config")])
    plain, risks = _overlay(plain, environ, problems, where)
    if directory := environ.get(CREDENTIALS):
        plain = _with_credentials(plain, (), directory)
    config, pruned = validate(plain, problems, where)
    if config is not None:
        config = _read_secrets(config, problems, risks, pruned, where, registrations_needed=registrations_needed)
        for problem, involved in contradictions(config):
            if not any(related(one, other) for one in involved for other in pruned):
                problems.append(located(problem, involved[0], where))
    if config is None:
        raise ConfigInvalid(unique(problems))
    config._risks = tuple(risks)
    if problems:
        # What was left out has become a default, and is not to be judged.
        left_out = [dotted(path) for path in pruned]
        left_out += ["postgresql"] if "database" in left_out else []  # whose keys are judged by which database it is
        judged = [risk for risk in warnings(config) if not any(f"{risk.key}.".startswith((f"{key}.", f"{key}[")) for key in left_out)]
        raise ConfigInvalid(unique(problems), [risk for risk in judged if risk.key not in {problem.key for problem in problems}])
    return config


def _with_credentials(data: Any, path: KeyPath, directory: str) -> Any:
    """The same, in which the files that are credentials are named by their paths."""
    if isinstance(data, dict):
        return {key: _with_credentials(value, (*path, key), directory) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_credentials(value, (*path, number), directory) for number, value in enumerate(data)]
    if isinstance(data, str) and data.startswith(_A_CREDENTIAL) and type_at(path).type is Path:
        return str(Path(directory, data.removeprefix(_A_CREDENTIAL)))
    return data


def _no_credentials(path: Path) -> bool:
    """Is it a credential, and nobody has said where those are?"""
    return str(path).startswith(_A_CREDENTIAL)


def read_text(path: Path, key: str, what: str, *, piped: bool = False) -> tuple[str | None, list[Problem]]:
    """The text of a file, or None and why not; `key` is what names it, and `what` says what it should be.

    What may keep a reader waiting for ever is not opened: named pipes, devices. `piped`: a pipe that is open already (`<(…)`, /dev/stdin) will do.
    """
    if _no_credentials(path):
        remedy = f"start it by a unit with LoadCredential=, or say where they are: {CREDENTIALS}=/etc/credstore sfu-delegate …"
        return None, [Problem(key, str(path), f"{what} cannot be read: {CREDENTIALS} is not set", remedy)]
    remedy = "check the path, and that the daemon's user may read it"
    if not key:
        remedy += "; `sfu-delegate example-config` prints a file to begin with"
    try:
        status = path.stat()
        if (kind := _no_file(status)) and not (piped and stat.S_ISFIFO(status.st_mode) and _OPEN_ALREADY.fullmatch(str(path))):
            return None, [Problem(key, str(path), f"{what} cannot be read: it is {kind}", "name a regular file")]
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
        if len(content) > _MOST_FILE_BYTES:
            return None, [Problem(key, str(path), f"{what} is larger than 4 MiB", "check the path")]
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        return None, [Problem(key, str(path), f"{what} is not UTF-8 text", "check that it is the right file, and save it as UTF-8")]
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a path"
        return None, [Problem(key, str(path), f"{what} cannot be read: {reason}", remedy)]


def _no_file(status: os.stat_result) -> str:
    """What it is that cannot be read to its end at once; "" for files, and for directories, which nobody can read."""
    mode = status.st_mode
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and status.st_rdev != _NULL_DEVICE) else ""


def _no_certificates(path: Path, key: str) -> list[Problem]:
    try:
        ssl.create_default_context(cafile=path)
    except (OSError, ValueError):  # SSLError is an OSError
        return [Problem(key, str(path), "holds no certificates that can be used", "a PEM file with the certificates of the authorities to trust")]
    return []


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return False


def _world_readable(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


def _plain(data: object, path: KeyPath, above: frozenset[int], problems: list[Problem], where: Mapping[KeyPath, str]) -> Any:
    """The same data, made of dict with text keys, list and scalars only."""
    if isinstance(data, Mapping | list | tuple | set | frozenset):
        if id(data) in above:
            problems.append(Problem(dotted(path), "", "contains itself", "write it without the alias (*)", place_of(path, where)))
            return None
        above |= {id(data)}
    if isinstance(data, Mapping):
        result: dict[str, Any] = {}
        for key, value in data.items():
            if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
                result[str(key)] = _plain(value, (*path, str(key)), above, problems, where)
            else:
                problems.append(
                    Problem(dotted(path), "", f"has a key that is not a text, but {kind_of(key)}", "put the key into quotes", place_of(path, where))
                )
        return result
    if isinstance(data, list | tuple):
        return [_plain(value, (*path, number), above, problems, where) for number, value in enumerate(data)]
    return data


class _Environment(EnvSettingsSource):
    """What one variable says, as nested data. Names are matched in any case, except for API keys, which have one."""

    def __init__(self, name: str, value: str) -> None:
        self._only = {re.sub(r"(?i)^(.+?)(__keys__.+)?$", lambda m: m[1].lower() + "__keys__" + m[2][8:] if m[2] else m[1].lower(), name): value}
        super().__init__(
            # Only the model's fields are asked for: it need not be one that reads the environment whenever it is made.
            cast("type[BaseSettings]", Config),
            case_sensitive=False,
            env_prefix=PREFIX,
            env_nested_delimiter="__",
        )

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._only

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # noqa: ARG002
        parsed = parse_yaml(str(value))
        if parsed.data is NOTHING:
            raise ValueError("not YAML")
        odd: list[Problem] = []
        plain = _plain(parsed.data, (), frozenset(), odd, {})
        if odd:
            raise ValueError("not plain data")
        return plain


# Kubernetes puts these into every container of a namespace with a service named sfu-delegate, or sfu-delegate-postgresql.
_KUBERNETES: Final = re.compile(r"SFU_DELEGATE_(?:POSTGRESQL_)?(?:SERVICE_.*|PORT(?:_\d+_(?:TCP|UDP).*)?)")
_NOT_KEYS: Final = frozenset({"SFU_DELEGATE_CONFIG"})


def _overlay(
    data: dict[str, Any], environ: Mapping[str, str], problems: list[Problem], where: dict[KeyPath, str]
) -> tuple[dict[str, Any], list[Problem]]:
    risks: list[Problem] = []
    for name in sorted(environ, key=lambda n: (n.count("__"), n)):  # whole sections first, then what is in them
        if not name.upper().startswith(PREFIX) or name.upper() in _NOT_KEYS or _KUBERNETES.fullmatch(name):
            continue
        try:
            said = _Environment(name, environ[name])()
        except (SettingsError, ValueError):
            remedy = "give a YAML or JSON value, such as {key: value} or [one, two]"
            problems.append(Problem(_env_key(name), HIDDEN, "is not YAML that can be read", remedy, name))
            continue
        if not said:
            first = name[len(PREFIX) :].lower().split("__", maxsplit=1)[0]
            close = difflib.get_close_matches(first, Config.model_fields, 1)
            meant = f"did you mean {PREFIX}{close[0].upper()}…? " if close else ""
            risks.append(Problem(name, "", "is no key of the configuration, and was ignored", f"{meant}sections are followed by two underscores"))
            continue
        plain = _nothing_is_null(_plain(said, (), frozenset(), problems, {}))
        _mark(plain, (), name, where)
        data = _merge(data, plain, (), name, problems)
    return data, risks


def _nothing_is_null(data: Any) -> Any:
    """An environment variable is always a text; "null" takes a key away, as in the file."""
    if isinstance(data, dict):
        return {key: _nothing_is_null(value) for key, value in data.items()}
    return None if data == "null" else data


def _env_key(name: str) -> str:
    return name[len(PREFIX) :].lower().replace("__", ".")


def _mark(data: object, path: KeyPath, name: str, where: dict[KeyPath, str]) -> None:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            _mark(value, (*path, int(key) if _is_index(path, key) else key), name, where)
    elif path:
        where[path] = name


def _is_index(path: KeyPath, key: str) -> bool:
    return bool(path) and key.isdecimal() and key.isascii() and type_at(path).kind == "list"


def _merge(base: Any, over: Any, path: KeyPath, name: str, problems: list[Problem]) -> Any:
    """`over` laid over `base`: keys one by one, lists by their numbers."""
    if not isinstance(over, dict):
        return over
    if type_at(path).kind == "list":
        items = list(base) if isinstance(base, list) else []
        for key, value in over.items():
            if not key.isdecimal() or not key.isascii() or len(key) > 6 or int(key) > len(items):
                remedy = f"use a number from 0 to {len(items)}: a list's items are numbered from 0, and a new one comes next"
                problems.append(Problem(dotted(path), "", "is a list, and this is not the number of one of its items", remedy, name))
                continue
            number = int(key)
            items[number : number + 1] = [_merge(items[number] if number < len(items) else None, value, (*path, number), name, problems)]
        return items
    if not isinstance(base, dict):
        base = {}
    return {**base, **{key: _merge(base.get(key), value, (*path, key), name, problems) for key, value in over.items()}}


def _read_secrets(
    config: Config,
    problems: list[Problem],
    risks: list[Problem],
    pruned: list[KeyPath],
    where: Mapping[KeyPath, str],
    *,
    registrations_needed: bool,
) -> Config:
    """The same configuration with the content of its secret files. What cannot be read is a problem, and counts as pruned."""

    def read(path: Path, key: KeyPath, what: str) -> str | None:
        text, wrong = read_text(path, dotted(key), what)
        problems.extend(located(problem, key, where) for problem in wrong)
        if text is None:
            pruned.append(key[:-1])
        elif _world_readable(path):
            risks.append(Problem(dotted(key), str(path), "every user of this machine may read this secret", f"chmod o= {path}"))
        return text

    def unusable(key: KeyPath, path: Path, what: str, remedy: str) -> None:
        problems.append(Problem(dotted(key), str(path), what, remedy, place_of(key, where)))
        pruned.append(key[:-1])

    def both(inline: KeyPath, file: str) -> None:
        remedy = f"keep one of the two; {inline[-1]}: null in the file, or in the environment, takes it away"
        problems.append(Problem(dotted(inline), HIDDEN, f"is given here, and {file} as well", remedy, place_of(inline, where)))

    def check_certificates(path: Path, key: KeyPath) -> None:
        _, wrong = read_text(path, dotted(key), "the certificate file")
        wrong = wrong or _no_certificates(path, dotted(key))
        problems.extend(located(problem, key, where) for problem in wrong)

    postgresql, password_file = config.postgresql, config.postgresql.password_file
    if not config.is_postgresql or password_file is None:
        pass  # with SQLite nothing of it counts: a file that is not needed need not be there
    elif postgresql.password is not None:
        both(("postgresql", "password"), "password_file")
    else:
        at: KeyPath = ("postgresql", "password_file")
        text = read(password_file, at, "the password's file")
        if text is not None and text.strip():
            postgresql = postgresql.model_copy(update={"password": SecretStr(text.strip())})
            if odd := odd_character(text.strip()):
                unusable(at, password_file, f"has {odd} in it", "put the password into it, in one line, and nothing else")
        elif text is not None:
            unusable(at, password_file, "is empty", "put the password into it")
    options = config.database_options()
    if authorities := options.get("sslrootcert"):
        check_certificates(Path(authorities), ("database",))
    for option, what in (("sslcert", "the client's certificate"), ("sslkey", "the key of the client's certificate")):
        if given := options.get(option):
            _, wrong = read_text(Path(given), "database", what)
            problems.extend(located(problem, ("database",), where) for problem in wrong)

    admin, at = config.admin, ("admin", "token_file")
    if admin.token_file is not None and admin.token is not None:
        both(("admin", "token"), "token_file")
    elif admin.token_file is not None and (text := read(admin.token_file, at, "the token's file")) is not None:
        if not text.strip():
            unusable(at, admin.token_file, "is empty", f"put the token into it: {MAKE_A_TOKEN}")
        else:
            admin = admin.model_copy(update={"token": SecretStr(text.strip())})

    encryption = config.encryption
    if encryption.keys_file is not None and encryption.keys:
        both(("encryption", "keys"), "keys_file")
    elif encryption.keys_file is not None:
        at = ("encryption", "keys_file")
        path = encryption.keys_file
        if (text := read(path, at, "the key file")) is not None:
            found = parse_keys(text)
            encryption = encryption.model_copy(update={"keys": tuple(SecretStr(key) for key in found)})
            if not found:
                unusable(at, path, "holds no key", "write one Fernet key a line")
            for number, key in enumerate(found, 1):
                if odd := odd_character(key):
                    unusable(at, path, f"key {number} in it has {odd} in it", "write one Fernet key a line and nothing beside it")
                elif key_bytes(key) is None:
                    unusable(at, path, f"key {number} in it is not a Fernet key (32 bytes in base64url)", FERNET_REMEDY)

    sfus: dict[str, Sfu] = {}
    for name, sfu in config.sfus.items():
        sfus[name], at = sfu, ("sfus", name, "key_file")
        if sfu.key_file is None:
            for key in sfu.keys:
                if odd := odd_character(key):  # which is not shown: it may be the secret, the two having been exchanged
                    inline: KeyPath = ("sfus", name, "keys")
                    problems.append(Problem(dotted(inline), HIDDEN, f"has an API key with {odd} in it", ODD_REMEDY, place_of((*inline, key), where)))
                    pruned.append(inline)
            continue
        if sfu.keys:
            both(("sfus", name, "keys"), "key_file")
            continue
        if (text := read(sfu.key_file, at, "the key file")) is not None:
            try:
                pairs = {key.key: SecretStr(key.secret) for key in parse_key_file(text, name)}
            except ValueError as error:
                what = f"is not a key file of LiveKit's: {error}"
                unusable(at, sfu.key_file, what, "write one `key: secret` a line, with a space behind the colon")
                continue
            sfus[name] = sfu.model_copy(update={"keys": pairs})
            for number, (key, secret) in enumerate(pairs.items(), 1):
                for half, content in (("API key", key), ("secret", secret.get_secret_value())):
                    if odd := odd_character(content):
                        unusable(at, sfu.key_file, f"{half} {number} in it has {odd} in it", ODD_REMEDY)

    def with_token(number: int, homeserver: Homeserver, key: str, file_key: str) -> Homeserver:
        """The same with a token that stands in a file of its own."""
        path: Path | None = getattr(homeserver, file_key)
        at: KeyPath = ("homeservers", number, file_key)
        if path is None:
            return homeserver
        if getattr(homeserver, key) is not None:
            both(("homeservers", number, key), file_key)
            return homeserver
        if (text := read(path, at, "the token's file")) is None:
            return homeserver
        if not (token := text.strip()):
            unusable(at, path, "is empty", "put the token into it")
            return homeserver
        if odd := odd_character(token):
            unusable(at, path, f"has {odd} in it", "put the token into it, in one line, and nothing else")
        return homeserver.model_copy(update={key: SecretStr(token)})

    def with_tokens(number: int, homeserver: Homeserver) -> Homeserver:
        """The same with the tokens of its application service, wherever they are."""
        path, at = homeserver.registration_file, ("homeservers", number, "registration_file")
        if path is None:
            homeserver = with_token(number, homeserver, "as_token", "as_token_file")
            return with_token(number, homeserver, "hs_token", "hs_token_file")
        if given := [key for key in ("as_token", "as_token_file", "hs_token", "hs_token_file") if getattr(homeserver, key) is not None]:
            for key in given:
                both(("homeservers", number, key), "registration_file")
            pruned.append(("homeservers", number))
            return homeserver
        if _is_missing(path) and not _no_credentials(path):
            if registrations_needed:
                unusable(at, path, "is not there", "make it with `sfu-delegate appservice --config FILE`, or check the path")
            return homeserver
        content = read(path, at, "the registration")
        if content is None:
            return homeserver
        try:
            registration = parse(content)
        except NotARegistration as error:
            unusable(at, path, str(error), f"mend it, or move it away and {MAKE_ONE}")
            return homeserver
        risks.extend(Problem(dotted(at), str(path), problem, remedy) for problem, remedy in judge(registration, homeserver.name))
        return homeserver.model_copy(update={"as_token": SecretStr(registration.as_token), "hs_token": SecretStr(registration.hs_token)})

    homeservers: list[Homeserver] = []
    for number, homeserver in enumerate(config.homeservers):
        homeservers.append(with_tokens(number, homeserver))
        if homeserver.ca_file is not None:
            check_certificates(homeserver.ca_file, ("homeservers", number, "ca_file"))

    if config.federation.ca_file is not None:
        check_certificates(config.federation.ca_file, ("federation", "ca_file"))

    read_in: dict[str, object] = {"admin": admin, "postgresql": postgresql, "encryption": encryption}
    return config.model_copy(update={**read_in, "sfus": sfus, "homeservers": tuple(homeservers)})
