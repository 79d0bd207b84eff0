"""What `sfu-delegate appservice` does: for which homeserver, with which tokens, and where its registration is written.

Tokens that somebody may already work with are kept, a file that is something else is never touched, and no token goes anywhere but into the file.
"""

import contextlib
import errno
import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from pydantic import SecretStr, TypeAdapter, ValidationError

from sfu_delegate.config.loading import read_text
from sfu_delegate.config.model import Config, Homeserver
from sfu_delegate.config.registration import SERVICE, NotARegistration, Registration, make, parse, scalar, speaks_for
from sfu_delegate.config.risks import is_loopback, is_placeholder
from sfu_delegate.config.values import ProxyUrl

DEFAULT_FILE: Final = "sfu-delegate-registration.yaml"

_TRIES: Final = 3  # where another run writes the same new file
_NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what file systems without hard links say


class CannotRegister(Exception):
    """No registration was written; says why, in a sentence. `usage`: what was asked for cannot be."""

    def __init__(self, sentence: str, *, usage: bool = False) -> None:
        super().__init__(sentence)
        self.usage = usage


_Action = Literal["written", "updated", "unchanged"]


@dataclass(frozen=True, slots=True)
class Registered:
    """What was done, and what is left to be done. Holds no token."""

    homeserver: str
    file: Path  # absolute
    action: _Action
    homeserver_yaml: str  # for Synapse's configuration
    config: str  # the line for the homeserver's entry in ours; "" where it is there already
    notes: tuple[str, ...]
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _File:
    """A registration that is there."""

    text: str
    registration: Registration
    status: os.stat_result


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Those that are written. No repr shows them."""

    as_token: str = field(repr=False)
    hs_token: str = field(repr=False)
    placeholders: tuple[str, ...]  # the names of those before that were none
    renewed: bool  # there were others before


class _Appeared(Exception):
    """There is a file now where none was."""


def register(
    config: Config, name: str | None = None, output: Path | None = None, proxy_url: str | None = None, *, new_tokens: bool = False
) -> Registered:
    """Write the registration for one homeserver of the configuration, unless the file says all of it already. Raises CannotRegister."""
    homeserver = _chosen(config, name)
    given = _checked(proxy_url) if proxy_url is not None else None
    path = _path_for(config, homeserver, output)
    for _ in range(1 if new_tokens else _TRIES):
        with contextlib.suppress(_Appeared):  # what another run has written is read, and its tokens are kept
            return _registered(config, homeserver, path, given, new_tokens)
    raise CannotRegister(f"{path} was not there, and is now: another run has written it, or is about to. Run this again")


def _registered(config: Config, homeserver: Homeserver, path: Path, given: str | None, new_tokens: bool) -> Registered:
    """As `register`. Raises _Appeared as well."""
    there = _read(path)
    if there is not None:
        _check_whose(config, homeserver, path, there)
    url, notes = _url_for(config, given, there)
    tokens = _tokens_for(homeserver, there, new_tokens)
    text = make(homeserver.name, tokens.as_token, tokens.hs_token, url)
    action: _Action = "written" if there is None else "updated" if text != there.text else "unchanged"
    notes += _notes_on_url(url)
    if action != "unchanged":
        notes += _write(path, text, there.status if there else None)
    if there is not None:
        notes += _notes_on_file(path, there)
    notes += _notes_on_tokens(homeserver, tokens)
    line = _config_line(homeserver, path)
    steps = _steps(homeserver, path, there, renewed=tokens.renewed, finished=action == "unchanged" and not line)
    return Registered(homeserver.name, path, action, _homeserver_yaml(path), line, tuple(notes), tuple(steps))


def _chosen(config: Config, name: str | None) -> Homeserver:
    exact = {homeserver.name: homeserver for homeserver in config.homeservers if "*" not in homeserver.name}
    why = "a pattern cannot have one: an application service belongs to one server"
    if not exact:
        raise CannotRegister(f"no entry of homeservers names a server: {why}", usage=True)
    if name is None:
        if len(exact) > 1:
            raise CannotRegister(f"there are several homeservers: choose one with --homeserver: {', '.join(exact)}", usage=True)
        return next(iter(exact.values()))
    if found := exact.get(name.lower()):
        return found
    what = f"{name!r} is no name of a server, and {why}" if "*" in name else f"{name!r} is the name of no entry of homeservers"
    raise CannotRegister(f"{what}. There are: {', '.join(exact)}", usage=True)


# ── the file ──


def _path_for(config: Config, homeserver: Homeserver, output: Path | None) -> Path:
    several = sum("*" not in other.name for other in config.homeservers) > 1
    default = f"{homeserver.name.replace(':', '_')}-registration.yaml" if several else DEFAULT_FILE
    path = Path(os.path.abspath(output or homeserver.registration_file or default))
    if not str(path).isprintable():
        raise CannotRegister("the file's path has characters that cannot be shown: name another one with --output", usage=True)
    for other in config.homeservers:
        if other.name != homeserver.name and other.registration_file is not None and _same(path, other.registration_file):
            raise CannotRegister(f"{path} is the registration for {other.name}: name another file with --output", usage=True)
    return path


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _read(path: Path) -> _File | None:
    """The registration that is there; None: no file is. Raises CannotRegister where it is something else."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CannotRegister(f"{path} cannot be read: {error.strerror}") from None
    text, problems = read_text(path, "", "it")
    if text is None:
        raise CannotRegister(f"{path} is there, and {problems[0].problem.removeprefix('it ')}; name another file with --output")
    refused = "and a file that is something else is never overwritten: name another one with --output, or move it away"
    try:
        registration = parse(text)
    except NotARegistration as error:
        raise CannotRegister(f"{path} is there, and {error}; {refused}") from None
    if registration.id not in ("", SERVICE):
        raise CannotRegister(f"{path} is the registration of another application service (its id is not {SERVICE}); {refused}")
    return _File(text, registration, status)


def _check_whose(config: Config, homeserver: Homeserver, path: Path, there: _File) -> None:
    """Raises CannotRegister where what is there is for another homeserver, to which its tokens would be lost."""
    if speaks_for(there.registration, homeserver.name):
        return
    for other in config.homeservers:
        if "*" not in other.name and speaks_for(there.registration, other.name):
            raise CannotRegister(f"{path} is the registration for {other.name}: name another file with --output")


def _write(path: Path, text: str, before: os.stat_result | None) -> list[str]:
    """Put the text into the place of what is there, or leave that as it is and raise CannotRegister. Returns notes.

    Raises _Appeared where something is there, though nothing was `before`.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if not target.parent.is_dir():
        raise CannotRegister(f"there is no directory {target.parent}: make it, or name another file with --output")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}.new")
    try:
        number = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(number, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                notes = _keep(number, before)
                os.fsync(number)
            if before is None:
                _publish(draft, target)
            else:
                os.replace(draft, target)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
    except FileExistsError:
        raise _Appeared from None
    except OSError as error:
        left = "nothing was written" if before is None else "it is as it was"
        raise CannotRegister(f"{path} cannot be written: {error.strerror}; {left}") from None
    with contextlib.suppress(OSError):  # it is written, though a power failure might still undo it
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return notes


def _publish(draft: Path, target: Path) -> None:
    """Give a finished file its name, in a place where there is none: of several who try at the same time one succeeds. Raises FileExistsError."""
    try:
        os.link(draft, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # The name is taken first. Whoever comes before the file has its content finds no registration, and leaves it alone.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            os.replace(draft, target)
        except BaseException:
            target.unlink()
            raise


def _keep(number: int, before: os.stat_result | None) -> list[str]:
    """Give an open file the owner and the mode of the one that it replaces; a new one is only its owner's."""
    if before is None:
        os.fchmod(number, 0o600)
        return []
    mode, lost = stat.S_IMODE(before.st_mode) & 0o777, ""
    try:
        os.fchown(number, before.st_uid, before.st_gid)
    except OSError:
        lost = "owner"
        try:
            os.fchown(number, -1, before.st_gid)
        except OSError:
            lost, mode = "owner and its group", mode & ~0o070
    os.fchmod(number, mode)
    return [f"The file's {lost} could not be kept: see to it that Synapse and the daemon can read it."] if lost else []


# ── what stands in it ──


def _checked(url: str) -> str:
    adapter: TypeAdapter[str] = TypeAdapter(ProxyUrl)
    try:
        return adapter.validate_python(url)
    except ValidationError as invalid:
        said = invalid.errors()[0].get("ctx", {})
        raise CannotRegister(f"--proxy-url {said.get('problem')}; {said.get('remedy')}", usage=True) from None


def _url_for(config: Config, given: str | None, there: _File | None) -> tuple[str, list[str]]:
    """Where Synapse is to forward requests: as was asked for, or as it was unless that is this machine, or to the listener."""
    before = None
    if there is not None and there.registration.proxy_url:
        with contextlib.suppress(CannotRegister):
            before = _checked(there.registration.proxy_url)
    if given is not None:
        url = given
    elif before is not None and not _is_loopback(before):
        return before, ["The proxy_url was kept; --proxy-url changes it."]
    elif config.listen.port == 0:
        raise CannotRegister(
            "the daemon listens on any free port (listen.port is 0): name the URL at which Synapse reaches it: --proxy-url", usage=True
        )
    else:
        url = f"http://{_reached(config.listen.host)}:{config.listen.port}"
    return url, [] if before in (None, url) else [f"The proxy_url was {before}, and is {url} now."]


def _reached(host: str) -> str:
    """A host to listen on, as one to connect to in a URL."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{address}]" if address.version == 6 else str(address)


def _is_loopback(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")


def _tokens_for(homeserver: Homeserver, there: _File | None, new_tokens: bool) -> _Tokens:
    """Those of the file, or else of the configuration; new ones in place of what is missing, or a placeholder, which everybody can know."""
    configured = (_value(homeserver.as_token), _value(homeserver.hs_token))
    before = configured if there is None else (there.registration.as_token, there.registration.hs_token)
    placeholders = tuple(name for name, token in zip(("as_token", "hs_token"), before, strict=True) if token and is_placeholder(token))
    as_token, hs_token = (token if token and not new_tokens and not is_placeholder(token) else secrets.token_hex(32) for token in before)
    return _Tokens(as_token, hs_token, placeholders, renewed=bool(placeholders) or (new_tokens and before != (None, None)))


def _value(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


# ── what is told ──


def _notes_on_url(url: str) -> Iterator[str]:
    if _is_loopback(url):
        yield (
            f"Synapse will reach the daemon at {url}, so it must run on the same machine, and in no container with a network of its own. Otherwise "
            "run this again with --proxy-url, and the daemon's address as Synapse sees it."
        )
    elif url.lower().startswith("http://"):
        yield f"Requests of users, and the hs_token, go to {url} unencrypted: fine in a network that is yours alone; otherwise https."


def _notes_on_file(path: Path, there: _File) -> Iterator[str]:
    if foreign := [key for key in there.registration.foreign_keys if re.fullmatch(r"[A-Za-z_][\w.-]{0,60}", key)]:
        yield f"These keys stood in the file, and do not any more: {', '.join(foreign)}."
    if there.status.st_mode & stat.S_IROTH:
        yield f"Every user of this machine may read the tokens: chmod o= {path}"


def _notes_on_tokens(homeserver: Homeserver, tokens: _Tokens) -> Iterator[str]:
    as_token, hs_token = tokens.as_token, tokens.hs_token
    if tokens.placeholders:
        were = "were placeholders, and are new ones now" if len(tokens.placeholders) > 1 else "was a placeholder, and is a new one now"
        yield f"The {' and the '.join(tokens.placeholders)} that stood there {were}."
    if tokens.renewed:
        yield (
            "Tokens are new, so keep to the order below. While Synapse and the daemon have different ones, the daemon cannot act at this homeserver, "
            "and clients get 401 M_UNKNOWN_TOKEN through it, which they may take for the end of their session."
        )
    elif (_value(homeserver.as_token) or as_token, _value(homeserver.hs_token) or hs_token) != (as_token, hs_token):
        yield "The tokens in the file were kept; they are others than those in the daemon's configuration."
    if inline := _given_keys(homeserver):
        yield f"Take {' and '.join(inline)} out of the entry of {homeserver.name}: registration_file takes their place."


def _given_keys(homeserver: Homeserver) -> list[str]:
    """The keys that the tokens come from, other than registration_file."""
    keys = ((homeserver.token_key, homeserver.as_token), (homeserver.hs_token_key, homeserver.hs_token))
    return [key for key, token in keys if token is not None and key != "registration_file"]


def _homeserver_yaml(path: Path) -> str:
    return f"""\
app_service_config_files:
  - {scalar(str(path))}
experimental_features:
  msc4512_enabled: true
  msc4502_enabled: true
max_event_delay_duration: 24h
"""


def _config_line(homeserver: Homeserver, path: Path) -> str:
    if homeserver.registration_file is not None and _same(path, homeserver.registration_file):
        return ""
    return f"registration_file: {scalar(str(path))}\n"


def _steps(homeserver: Homeserver, path: Path, there: _File | None, *, renewed: bool, finished: bool) -> Iterator[str]:
    """What is left to be done; `finished`: nothing but to see whether it works."""
    if there is None or not there.status.st_mode & stat.S_IRGRP:
        yield (
            f"Let Synapse's user and the daemon's read {path}, and nobody else. Where they have their usual names: "
            f"chown matrix-synapse:sfu-delegate {path}; chmod 0440 {path}"
        )
    if _config_line(homeserver, path):
        yield "Put the line for the daemon into its configuration; `sfu-delegate check-config` tells whether all is well."
    unless = "" if there is None else ", unless they are there"
    synapse = f"Put the keys for Synapse into its configuration{unless}, and restart it, with all of its workers."
    if renewed:
        yield "Stop the daemon, wherever there is an instance: systemctl stop sfu-delegate"
        yield synapse
        yield "Start the daemon: systemctl start sfu-delegate"
    elif not finished:
        yield synapse
        yield "Start the daemon, or reload it: systemctl reload sfu-delegate"
    yield (
        f"Look into the daemon's log: application_service_works for {homeserver.name} means that all is well; application_service_failed says what "
        "is not."
    )
