"""What was configured by LIVEKIT_… variables is taken over, what cannot be is said, and no secret is shown."""

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sfu_delegate.config import Config, ConfigInvalid, Problem, load
from sfu_delegate.config.import_env import Imported, import_env, parse_env_file, read_env_file
from typer.testing import CliRunner

SECRET = "hunter2-hunter2-hunter2-hunter2-hunter2"
NEEDED = {"LIVEKIT_URL": "wss://sfu.example.org", "LIVEKIT_KEY": "APIone", "LIVEKIT_SECRET": SECRET}
SERVED = NEEDED | {"LIVEKIT_FULL_ACCESS_HOMESERVERS": "example.org"}


def loaded(imported: Imported, tmp_path: Path) -> Config:
    """The printed text as the daemon would read it."""
    path = tmp_path / "delegate.yaml"
    path.write_text(imported.text)
    path.chmod(0o600)
    return load(path)


def problems_of(environ: dict[str, str], **options: Any) -> dict[str, Problem]:
    """The problems by variable."""
    with pytest.raises(ConfigInvalid) as caught:
        import_env(environ, **options)
    assert "hunter2" not in str(caught.value)
    return {problem.key: problem for problem in caught.value.problems}


def comments(imported: Imported) -> str:
    return " ".join(line.strip(" #-") for line in imported.text.splitlines() if line.lstrip().startswith("#"))


# ── variables and keys ──


def test_every_variable_becomes_its_key(tmp_path: Path) -> None:
    """A whole deployment is taken over, and loads."""
    config = loaded(
        import_env(
            NEEDED
            | {
                "LIVEKIT_JWT_BIND": "192.0.2.7:8090",
                "LIVEKIT_FULL_ACCESS_HOMESERVERS": "*.example.org, Example.org,b.org",
                "LIVEKIT_CS_API_URL_OVERRIDES": "example.org=https://matrix.example.org,a.example.org=https://a.example.org:8448",
                "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "30",
                "LIVEKIT_LOG_LEVEL": "WARN",
            }
        ),
        tmp_path,
    )
    [(name, sfu)] = config.sfus.items()
    assert (name, sfu.url, {key: secret.get_secret_value() for key, secret in sfu.keys.items()}) == (
        "main",
        NEEDED["LIVEKIT_URL"],
        {"APIone": SECRET},
    )
    assert (config.listen.host, config.listen.port) == ("192.0.2.7", 8090)
    assert [(homeserver.name, homeserver.url) for homeserver in config.homeservers] == [
        ("example.org", "https://matrix.example.org"),
        ("b.org", None),
        ("a.example.org", "https://a.example.org:8448"),
        ("*.example.org", None),
    ]
    assert config.presence.interval == 30.0
    assert config.log.level == "warning"
    assert config.federation.verify_tls is True


@pytest.mark.parametrize(
    ("variables", "host", "port"),
    [
        ({}, "127.0.0.1", 8080),
        ({"LIVEKIT_JWT_BIND": ":8090"}, "0.0.0.0", 8090),
        ({"LIVEKIT_JWT_BIND": "[::1]:8090"}, "::1", 8090),
        ({"LIVEKIT_JWT_BIND": "localhost:8090"}, "localhost", 8090),
        ({"LIVEKIT_JWT_PORT": "8090"}, "0.0.0.0", 8090),
        ({"LIVEKIT_JWT_PORT": "8090", "LIVEKIT_JWT_BIND": "127.0.0.1:8090"}, "127.0.0.1", 8090),
        ({"LIVEKIT_JWT_PORT": "tcp://10.0.0.1:9999"}, "127.0.0.1", 8080),
    ],
)
def test_the_address_to_listen_on(variables: dict[str, str], host: str, port: int, tmp_path: Path) -> None:
    """All forms of an address are understood, and what Kubernetes puts into a variable of the same name is not one."""
    listen = loaded(import_env(SERVED | variables), tmp_path).listen
    assert (listen.host, listen.port) == (host, port)


def test_the_listener_for_operators_makes_room(tmp_path: Path) -> None:
    """Where the service listened on the port that is ours for operators, the two do not meet."""
    config = loaded(import_env(SERVED | {"LIVEKIT_JWT_BIND": ":8081"}), tmp_path)
    assert (config.listen.port, config.admin.port) == (8081, 8082)


def test_all_homeservers_are_the_default(tmp_path: Path) -> None:
    """Without a list everybody's users are served, as they were, and a comment and a risk say so."""
    imported = import_env(NEEDED)
    assert [homeserver.name for homeserver in loaded(imported, tmp_path).homeservers] == ["*"]
    assert "LIVEKIT_FULL_ACCESS_HOMESERVERS is not set" in comments(imported)
    assert "homeservers[0].name" in {risk.key for risk in imported.risks}


def test_exact_names_come_before_patterns(tmp_path: Path) -> None:
    """The entry that gives the most of a name counts, and the file has them in that order."""
    config = loaded(import_env(NEEDED | {"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*,*.example.org,a.org,*.b.example.org,a.org"}), tmp_path)
    assert [homeserver.name for homeserver in config.homeservers] == ["a.org", "*.b.example.org", "*.example.org", "*"]


def test_an_override_of_a_server_that_is_not_served_is_left_out(tmp_path: Path) -> None:
    """Its users cannot delegate, so its URL is of no use: a comment and a note say it."""
    imported = import_env(SERVED | {"LIVEKIT_CS_API_URL_OVERRIDES": "other.org=https://other.org"})
    assert [homeserver.name for homeserver in loaded(imported, tmp_path).homeservers] == ["example.org"]
    assert "also names other.org" in comments(imported)
    assert [note for note in imported.notes if "other.org" in note]


@pytest.mark.parametrize(
    ("value", "verified", "noted"),
    [
        ("", True, False),
        ("0", True, False),
        ("No", True, False),
        ("1", True, True),
        ("true", True, True),
        ("yes_i_know_what_i_am_doing", True, True),
        ("YES_I_KNOW_WHAT_I_AM_DOING", False, False),
    ],
)
def test_certificates_are_checked_unless_that_was_switched_off(value: str, verified: bool, noted: bool, tmp_path: Path) -> None:
    """Only the one value that switched the check off does so here, with a comment and a risk; another one is told to have had no effect."""
    imported = import_env(SERVED | {"LIVEKIT_INSECURE_SKIP_VERIFY_TLS": value})
    assert loaded(imported, tmp_path).federation.verify_tls is verified
    assert ("For test networks only" in comments(imported)) is not verified
    assert ("federation.verify_tls" in {risk.key for risk in imported.risks}) is not verified
    assert any("was set, but not to YES_I_KNOW_WHAT_I_AM_DOING" in note for note in imported.notes) is noted


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("LIVEKIT_REQUIRE_MEMBERSHIP", "true", "is in the Matrix room was checked, and here it is not"),
        ("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "b.org", "may publish was limited, and here it is not"),
    ],
)
def test_a_protection_that_ends_is_a_risk(variable: str, value: str, said: str) -> None:
    """Where that service kept somebody out, and nothing here does, a warning and a comment say so, and not only that it was left out."""
    imported = import_env(SERVED | {variable: value})
    [risk] = [risk for risk in imported.risks if risk.key == variable]
    assert said in risk.problem
    assert said in comments(imported)
    assert not [note for note in imported.notes if variable in note]
    assert variable not in {risk.key for risk in import_env(SERVED | {variable: "false"}).risks}


def test_a_list_of_homeservers_under_another_name_is_not_lost() -> None:
    """It does not become everybody; beside the name that is known, it is left out as other variables are."""
    older = {"LIVEKIT_LOCAL_HOMESERVERS": "example.org"}
    [(variable, problem)] = problems_of(NEEDED | older).items()
    assert variable == "LIVEKIT_LOCAL_HOMESERVERS"
    assert "everybody" in problem.problem
    assert "LIVEKIT_FULL_ACCESS_HOMESERVERS" in problem.remedy
    assert [note for note in import_env(SERVED | older).notes if note.startswith("LIVEKIT_LOCAL_HOMESERVERS has no counterpart")]
    unreadable = Problem("LIVEKIT_FULL_ACCESS_HOMESERVERS", "", "is broken", "mend it")
    assert set(problems_of(NEEDED | older, before=[unreadable])) == {"LIVEKIT_FULL_ACCESS_HOMESERVERS"}


def test_looks_cannot_be_switched_off(tmp_path: Path) -> None:
    """An interval of 0 leaves ours as it is, and says so."""
    imported = import_env(SERVED | {"LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "0"})
    assert loaded(imported, tmp_path).presence.interval == 60.0
    assert [note for note in imported.notes if "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS is 0" in note]


def test_what_has_no_counterpart_is_said() -> None:
    """In the file and beside it, by the name and without the value, which may have a password in it."""
    imported = import_env(SERVED | {"LIVEKIT_REDIS_URL": f"redis://:{SECRET}x@redis", "LIVEKIT_NEW_THING": f"{SECRET}x", "OTHER": "x"})
    for name in ("LIVEKIT_REDIS_URL", "LIVEKIT_NEW_THING"):
        assert name in comments(imported)
        assert [note for note in imported.notes if note.startswith(name)]
    assert f"{SECRET}x" not in imported.text + str(imported.notes)
    assert "OTHER" not in imported.text


def test_kubernetes_words_for_a_service_are_skipped() -> None:
    """They are in every container of a namespace with a service named livekit, and nobody set them."""
    words = {"LIVEKIT_SERVICE_HOST": "10.0.0.1", "LIVEKIT_PORT": "tcp://10.0.0.1:7880", "LIVEKIT_PORT_7880_TCP_ADDR": "10.0.0.1"}
    assert import_env(SERVED | words) == import_env(SERVED)


# ── secrets ──


def test_a_secret_in_the_text_comes_with_the_advice_to_guard_it() -> None:
    """Who keeps the text keeps a secret, and is told; a repr does not have it."""
    imported = import_env(SERVED)
    assert "mode 0640" in comments(imported)
    assert SECRET not in repr(imported)


@pytest.mark.parametrize("secret", [SECRET, "0123456789", "a:b#c", "'\"{[&*!|>%@`", "ключ", "\U0001f511", "null", "2026-01-01"])
def test_a_key_file_keeps_the_secret_out_of_the_text(secret: str, tmp_path: Path) -> None:
    """The file is LiveKit's own kind, for its owner alone, and gives the same secret, whatever characters it has."""
    path = tmp_path / "keys.yaml"
    imported = import_env(SERVED | {"LIVEKIT_SECRET": secret}, key_file=path)
    assert imported.written == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in imported.text
    assert "APIone" not in imported.text
    config = loaded(imported, tmp_path)
    assert {key: value.get_secret_value() for key, value in config.sfus["main"].keys.items()} == {"APIone": secret}


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    """Neither a file nor a link that leads nowhere; it is said before anything is done, beside all other problems."""
    path, link = tmp_path / "keys.yaml", tmp_path / "link"
    path.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    for taken in (path, link):
        found = problems_of(SERVED | {"LIVEKIT_LOG_LEVEL": "loud"}, key_file=taken)
        assert set(found) == {"--key-file", "LIVEKIT_LOG_LEVEL"}
        assert "never overwritten" in found["--key-file"].problem
    assert path.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert "not there" in problems_of(SERVED, key_file=tmp_path / "no" / "keys.yaml")["--key-file"].problem


def test_nothing_is_written_when_a_variable_cannot_be_used(tmp_path: Path) -> None:
    """A failed import leaves no file with a secret behind."""
    problems_of(SERVED | {"LIVEKIT_URL": "ftp://x"}, key_file=tmp_path / "keys.yaml")
    assert list(tmp_path.iterdir()) == []


def test_key_and_secret_come_from_files(tmp_path: Path) -> None:
    """The two can be in files of their own, and the newline at their end does not count."""
    (tmp_path / "key").write_text("APItwo\n")
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    environ = {name: value for name, value in SERVED.items() if name not in ("LIVEKIT_KEY", "LIVEKIT_SECRET")}
    environ |= {"LIVEKIT_KEY_FROM_FILE": str(tmp_path / "key"), "LIVEKIT_SECRET_FROM_FILE": str(tmp_path / "secret")}
    keys = loaded(import_env(environ), tmp_path).sfus["main"].keys
    assert {key: secret.get_secret_value() for key, secret in keys.items()} == {"APItwo": SECRET}


def test_a_file_with_more_than_a_secret_is_refused(tmp_path: Path) -> None:
    """Two lines, or a key file in place of a file with the secret alone: each is said of the variable that names the file."""
    for name, content in (("key", f"API\u200btwo{SECRET}"), ("secret", f"APItwo: {SECRET}\n"), ("keys", f"APItwo: {SECRET} {SECRET}\n")):
        (tmp_path / name).write_text(content)
    environ = {name: value for name, value in SERVED.items() if name not in ("LIVEKIT_KEY", "LIVEKIT_SECRET")}
    pair = {"LIVEKIT_KEY_FROM_FILE": str(tmp_path / "key"), "LIVEKIT_SECRET_FROM_FILE": str(tmp_path / "secret")}
    assert {key: problem.problem for key, problem in problems_of(environ | pair).items()} == {
        "LIVEKIT_KEY_FROM_FILE": "names a file with a character that cannot be seen in it",
        "LIVEKIT_SECRET_FROM_FILE": "names a file with a space in it",
    }
    [(key, problem)] = problems_of(environ | {"LIVEKIT_KEY_FILE": str(tmp_path / "keys")}).items()
    assert (key, problem.problem) == ("LIVEKIT_KEY_FILE", "secret 1 in it has a space in it")


def test_no_file_can_make_it_wait(tmp_path: Path) -> None:
    """A named pipe, into which nobody may ever write, is refused and not opened."""
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    environ = {name: value for name, value in SERVED.items() if name not in ("LIVEKIT_KEY", "LIVEKIT_SECRET")}
    for variables in ({"LIVEKIT_KEY_FROM_FILE": pipe, "LIVEKIT_SECRET_FROM_FILE": pipe}, {"LIVEKIT_KEY_FILE": pipe}):
        found = problems_of(environ | variables)
        assert set(found) == set(variables)
        assert all("it is a pipe" in problem.problem for problem in found.values())
    with pytest.raises(ConfigInvalid, match="it is a pipe"):
        read_env_file(Path(pipe))


def test_a_key_file_that_is_there_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named by its whole path, no secret is in the text, and no second file is made."""
    (tmp_path / "keys.yaml").write_text(f"APItwo: {SECRET}\n")
    monkeypatch.chdir(tmp_path)
    environ = {"LIVEKIT_URL": "wss://sfu.example.org", "LIVEKIT_FULL_ACCESS_HOMESERVERS": "example.org", "LIVEKIT_KEY_FILE": "keys.yaml"}
    imported = import_env(environ, key_file=tmp_path / "new.yaml")
    assert imported.written is None
    assert [note for note in imported.notes if "nothing was written" in note]
    assert not (tmp_path / "new.yaml").exists()
    assert SECRET not in imported.text
    assert "mode 0640" not in imported.text
    config = loaded(imported, tmp_path)
    assert config.sfus["main"].key_file == tmp_path / "keys.yaml"
    assert list(config.sfus["main"].keys) == ["APItwo"]


# ── problems ──


@pytest.mark.parametrize(
    ("name", "shown"),
    [("/run/secrets/livekit.key", True), ("./keys", True), (SECRET, False), (SECRET[:20], False), ("/3f9Kq+x/Zm==", False), (f"/{SECRET}x", False)],
)
def test_a_file_that_cannot_be_read_is_named(name: str, shown: bool) -> None:
    """A path, perhaps that of a container, is shown; what may be a secret in its place is not."""
    for variable in ("LIVEKIT_KEY_FILE", "LIVEKIT_SECRET_FROM_FILE"):
        rest = {"LIVEKIT_KEY": "" if variable == "LIVEKIT_KEY_FILE" else "APIone", "LIVEKIT_SECRET": "", variable: name}
        [problem] = problems_of(SERVED | rest).values()
        assert "cannot be read: No such file" in problem.problem
        assert problem.value == (name if shown else "(hidden)")


def test_a_bad_override_is_told_by_its_place() -> None:
    """Which one of many it is: its number, and its server where it names one."""
    given = {"LIVEKIT_CS_API_URL_OVERRIDES": f"example.org=https://a.example.org, b.org=https://u:{SECRET}@b.org, {SECRET}=x"}
    with pytest.raises(ConfigInvalid) as caught:
        import_env(SERVED | given)
    assert [problem.problem.partition(", that")[0] for problem in caught.value.problems] == [
        "has an item, number 2 (of b.org)",
        "has an item, number 3",
    ]
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "variable", "said"),
    [
        ({"LIVEKIT_URL": ""}, "LIVEKIT_URL", "is required"),
        ({"LIVEKIT_URL": "sfu.example.org"}, "LIVEKIT_URL", "is not a URL"),
        ({"LIVEKIT_KEY": ""}, "LIVEKIT_KEY", "is required"),
        ({"LIVEKIT_SECRET": ""}, "LIVEKIT_SECRET", "is required"),
        ({"LIVEKIT_SECRET_FROM_FILE": __file__}, "LIVEKIT_SECRET_FROM_FILE", "LIVEKIT_SECRET as well"),
        ({"LIVEKIT_SECRET": "", "LIVEKIT_SECRET_FROM_FILE": SECRET}, "LIVEKIT_SECRET_FROM_FILE", "cannot be read"),
        ({"LIVEKIT_SECRET": "", "LIVEKIT_SECRET_FROM_FILE": "/dev/null"}, "LIVEKIT_SECRET_FROM_FILE", "is an empty file"),
        ({"LIVEKIT_SECRET": "", "LIVEKIT_SECRET_FROM_FILE": "/dev/zero"}, "LIVEKIT_SECRET_FROM_FILE", "it is a device"),
        ({"LIVEKIT_SECRET": f"{SECRET}\n{SECRET}"}, "LIVEKIT_SECRET", "has a line break in it"),
        ({"LIVEKIT_SECRET": f"{SECRET} # mine"}, "LIVEKIT_SECRET", "has a space in it"),
        ({"LIVEKIT_KEY": f"{SECRET}\x00"}, "LIVEKIT_KEY", "has a control character in it"),
        ({"LIVEKIT_KEY_FILE": __file__}, "LIVEKIT_KEY_FILE", "as well"),
        ({"LIVEKIT_KEY": "", "LIVEKIT_SECRET": "", "LIVEKIT_KEY_FILE": SECRET}, "LIVEKIT_KEY_FILE", "cannot be read"),
        ({"LIVEKIT_JWT_BIND": "127.0.0.1"}, "LIVEKIT_JWT_BIND", "names no port"),
        ({"LIVEKIT_JWT_BIND": "a b:80"}, "LIVEKIT_JWT_BIND", "is not an address"),
        ({"LIVEKIT_JWT_PORT": "70000"}, "LIVEKIT_JWT_PORT", "names no port"),
        ({"LIVEKIT_JWT_PORT": "1", "LIVEKIT_JWT_BIND": ":2"}, "LIVEKIT_JWT_PORT", "another port"),
        ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": ", ,"}, "LIVEKIT_FULL_ACCESS_HOMESERVERS", "without anything"),
        ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "a.*.org"}, "LIVEKIT_FULL_ACCESS_HOMESERVERS", "is not a server name"),
        ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "https://a.org"}, "LIVEKIT_FULL_ACCESS_HOMESERVERS", "is a URL"),
        ({"LIVEKIT_CS_API_URL_OVERRIDES": "a.org"}, "LIVEKIT_CS_API_URL_OVERRIDES", "not the name of a server, = and its URL"),
        ({"LIVEKIT_CS_API_URL_OVERRIDES": "example.org=x"}, "LIVEKIT_CS_API_URL_OVERRIDES", "not the name of a server, = and its URL"),
        ({"LIVEKIT_CS_API_URL_OVERRIDES": f"example.org=https://u:{SECRET}@x"}, "LIVEKIT_CS_API_URL_OVERRIDES", "not the name of a server, ="),
        ({"LIVEKIT_CS_API_URL_OVERRIDES": "a.org=https://b,a.org=https://c"}, "LIVEKIT_CS_API_URL_OVERRIDES", "has two URLs for a.org"),
        ({"LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "1m"}, "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "not a number of seconds"),
        ({"LIVEKIT_LOG_LEVEL": "loud"}, "LIVEKIT_LOG_LEVEL", "not a level"),
    ],
)
def test_each_mistake_is_named_by_its_variable(variables: dict[str, str], variable: str, said: str) -> None:
    """One mistake is one problem, with the variable and a remedy, and without a secret, wherever it was put."""
    found = problems_of(SERVED | variables)
    assert list(found) == [variable]
    assert said in found[variable].problem
    assert found[variable].remedy


def test_all_problems_are_said_at_once() -> None:
    """Those of single variables, of two together, and of what is missing."""
    found = problems_of({"LIVEKIT_KEY": "a", "LIVEKIT_KEY_FROM_FILE": __file__, "LIVEKIT_JWT_BIND": "x", "LIVEKIT_FULL_ACCESS_HOMESERVERS": "!"})
    assert set(found) == {"LIVEKIT_URL", "LIVEKIT_SECRET", "LIVEKIT_KEY_FROM_FILE", "LIVEKIT_JWT_BIND", "LIVEKIT_FULL_ACCESS_HOMESERVERS"}


def test_without_any_variable_the_remedy_is_an_env_file() -> None:
    """Run in the wrong place, it says where to run it, and nothing about each variable."""
    [problem] = problems_of({"PATH": "/bin"}).values()
    assert "--env-file FILE, with lines such as LIVEKIT_URL=" in problem.remedy


# ── env files ──


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("LIVEKIT_X=a b", "a b"),
        ("  export LIVEKIT_X = a", None),
        ("export  LIVEKIT_X=a", "a"),
        ("LIVEKIT_X=", ""),
        ("LIVEKIT_X=a # comment", "a"),
        ("LIVEKIT_X=a#b", "a#b"),
        ("LIVEKIT_X=# comment", ""),
        ("LIVEKIT_X='a # b'", "a # b"),
        (r"LIVEKIT_X='a\n'", r"a\n"),
        (r'LIVEKIT_X="a\"b\\c\td\q"', 'a"b\\c\td\\q'),
        ('LIVEKIT_X="a" # comment', "a"),
        ("LIVEKIT_X=a=b", "a=b"),
        ("LIVEKIT_X='${A}'", "${A}"),
        (r'LIVEKIT_X="\${A}"', "${A}"),
        ("LIVEKIT_X=${A}", None),
        ('LIVEKIT_X="${A}"', None),
        ("LIVEKIT_X='a", None),
        ('LIVEKIT_X="a', None),
        ('LIVEKIT_X="a"b', None),
        ("LIVEKIT_X: a", None),
        ("LIVEKIT_X", None),
        ("- LIVEKIT_X=a", None),
        ('  - "LIVEKIT_X=a"', None),
    ],
)
def test_lines_are_read_as_docker_and_systemd_have_them(line: str, value: str | None) -> None:
    """Quotes, escapes and comments; what cannot be read is named by its line, without the value."""
    found = parse_env_file(f"# first\r\n; second\r\n\r\nOTHER='\r\n{line}\r\n")
    if value is None:
        [problem] = found.problems
        assert (problem.key, problem.where, problem.value) == ("LIVEKIT_X", "line 5", "(hidden)")
        assert problem.remedy
    else:
        assert found == ({"LIVEKIT_X": value}, [], [])


def test_of_a_variable_that_is_there_twice_the_last_one_counts() -> None:
    """And it is said, without the values, unless they are the same."""
    found = parse_env_file(f"LIVEKIT_SECRET=a\nLIVEKIT_URL=x\nLIVEKIT_SECRET={SECRET}\nLIVEKIT_URL=x\n")
    assert found.variables == {"LIVEKIT_SECRET": SECRET, "LIVEKIT_URL": "x"}
    assert found.notes == ["LIVEKIT_SECRET is there more than once. The last one counts, in line 3."]


def test_a_bad_line_is_one_problem_and_not_two() -> None:
    """A variable that could not be read is not said to be missing as well."""
    variables, problems, _ = parse_env_file("LIVEKIT_URL='wss://x\nLIVEKIT_KEY: a\nLIVEKIT_SECRET=${B}\nLIVEKIT_FULL_ACCESS_HOMESERVERS=a.org\n")
    found = problems_of(variables, before=problems)
    assert set(found) == {"LIVEKIT_URL", "LIVEKIT_KEY", "LIVEKIT_SECRET"}


lines = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=30)


@given(lines)
def test_what_is_quoted_is_read_back(value: str) -> None:
    """Any text of one line survives either kind of quotes."""
    escaped = "".join(f"\\{character}" if character in '\\"$' else character for character in value)
    assert parse_env_file(f'LIVEKIT_X="{escaped}"').variables == {"LIVEKIT_X": value}
    if "'" not in value:
        assert parse_env_file(f"LIVEKIT_X='{value}'").variables == {"LIVEKIT_X": value}


@given(st.text() | st.text("LIVEKIT_X= \n'\"\\#${};:\t\r"))
def test_any_env_file_is_variables_or_problems(text: str) -> None:
    """No text makes the reader stumble, and nothing but our names is looked at."""
    variables, problems, _ = parse_env_file(text)
    assert all(name.startswith("LIVEKIT_") for name in [*variables, *(problem.key for problem in problems)])


values = st.text(max_size=20) | st.sampled_from(["*", "a.org", "*.a.org", ":80", "[::1]:80", "a.org=https://b", "https://x", "wss://x", "1", "info"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(
            [f"LIVEKIT_{name}" for name in ("URL", "JWT_BIND", "FULL_ACCESS_HOMESERVERS", "CS_API_URL_OVERRIDES", "LOG_LEVEL", "REDIS_URL", "é\n#")]
        ),
        values | st.lists(values, max_size=3).map(",".join),
        max_size=4,
    ),
    st.text(st.characters(exclude_categories=("C", "Z")), min_size=1) | st.text(min_size=1),
)
def test_what_is_printed_always_loads(tmp_path: Path, variables: dict[str, str], secret: str) -> None:
    """Whatever the variables hold: a list of problems, or a configuration that the daemon takes, with the very secret."""
    imported: Imported | None = None
    with contextlib.suppress(ConfigInvalid):
        imported = import_env(SERVED | variables | {"LIVEKIT_SECRET": secret})
    if imported is not None:
        assert loaded(imported, tmp_path).sfus["main"].keys["APIone"].get_secret_value() == secret.strip()


# ── the command ──


def run(*arguments: str, environ: dict[str, str]) -> Any:
    from sfu_delegate.cli import app

    result = CliRunner().invoke(app, ["import-env", *arguments], env=environ)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command_prints_what_the_daemon_takes(tmp_path: Path) -> None:
    """YAML on standard output, everything else on standard error."""
    result = run(environ=NEEDED | {"LIVEKIT_REDIS_URL": "redis://x"})
    assert result.exit_code == 0
    path = tmp_path / "delegate.yaml"
    path.write_text(result.stdout)
    assert load(path).sfus["main"].url == NEEDED["LIVEKIT_URL"]
    assert "note: LIVEKIT_REDIS_URL has no counterpart" in result.stderr
    assert "warning: homeservers[0].name" in result.stderr


def test_the_command_reads_an_env_file_in_place_of_the_environment(tmp_path: Path) -> None:
    """Only the file counts; with --key-file, the secret is on neither output."""
    env, keys = tmp_path / "jwt.env", tmp_path / "keys.yaml"
    env.write_text("LIVEKIT_SECRET=older\n" + "".join(f"export {name}='{value}'\n" for name, value in SERVED.items()))
    result = run("--env-file", str(env), "--key-file", str(keys), environ={"LIVEKIT_URL": "ftp://x"})
    assert result.exit_code == 0
    assert SECRET not in result.output
    assert SECRET in keys.read_text()
    assert f"note: {keys} holds the key" in result.stderr
    assert "note: LIVEKIT_SECRET is there more than once" in result.stderr


def test_the_command_reads_what_another_program_writes() -> None:
    """With `-` from standard input, and from a pipe that the shell has opened, which it names /dev/fd/…"""
    text = "".join(f"{name}={value}\n" for name, value in SERVED.items())
    command = [sys.executable, "-m", "sfu_delegate.cli", "import-env", "--env-file", "-"]
    ended = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert SECRET in ended.stdout
    read, write = os.pipe()
    try:
        os.write(write, text.encode())
        os.close(write)
        assert run("--env-file", f"/dev/fd/{read}", environ={}).stdout == ended.stdout
    finally:
        os.close(read)
    ended = subprocess.run(command, input="LIVEKIT_URL\n", capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert "standard input: " in ended.stderr


def test_the_command_exits_with_1_and_prints_nothing(tmp_path: Path) -> None:
    """Problems go to standard error, with the line of the env file; a file that is not there is one."""
    env = tmp_path / "jwt.env"
    env.write_text(f"LIVEKIT_URL='x\nLIVEKIT_SECRET={SECRET}\n")
    result = run("--env-file", str(env), environ={})
    assert (result.exit_code, result.stdout) == (1, "")
    assert "problem: LIVEKIT_URL (line 1) = (hidden): has a quote that never ends; close it in the same line" in result.stderr
    assert f"{env}: 2 problems; nothing was made of it" in result.stderr
    assert SECRET not in result.output
    result = run("--env-file", str(tmp_path / "no.env"), environ={})
    assert (result.exit_code, result.stdout) == (1, "")
    assert "No such file or directory; a text file in UTF-8 that you may read" in result.stderr


def test_the_help_has_examples() -> None:
    """Both options are explained, and shown in use."""
    text = run("--help", environ={}).stdout
    assert "Examples:" in text
    for word in ("--env-file jwt.env", "--env-file -", "standard input", "--key-file /etc/sfu-delegate/livekit-keys.yaml", "LIVEKIT_URL"):
        assert word in text
