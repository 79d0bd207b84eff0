"""Encrypts what clients entrust to the daemon (scoped tokens), and derives the management tokens of delegations.

A key, a token or a plaintext must never appear in an exception, a log line or a repr; and nothing here may make up a new key where one is
already kept, since what was sealed with the old one would be lost.
"""

import base64
import binascii
import contextlib
import hmac
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_KEY_FILE_HEADER = """\
# Encrypts the tokens in the database beside it, and signs management tokens. Keep it with the database, and readable to the daemon alone.
# One key a line: the first encrypts, all decrypt. To change it, put a new line on top, and remove the old one when the last delegation of
# its time is over.
"""
_MANAGEMENT = b"sfu-delegate: management token, version 1"
_FINGERPRINT = b"sfu-delegate: fingerprint, version 1"


class CannotUnseal(Exception):
    """Sealed data cannot be opened: none of the keys sealed it, or it is damaged."""


class KeyFileRefused(Exception):
    """A key file cannot be used; the text says why, and what to do."""


class Sealer:
    """Seals and unseals with a list of Fernet keys: the first one seals, all of them unseal.

    Raises ValueError when there is no key, or one is not 32 bytes in base64url; the text names its position, never the key.
    """

    __slots__ = ("_fernet", "_management_keys", "fingerprints")

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ValueError("at least one encryption key is needed")
        fernets: list[Fernet] = []
        management: list[bytes] = []
        fingerprints: list[str] = []
        for number, key in enumerate(keys, 1):
            raw = key_bytes(key)
            if raw is None:
                raise ValueError(f"encryption key {number} is not a Fernet key (32 bytes in base64url)")
            fernets.append(Fernet(base64.urlsafe_b64encode(raw)))
            management.append(HKDF(algorithm=SHA256(), length=32, salt=None, info=_MANAGEMENT).derive(raw))
            fingerprints.append(HKDF(algorithm=SHA256(), length=8, salt=None, info=_FINGERPRINT).derive(raw).hex())
        self._fernet = MultiFernet(fernets)
        self._management_keys = tuple(management)
        self.fingerprints = tuple(fingerprints)  # by which keys can be told apart, and nothing else can be done

    def __repr__(self) -> str:
        return f"Sealer({len(self._management_keys)} keys)"

    def seal(self, text: str) -> bytes:
        """Encrypt and authenticate a text with the first key."""
        return self._fernet.encrypt(text.encode())

    def unseal(self, sealed: bytes) -> str:
        """The text again. Raises CannotUnseal."""
        try:
            return self._fernet.decrypt(sealed).decode()
        except (InvalidToken, UnicodeDecodeError):
            raise CannotUnseal("none of the encryption keys opens this: its key was removed or is another database's, or it is damaged") from None

    def reseal(self, sealed: bytes) -> bytes:
        """The same text, sealed with the first key, so that an old key can be retired. Raises CannotUnseal."""
        try:
            return self._fernet.rotate(sealed)
        except InvalidToken:
            raise CannotUnseal("none of the encryption keys opens this, so it cannot be sealed anew") from None

    def management_token(self, delegation: str) -> str:
        """The token that allows its holder to see and withdraw this one delegation: derived, so that nothing has to be stored."""
        return _management_token(self._management_keys[0], delegation)

    def check_management_token(self, delegation: str, token: str) -> bool:
        """Is this the delegation's management token, of any of the keys? Takes the same time for every wrong token of a length."""
        given = token.encode("utf-8", "surrogatepass")
        right = False
        for key in self._management_keys:
            right |= hmac.compare_digest(_management_token(key, delegation).encode(), given)
        return right


def _management_token(key: bytes, delegation: str) -> str:
    digest = hmac.digest(key, delegation.encode("utf-8", "surrogatepass"), "sha256")
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def key_bytes(key: str) -> bytes | None:
    """The 32 bytes of a Fernet key, or None when it is not one."""
    try:
        raw = base64.b64decode(key.strip().encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if len(raw) == 32 else None


def new_key() -> str:
    """A fresh Fernet key, as text."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


def parse_keys(text: str) -> tuple[str, ...]:
    """The keys of a key file: one a line, without empty lines and `#` comments."""
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))


def load_or_create(path: Path) -> tuple[str, ...]:
    """The keys in a key file, which is created with one fresh key (mode 0600) where there is none.

    The file appears as a whole or not at all, and never replaces another: two processes that start at once end up with the same key.
    Raises KeyFileRefused when others may read it, when it cannot be read or written, or when it holds no valid key.
    """
    try:
        if not path.exists():
            _create(path)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(64 * 1024)
    except OSError as error:
        if not os.path.isdir(path.parent):
            raise KeyFileRefused(f"there is no directory {path.parent} for the database and its key: create it, writable for the daemon") from None
        raise KeyFileRefused(f"the key file {path} cannot be read or created: {error.strerror or type(error).__name__}") from None
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise KeyFileRefused(f"the key file {path} is open to others (mode {mode:04o}): chmod 600 it; if others may have read it, replace the key")
    keys = parse_keys(content.decode("ascii", "replace"))
    if not keys:
        raise KeyFileRefused(f"the key file {path} holds no key: restore it from your backup, or remove it if the database holds no tokens")
    for number, key in enumerate(keys, 1):
        if key_bytes(key) is None:
            raise KeyFileRefused(f"key {number} in the key file {path} is not a Fernet key: restore it from your backup")
    return keys


def _create(path: Path) -> None:
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.fchmod(file, 0o600)
            os.write(file, f"{_KEY_FILE_HEADER}{new_key()}\n".encode())
            os.fsync(file)
        finally:
            os.close(file)
        # A link never replaces what is there, a rename would; another process was faster when it fails.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
