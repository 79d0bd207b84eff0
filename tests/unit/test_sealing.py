"""Sealed tokens can be opened with any of the keys and with nothing else; management tokens outlive a change of key."""

import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.sealing import CannotUnseal, KeyFileRefused, Sealer, key_bytes, load_or_create, new_key, parse_keys

OLD, NEW = new_key(), new_key()


@given(st.text())
def test_sealed_text_comes_back(text: str) -> None:
    """What was sealed is opened again, letter by letter."""
    sealer = Sealer([OLD])
    assert sealer.unseal(sealer.seal(text)) == text


def test_sealing_hides_the_text() -> None:
    """The sealed form does not contain the text, and differs each time."""
    sealer = Sealer([OLD])
    assert b"scoped" not in sealer.seal("scoped")
    assert sealer.seal("scoped") != sealer.seal("scoped")


def test_after_a_key_change_old_data_opens() -> None:
    """With a new key in front, what the old one sealed still opens, and resealing makes the old key needless."""
    sealed = Sealer([OLD]).seal("token")
    both = Sealer([NEW, OLD])
    assert both.unseal(sealed) == "token"
    assert Sealer([NEW]).unseal(both.reseal(sealed)) == "token"
    assert Sealer([NEW]).unseal(both.seal("token")) == "token"


def test_keys_are_told_apart_by_their_fingerprints() -> None:
    """In the order of the keys, and however the same key is written; of a key nothing can be seen in them."""
    old, new = Sealer([OLD]).fingerprints, Sealer([NEW]).fingerprints
    assert Sealer([NEW, OLD]).fingerprints == new + old
    assert old != new
    assert Sealer([OLD.rstrip() + "\n"]).fingerprints == old
    assert len(old[0]) == 16
    assert old[0] not in (key_bytes(OLD) or b"").hex()


@pytest.mark.parametrize(
    "sealed",
    [b"", b"nonsense", b"\xff\x00", Sealer([NEW]).seal("token"), Sealer([OLD]).seal("token")[:-1]],
    ids=["empty", "nonsense", "bytes", "another_key", "cut"],
)
def test_what_no_key_sealed_cannot_be_opened(sealed: bytes) -> None:
    """Foreign or damaged data raises one clear error, without the data in it."""
    with pytest.raises(CannotUnseal, match="none of the encryption keys opens this") as caught:
        Sealer([OLD]).unseal(sealed)
    assert caught.value.__suppress_context__
    with pytest.raises(CannotUnseal):
        Sealer([OLD]).reseal(sealed)


def test_bad_keys_are_named_by_position() -> None:
    """A bad key is refused by its place in the list, and its text is not repeated."""
    with pytest.raises(ValueError, match="encryption key 2 is not") as caught:
        Sealer([OLD, "hunter2hunter2"])
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="at least one"):
        Sealer([])


def test_repr_shows_no_key() -> None:
    """The repr says how many keys there are, and nothing else."""
    assert repr(Sealer([OLD, NEW])) == "Sealer(2 keys)"


def test_management_tokens_are_stable_and_personal() -> None:
    """A delegation's token is always the same, and opens no other delegation."""
    sealer = Sealer([OLD])
    token = sealer.management_token("one")
    assert token == Sealer([OLD]).management_token("one")
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)
    assert sealer.check_management_token("one", token)
    assert not sealer.check_management_token("two", token)


def test_management_tokens_survive_a_key_change() -> None:
    """A token of the old key is accepted as long as that key is in the list, and no longer."""
    token = Sealer([OLD]).management_token("one")
    assert Sealer([NEW, OLD]).check_management_token("one", token)
    assert not Sealer([NEW]).check_management_token("one", token)


@given(st.text(alphabet=st.characters()), st.text())
def test_guessed_management_tokens_are_refused(delegation: str, guess: str) -> None:
    """Whatever is guessed is refused without an error, also what is no ASCII."""
    assert not Sealer([OLD]).check_management_token(delegation, guess)


def test_a_missing_key_file_is_created_for_the_owner_alone(tmp_path: Path) -> None:
    """The first start creates a key file with mode 0600, the next one reads the same key, and nothing else is left behind."""
    path = tmp_path / "delegate.db.key"
    before = os.umask(0)
    try:
        keys = load_or_create(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(keys) == 1
    assert load_or_create(path) == keys
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    """However many create the key file at the same time, all get the same key."""
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(lambda _: load_or_create(tmp_path / "key"), range(32)))
    assert len(results) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_an_open_key_file_is_refused(tmp_path: Path, mode: int) -> None:
    """A key file that others may read is refused, with the remedy."""
    path = tmp_path / "key"
    load_or_create(path)
    path.chmod(mode)
    with pytest.raises(KeyFileRefused, match="chmod 600"):
        load_or_create(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "holds no key"), (b"# only a comment\n", "holds no key"), (b"hunter2\n", "key 1"), (b"\xff\xfe\n", "key 1")],
)
def test_a_spoilt_key_file_is_refused_and_left_alone(tmp_path: Path, content: bytes, problem: str) -> None:
    """A key file without a valid key is never overwritten, and its content is not repeated."""
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileRefused, match=problem) as caught:
        load_or_create(path)
    assert "hunter2" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_key_file_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    """Where the directory is missing, the error names the file and the reason."""
    with pytest.raises(KeyFileRefused, match=r"there is no directory .*: create it"):
        load_or_create(tmp_path / "missing" / "key")


def test_key_files_may_have_comments_and_several_keys() -> None:
    """Empty lines and comments do not count, and the order is kept."""
    assert parse_keys(f"# new\n{NEW}\n\n  # old\n  {OLD}  \n") == (NEW, OLD)


def test_only_32_bytes_are_a_key() -> None:
    """A key is 32 bytes in base64url; anything else is none."""
    assert key_bytes(OLD) is not None
    for wrong in ("", "abc", OLD[:-4], OLD + "AAAA", "ä" * 44, "*" * 44):
        assert key_bytes(wrong) is None
