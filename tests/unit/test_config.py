"""A configuration is checked as a whole: everything that is wrong is said at once, with its key and a remedy, and no secret is shown."""

import contextlib
import json
import os
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from sfu_delegate.config import (
    EXAMPLE_SECRET,
    HIDDEN,
    Config,
    ConfigInvalid,
    Problem,
    format_duration,
    format_size,
    from_mapping,
    load,
    parse_duration,
    parse_size,
    reloadable_changes,
    reloaded,
    warnings,
)
from sfu_delegate.config.loading import load_admin
from sfu_delegate.delegation.policy import DEPARTURES, Departure, Policy, Unasked
from sfu_delegate.sealing import new_key

SECRET = "hunter2-hunter2-hunter2-hunter2-hunter2"
GOOD = f"""
sfus:
  main:
    url: wss://sfu.example.org
    keys: {{APIone: {SECRET}}}
homeservers:
  - name: example.org
    url: https://matrix.example.org
"""


def good(**changes: Any) -> dict[str, Any]:
    """A small valid configuration as plain data, with whole sections replaced."""
    data: dict[str, Any] = yaml.safe_load(GOOD)
    return {**data, **changes}


def problems_of(data: object, environ: Mapping[str, str] | None = None) -> dict[str, Problem]:
    """The problems by key."""
    with pytest.raises(ConfigInvalid) as caught:
        from_mapping(data, environ or {})
    assert SECRET not in str(caught.value)
    return {problem.key: problem for problem in caught.value.problems}


def problems_of_text(tmp_path: Path, text: str | bytes) -> dict[str, Problem]:
    path = tmp_path / "delegate.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigInvalid) as caught:
        load(path)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return {problem.key: problem for problem in caught.value.problems}


def sfu(**changes: Any) -> dict[str, Any]:
    return {"url": "wss://sfu.example.org", "keys": {"APIone": SECRET}, **changes}


def test_defaults_are_the_policys() -> None:
    """A file without any of the rules' keys yields exactly the policy's own defaults."""
    policy = from_mapping(good()).policy()
    assert policy == Policy(lost_after=policy.lost_after)
    assert {name: policy.lost(name) for name in from_mapping(good()).sfus} == dict.fromkeys(from_mapping(good()).sfus, Policy().lost("any"))


def test_a_departure_is_changed_and_the_others_stay() -> None:
    """What is given for a reason is laid over its default; other reasons keep theirs, and new ones start from OTHER."""
    config = from_mapping(good(departures={"client_initiated": {"look_after": "3s"}, "MIGRATION": {"unasked": "after"}, "17": {"look_after": 0}}))
    departures = config.policy().departures
    assert departures["CLIENT_INITIATED"] == Departure(3.0, Unasked.GONE)
    assert departures["MIGRATION"] == Departure(15.0, Unasked.AFTER, 60.0)
    assert departures["17"] == Departure(0.0, Unasked.AFTER, 60.0)
    assert departures["SIGNAL_CLOSE"] == DEPARTURES["SIGNAL_CLOSE"]


FIXED = {"adrift_keep", "breaker_after", "first_spread", "instance_margin"}
"""Numbers that follow from others, or from how SFUs work: nothing that an operator could know better."""


def test_every_number_of_the_policy_can_be_configured() -> None:
    """Each key of the rules reaches the policy."""
    config = from_mapping(
        good(
            presence={"join_timeout": 1, "first_looks": [1, 2], "unseen_departure": 3, "joining_limit": 4}
            | {"look_again": 6, "look_again_most": 7, "look_gap": 7, "settled": 8, "doubt": 13, "doubt_after": 14}
            | {"interval": 15, "interval_most": 16, "late_after": 17},
            restart={"at": 0.5, "spread": 0.2},
            actions={"retry_first": 9, "retry_most": 10, "vanished_wait": 11, "lease": 12},
            history={"keep": "1d"},
        )
    )
    policy, default = config.policy(), Policy()
    changed = [name for name in Policy.__dataclass_fields__ if getattr(policy, name) != getattr(default, name)]
    assert set(changed) == set(Policy.__dataclass_fields__) - {"departures"} - FIXED
    assert from_mapping(good(sfus={"main": sfu(lost_after="2m")})).policy().lost("main") == 120.0


def test_a_section_of_comments_only_has_its_defaults() -> None:
    """`listen:` with nothing below it, and a key without a value, count as not given."""
    assert from_mapping(good(listen=None, log={"level": None})) == from_mapping(good())


def test_the_key_file_is_beside_the_database() -> None:
    """Both paths follow the database's URL, relative or absolute."""
    config = from_mapping(good(database="sqlite:////var/lib/d/x.db"))
    assert (config.database_path, config.key_file) == (Path("/var/lib/d/x.db"), Path("/var/lib/d/x.db.key"))
    assert from_mapping(good(database="sqlite:///x.db")).database_path == Path("x.db")


POSTGRESQL = "postgresql://me@127.0.0.1/delegations"


def on_postgresql(**changes: Any) -> dict[str, Any]:
    """A small valid configuration with a PostgreSQL database."""
    return good(**{"database": POSTGRESQL, "encryption": {"keys": [new_key()]}} | changes)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        (POSTGRESQL, {"user": "me", "host": "127.0.0.1", "dbname": "delegations"}),
        ("postgres://me@db/x", {"user": "me", "host": "db", "dbname": "x"}),
        ("postgresql:///x?host=/run/postgresql", {"host": "/run/postgresql", "dbname": "x"}),
        ("postgresql://me@%2Frun%2Fpostgresql/x", {"user": "me", "host": "/run/postgresql", "dbname": "x"}),
        ("postgresql:///x", {"dbname": "x"}),
        ("postgresql://a:5432,[::1]:5433/x", {"host": "a,::1", "port": "5432,5433", "dbname": "x"}),
        ("postgresql://a,b/x?port=5433", {"host": "a,b", "port": "5433", "dbname": "x"}),
        ("postgresql://me%40server@db/x", {"user": "me@server", "host": "db", "dbname": "x"}),
        (
            "postgresql://db/x?hostaddr=192.0.2.7&application_name=us",
            {"host": "db", "hostaddr": "192.0.2.7", "dbname": "x", "application_name": "us"},
        ),
        (
            "postgresql://db/x?sslmode=require&channel_binding=require",
            {"host": "db", "dbname": "x", "sslmode": "require", "channel_binding": "require"},
        ),
        ("postgresql://db/x?target_session_attrs=read-write", {"host": "db", "dbname": "x", "target_session_attrs": "read-write"}),
        ("postgresql://db/x?ssl=true", {"host": "db", "dbname": "x", "sslmode": "require"}),
    ],
)
def test_a_postgresql_database_is_named_as_libpq_names_it(url: str, options: dict[str, str]) -> None:
    """Hosts, ports, sockets and options are what libpq reads in the URL, which is kept as it was written."""
    config = from_mapping(on_postgresql(database=url))
    assert config.is_postgresql
    assert config.database == config.shown()["database"] == url
    assert config.database_options() == options


def test_a_postgresql_database_is_no_file() -> None:
    """Who asks for its path, or for a key beside it, has forgotten to ask which database it is."""
    config = from_mapping(on_postgresql())
    with pytest.raises(ValueError, match="no file"):
        _ = config.database_path
    with pytest.raises(ValueError, match="no file"):
        _ = config.key_file
    assert not from_mapping(good()).is_postgresql
    assert from_mapping(good()).database_options() == {}


def test_what_is_below_postgresql() -> None:
    """Its defaults, and that each of its keys is read."""
    section = from_mapping(on_postgresql()).postgresql
    assert (section.password, section.password_file, section.connect_timeout, section.instance, section.address) == (None, None, 3.0, "", "")
    given = {"password": SECRET, "connect_timeout": "2500ms", "instance": "delegate 1", "address": "192.0.2.7"}
    section = from_mapping(on_postgresql(postgresql=given)).postgresql
    assert section.password is not None
    assert section.password.get_secret_value() == SECRET
    assert (section.connect_timeout, section.instance, section.address) == (2.5, "delegate 1", "192.0.2.7")


@pytest.mark.parametrize(
    ("url", "said", "remedy"),
    [
        ("postgresql://", "names no database", "postgresql://sfu_delegate@"),
        ("postgresql://db", "names no database", "postgresql://sfu_delegate@"),
        ("postgresql://me@db/?sslmode=require", "names no database", "postgresql://sfu_delegate@"),
        ("postgresql://db/x/y", "a database name with /", "postgresql://sfu_delegate@"),
        ("postgresql://db/x#y", "a database name with /", "postgresql://sfu_delegate@"),
        ("postgresql://db/x%3Dy", "a database name with /", "postgresql://sfu_delegate@"),
        ("postgresql://db:0/x", "a port that is not a number", "postgresql://sfu_delegate@"),
        ("postgresql://db:65536/x", "a port that is not a number", "postgresql://sfu_delegate@"),
        ("postgresql://one:1,two:2/x?port=1,2,3", "as many ports or addresses as hosts", "one port for all"),
        ("postgresql://one,two/x?hostaddr=192.0.2.7", "as many ports or addresses as hosts", "one port for all"),
        ("postgresql://db/x?hostaddr=db", "a hostaddr that is no IP address", "leave hostaddr out"),
        ("postgresql://d%20b/x", "something else than a host name", "postgresql://sfu_delegate@"),
        ("postgresql://d b/x", "a space or a control character", "%20"),
        ("postgresql://db/x\n", "a space or a control character", "%20"),
        ("postgresql://db/x\0y", "a space or a control character", "%20"),
        ("postgresql://[::1/x", "is not a URL that libpq can read", "postgresql://sfu_delegate@"),
        ("postgresql://db/%zz", "is not a URL that libpq can read", "postgresql://sfu_delegate@"),
        ("postgresql://db/%00", "is not a URL that libpq can read", "postgresql://sfu_delegate@"),
        ("postgresql://db/%ff", "is not a URL that libpq can read", "postgresql://sfu_delegate@"),
        ("postgresql://db/x?sslmode", "is not a URL that libpq can read", "postgresql://sfu_delegate@"),
        ("postgresql://me@db/x?application_name=a@b", "an @ that does not stand between user and host", "%40"),
        ("postgresql://db/x?sslmod=require", "no option of libpq's: sslmod", "did you mean sslmode?"),
        ("postgresql://db/x?foo=1&sslmode=require&xyz=2", "no option of libpq's: foo, xyz", "remove it"),
        ("postgresql://db/x?f%C3%B6%C3%B6=1", "an option that libpq does not know", "postgresql://sfu_delegate@"),
        ("postgresql://db/x?sslmode=verify", "another sslmode", "verify-full"),
        ("postgresql://db/x?target_session_attrs=standby", "another target_session_attrs", "read-write"),
        ("postgresql://db/x?load_balance_hosts=yes", "another load_balance_hosts", "random"),
        ("postgresql://db/x?channel_binding=yes", "another channel_binding", "require"),
        ("postgresql://db/x?sslrootcert=system", "sslrootcert=system, which finds no certificates", "name a file"),
        ("postgresql://db/x?connect_timeout=5", "the option connect_timeout", "postgresql.connect_timeout"),
        ("postgresql://db/x?passfile=/x", "the option passfile", "postgresql.password_file"),
        ("postgresql://db/x?service=x", "the option service", "where it can be checked"),
        ("postgresql://db/x?sslpassword=hunter2", "the option sslpassword", "that needs no password"),
        ("postgresql://db/x?replication=true", "the option replication", "remove it"),
        ("postgresql://db/x?client_encoding=latin1", "the option client_encoding", "remove it"),
        ("postgresql://db/x?oauth_client_secret=hunter2", "the option oauth_client_secret", "postgresql.password_file"),
        ("postgresql://db/x?sslrootcert=/nonexistent", "the certificate file cannot be read: No such", "check the path"),
        (f"postgresql://db/x?sslrootcert={__file__}", "no certificates", "PEM"),
        ("postgresql://db/x?sslcert=/nonexistent", "the client's certificate cannot be read: No such", "check the path"),
        ("postgresql://db/x?sslkey=/nonexistent", "the key of the client's certificate cannot be read: No such", "check the path"),
    ],
)
def test_what_is_wrong_with_the_url_of_a_database_is_said(url: str, said: str, remedy: str) -> None:
    """One problem, with the value as far as it can be shown, and what to write instead."""
    found = problems_of(on_postgresql(database=url))
    assert list(found) == ["database"]
    assert said in found["database"].problem
    assert remedy in found["database"].remedy
    assert found["database"].value
    assert "hunter2" not in str(found["database"])


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me@db:5432,[::1]/x?sslmode=verify", "postgresql://(hidden)@db:5432,[::1]/x?sslmode=verify"),
        ("postgresql://db:99999/x", "postgresql://db:99999/x"),
        ("postgresql:///?host=/run/postgresql", "postgresql:///?host=/run/postgresql"),
        ("postgresql://db/x?passwort=hunter2", "postgresql://db/x?(hidden)"),
        ("postgresql://db:hunter2/x", "postgresql://(hidden)"),
        ("mysql://me:hunter2@db/x", "mysql://(hidden)"),
        ("host=db password=hunter2", "(hidden)"),
        ("me:hunter2@db/x", "(hidden)"),
        ("sqlite:///x.db?key=hunter2", "sqlite:///x.db?(hidden)"),
        ("/var/lib/x.db", "/var/lib/x.db"),
        ("sqlite:///", "sqlite:///"),
    ],
)
def test_a_database_is_shown_as_far_as_it_can_hold_no_password(url: str, shown: str) -> None:
    """What is not plainly harmless is hidden, and the rest is there to be recognised by."""
    assert problems_of(on_postgresql(database=url))["database"].value == shown


PASSWORDS = [
    "postgresql://me:{}@db/x",
    "postgresql://:{}@db/x",
    "postgresql://me:{}@one,two/x?sslmode=verify-full",
    "postgresql://me:a/{}@db/x",
    "postgresql://me:a@{}@db/x",
    "postgresql://me:a?{}@db/x",
    "postgresql://me:a#{}@db/x",
    "postgresql://me:1/{}?user=@db/x",
    "postgresql://me:1/{}?a=1@db/x",
    "postgresql://me:1/x?{}=1@db/x",
    "postgresql://me%3A{}@db/x",
    "postgresql://db/x?password={}",
    "postgresql://db/x?%70assword={}",
    "postgresql://db/x?user=me&password=a&{}=b",
    "postgresql://db/x?user=me:{}",
    "postgresql://me:{}",
    "postgresql://me:{}@",
    "postgresql://me:{}@db:99999/x?foo=bar",
    "postgresql+psycopg://me:{}@db/x",
    "postgres:me:{}@db/x",
    "Postgres://me:a/{}@db/x",
    "jdbc:postgresql://db/x?user=me&password={}",
    "host=db user=me password={}",
    "postgresql://me:a {}@db/x",
    "postgresql://me:%zz{}@db/x",
]


@pytest.mark.parametrize("url", PASSWORDS)
def test_a_password_in_the_url_is_refused_and_never_shown(url: str) -> None:
    """In the file and in the environment, and whatever in it libpq would misread."""
    for data, environ in ((on_postgresql(database=url.format("hunter2")), {}), (on_postgresql(), {"SFU_DELEGATE_DATABASE": url.format("hunter2")})):
        with pytest.raises(ConfigInvalid) as caught:
            from_mapping(data, environ)
        assert [problem.key for problem in caught.value.problems] == ["database"]
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
        assert not any("hunter2" in str(problem) for problem in (*caught.value.problems, *caught.value.warnings))


def test_where_the_password_belongs_is_said() -> None:
    """The keys are named, and the URL is recognised by what is left of it."""
    (problem,) = problems_of(on_postgresql(database="postgresql://db/x?password=hunter2")).values()
    assert (problem.value, problem.problem) == ("postgresql://db/x?(hidden)", "carries a password")
    assert problem.remedy == "take it out, and put it into postgresql.password_file, or postgresql.password"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="a1:/?#@[]%&=,. \\'", max_size=6), st.text(alphabet="a1:/?#@[]%&=,. \\'", max_size=6))
def test_no_password_whatever_is_in_it_is_shown(before: str, after: str) -> None:
    """Passwords with characters that mean something in a URL make another URL of it, of which nothing is shown either."""
    with pytest.raises(ConfigInvalid) as caught:
        from_mapping(on_postgresql(database=f"postgresql://me:{before}hunter2{after}@db/x"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "said", "remedy"),
    [
        ({"connect_timeout": "1s"}, "connect_timeout", "must be at least 2s", "with its unit"),
        ({"connect_timeout": "2m"}, "connect_timeout", "must be at most 1m", "with its unit"),
        ({"instance": "x" * 65}, "instance", "64 characters at most", "delegate-1"),
        ({"instance": "bücher"}, "instance", "printable ASCII", "delegate-1"),
        ({"instance": "a\nb"}, "instance", "printable ASCII", "delegate-1"),
        ({"instance": 7}, "instance", "must be a text", ""),
        ({"address": " 192.0.2.7"}, "address", "printable ASCII", "192.0.2.7"),
        ({"address": "https://me:hunter2@x/\x7f"}, "address", "printable ASCII", "192.0.2.7"),
        ({"password": 12345}, "password", "must be a text", "quotes"),
        ({"password": ""}, "password", "is empty", "put the secret here"),
        ({"password": "hunter2 hunter2"}, "password", "has a space in it", "one line"),
        ({"password_file": "/nonexistent"}, "password_file", "the password's file cannot be read: No such", "check the path"),
        ({"pasword": "hunter2"}, "pasword", "is not a key that exists here", "did you mean password?"),
    ],
)
def test_what_is_wrong_below_postgresql_is_said(section: dict[str, Any], key: str, said: str, remedy: str) -> None:
    """One mistake is one problem, with its key, and a remedy."""
    found = problems_of(on_postgresql(postgresql=section))
    assert list(found) == [f"postgresql.{key}"]
    assert said in found[f"postgresql.{key}"].problem
    assert remedy in found[f"postgresql.{key}"].remedy
    assert "hunter2" not in str(found[f"postgresql.{key}"])


def test_the_password_comes_from_a_file(tmp_path: Path) -> None:
    """Without the newline at its end, as other secrets do; and it is shown nowhere."""
    file = private(tmp_path / "password", f"{SECRET}\n")
    for section in ({"password_file": str(file)}, {"password": SECRET}):
        config = from_mapping(on_postgresql(postgresql=section))
        assert config.postgresql.password is not None
        assert config.postgresql.password.get_secret_value() == SECRET
        assert warnings(config) == []
        for text in (repr(config), str(config), str(config.shown()), config.model_dump_json()):
            assert SECRET not in text
        assert config.shown()["postgresql"]["password"] == HIDDEN
    config = from_mapping(on_postgresql(), {"SFU_DELEGATE_POSTGRESQL__PASSWORD": "12345"})
    assert config.postgresql.password is not None
    assert config.postgresql.password.get_secret_value() == "12345"


@pytest.mark.parametrize(
    ("content", "said"), [("", "is empty"), (" \n", "is empty"), (f"{SECRET}\nx\n", "has a line break in it"), (f"{SECRET}\u200b", "cannot be seen")]
)
def test_a_bad_password_file_is_a_problem(content: str, said: str, tmp_path: Path) -> None:
    """Named by its key and its path, without what is in it."""
    file = private(tmp_path / "password", content)
    found = problems_of(on_postgresql(postgresql={"password_file": str(file)}))
    assert list(found) == ["postgresql.password_file"]
    assert found["postgresql.password_file"].value == str(file)
    assert said in found["postgresql.password_file"].problem
    assert found["postgresql.password_file"].remedy.startswith("put the password into it")


def test_a_password_in_two_places_is_a_problem(tmp_path: Path) -> None:
    """Which of the two counts must not be guessed."""
    file = private(tmp_path / "password", "x")
    found = problems_of(on_postgresql(postgresql={"password": SECRET, "password_file": str(file)}))
    assert list(found) == ["postgresql.password"]
    assert found["postgresql.password"].problem == "is given here, and password_file as well"
    assert "password: null" in found["postgresql.password"].remedy


def test_a_password_that_everybody_can_read_is_risky(tmp_path: Path) -> None:
    """In its file, and in the configuration."""
    file = private(tmp_path / "password", SECRET)
    file.chmod(0o644)
    assert [w.key for w in warnings(from_mapping(on_postgresql(postgresql={"password_file": str(file)})))] == ["postgresql.password_file"]
    path = tmp_path / "delegate.yaml"
    keys = private(tmp_path / "keys", new_key())
    path.write_text(f"{GOOD}database: {POSTGRESQL}\nencryption: {{keys_file: {keys}}}\npostgresql: {{password: {SECRET}}}\n")
    path.chmod(0o644)
    (warning,) = warnings(load(path))
    assert "postgresql.password" in warning.problem


def test_instances_need_keys_of_encryption(tmp_path: Path) -> None:
    """With PostgreSQL none is made up: each instance would make another one."""
    found = problems_of(good(database=POSTGRESQL))
    assert list(found) == ["encryption.keys"]
    assert found["encryption.keys"].value == "(not set)"
    assert "all instances need the same keys" in found["encryption.keys"].problem
    assert found["encryption.keys"].remedy.startswith("make one: python3 -c ")
    file = private(tmp_path / "keys", f"{new_key()}\n")
    assert from_mapping(good(database=POSTGRESQL, encryption={"keys_file": str(file)})).encryption_keys()


def test_keys_that_cannot_be_read_are_not_called_missing() -> None:
    """Nor are they asked for while it is not known which database it is."""
    assert list(problems_of(good(database=POSTGRESQL, encryption={"keys_file": "/nonexistent"}))) == ["encryption.keys_file"]
    assert list(problems_of(good(database="postgresql://db"))) == ["database"]


def test_a_lease_is_shorter_where_others_wait_for_it() -> None:
    """With PostgreSQL another instance takes over when it ends, and a request must end before; what is given counts with either database."""
    config = from_mapping(on_postgresql())
    assert (config.actions.lease, config.policy().lease, config.timeouts.request) == (10.0, 10.0, 8.0)
    assert config.timeouts.request < config.actions.lease - 1
    config = from_mapping(good())
    assert (config.actions.lease, config.timeouts.request) == (15.0, 10.0)
    config = from_mapping(on_postgresql(actions={"lease": "20s", "retry_first": None}, timeouts={"request": None, "connect": "1s"}))
    assert (config.actions.lease, config.timeouts.request, config.timeouts.connect) == (20.0, 8.0, 1.0)
    config = from_mapping(good(), {"SFU_DELEGATE_DATABASE": POSTGRESQL, "SFU_DELEGATE_ENCRYPTION__KEYS": f"['{new_key()}']"})
    assert (config.actions.lease, config.timeouts.request) == (10.0, 8.0)


@pytest.mark.parametrize(
    ("changes", "key", "value", "said"),
    [
        ({"timeouts": {"request": "10s"}}, "timeouts.request", "10s", "less than actions.lease (10s)"),
        ({"actions": {"lease": "8s"}}, "timeouts.request", "8s", "less than actions.lease (8s)"),
        ({"sfus": {"main": sfu(request_timeout="12s")}}, "sfus.main.request_timeout", "12s", "less than actions.lease (10s)"),
        ({"timeouts": {"connect": "9s"}}, "timeouts.connect", "9s", "at most timeouts.request (8s)"),
        ({"actions": "soon"}, "actions", "(a text)", "must be keys with values"),
        ({"actions": {"lease": "soon"}}, "actions.lease", "soon", "must be a duration"),
    ],
)
def test_times_must_fit_into_the_shorter_lease(changes: dict[str, Any], key: str, value: str, said: str) -> None:
    """The checks are those of SQLite, with PostgreSQL's defaults."""
    found = problems_of(on_postgresql(**changes))
    assert list(found) == [key]
    assert found[key].value == value
    assert said in found[key].problem
    assert found[key].remedy


def test_each_path_of_the_matrixrtc_endpoints_has_its_sfu() -> None:
    """The root is the first SFU's, each prefix that of its own; where the endpoints are switched off there is none."""
    sfus = {"main": sfu(path_prefixes=["/livekit/jwt", "/a.b-c_d~e"]), "two": sfu(keys={"APItwo": SECRET}, path_prefixes=["/sfu", "/v10/get_token"])}
    assert from_mapping(good(sfus=sfus)).matrixrtc_paths == {
        "": "main",
        "/livekit/jwt": "main",
        "/a.b-c_d~e": "main",
        "/sfu": "two",
        "/v10/get_token": "two",
    }
    assert from_mapping(good(sfus=sfus, matrixrtc={"enabled": False})).matrixrtc_paths == {}


def test_proxies_are_addresses_and_networks() -> None:
    """Single addresses are networks of one; by default, those who are near are trusted, and nobody else."""
    config = from_mapping(good(listen={"trusted_proxies": ["192.0.2.7", "2001:db8::/32"]}))
    assert config.listen.trusted_proxies == (ip_network("192.0.2.7/32"), ip_network("2001:db8::/32"))
    assert config.shown()["listen"]["trusted_proxies"] == ["192.0.2.7/32", "2001:db8::/32"]
    near = from_mapping(good()).listen.trusted_proxies
    for address in ("127.0.0.1", "::1", "172.31.0.1", "fd00::1", "fe80::1", "169.254.1.1"):
        assert any(ip_address(address) in network for network in near)
    for address in ("8.8.8.8", "172.32.0.1", "2001:db8::1", "100.64.0.1"):
        assert not any(ip_address(address) in network for network in near)
    assert from_mapping(good(), {"SFU_DELEGATE_LISTEN__TRUSTED_PROXIES": "[]"}).listen.trusted_proxies == ()


@given(st.floats(min_value=0, max_value=1e12))
def test_durations_round_trip(seconds: float) -> None:
    """The text of a duration is read as exactly the same duration."""
    assert parse_duration(format_duration(seconds)) == seconds
    assert parse_duration(seconds) == seconds


@given(st.integers(0, 2**50))
def test_sizes_round_trip(size: int) -> None:
    """The text of a size is read as exactly the same size."""
    assert parse_size(format_size(size)) == parse_size(size) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("2m", 120), ("1h", 3600), ("7d", 604800), ("1h30m", 5400), ("1.5s", 1.5), ("10", 10), (" 2s ", 2), (0, 0)],
)
def test_durations_are_read_as_written(text: object, seconds: float) -> None:
    """Numbers are seconds, and units may be joined as LiveKit's durations are."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "1 h", "-1s", "-1", "1w", "1e400", "nan", "inf", "sNaN", "1s;", "١s", True, None, [], -1, float("nan"), 10**400]
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    """Everything else is an error of one kind."""
    with pytest.raises(ValueError, match="must be a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.25, "250ms"), (90, "90s"), (120, "2m"), (604800, "7d"), (1.5, "1500ms"), (1e-7, "0.0000001s")]
)
def test_durations_are_written_shortly(seconds: float, text: str) -> None:
    """The largest unit that fits exactly is used."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("text", "size"), [("64KiB", 65536), ("1MiB", 1 << 20), ("1mb", 10**6), ("10 B", 10), ("7", 7), (7, 7)])
def test_sizes_are_read_as_written(text: object, size: int) -> None:
    """Units of 1024 and of 1000 are told apart."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5MiB", "1TiB", True, None, -1, 1.5])
def test_what_is_no_size_is_refused(text: object) -> None:
    """Everything else is an error of one kind."""
    with pytest.raises(ValueError, match="must be a size"):
        parse_size(text)


def test_all_problems_are_said_at_once() -> None:
    """Wrong values, unknown and missing keys and contradictions between good keys appear together."""
    found = problems_of(
        {
            "listen": {"prt": 1, "port": "eighty"},
            "sfus": {"one": {"url": "wss://one", "keys": {"APIx": SECRET}}, "two": {"url": "ftp://two", "keys": {"APIx": SECRET}}},
            "homeservers": [{"url": "https://x"}, {"name": "a.org"}, {"name": "a.org"}],
            "delegations": {"min_delay": "2h", "max_delay": "1h", "max_events": 0},
            "restart": {"at": 0.1, "spread": 0.5},
            "lgo": {"level": "debug"},
        }
    )
    assert set(found) == {
        "listen.prt",
        "listen.port",
        "sfus.two.url",
        "homeservers[0].name",
        "homeservers[2].name",
        "delegations.min_delay",
        "delegations.max_events",
        "restart.spread",
        "lgo",
    }
    assert found["listen.prt"].remedy == "did you mean port?"
    assert found["lgo"].remedy == "did you mean log?"
    assert (found["listen.port"].value, found["listen.port"].problem) == ("eighty", "must be a whole number")
    assert found["homeservers[0].name"].problem == "is required"
    assert found["homeservers[2].name"].problem == "is there twice, first as homeservers[1]"
    assert found["delegations.max_events"].problem == "must be at least 1"


def test_a_wrong_value_does_not_cause_a_second_problem() -> None:
    """What depends on a key that is wrong itself is not judged by the default in its place."""
    assert set(problems_of(good(delegations={"min_delay": "soon", "max_delay": "10s"}))) == {"delegations.min_delay"}
    assert set(problems_of(good(sfus={"main": {"url": "wss://x", "keys": 7}}))) == {"sfus.main.keys"}


def test_an_sfu_and_a_homeserver_are_needed() -> None:
    """An empty file says what must be in it."""
    assert set(problems_of(None)) == set(problems_of({})) == {"sfus", "homeservers"}


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"database": "postgresql://u:hunter2@db/x"}, "database", "carries a password"),
        ({"database": "mysql://u:hunter2@db/x"}, "database", "begins with sqlite:/// or postgresql://"),
        ({"database": "POSTGRESQL://u@db/x"}, "database", "begins with sqlite:/// or postgresql://"),
        ({"database": "sqlite://"}, "database", "begins with sqlite:///"),
        ({"database": "sqlite:///:memory:"}, "database", "nothing would survive"),
        ({"database": "sqlite:///x.db?mode=ro"}, "database", "plain path"),
        ({"database": f"sqlite:///{Path(__file__).parent}"}, "database", "is a directory"),
        ({"listen": {"port": 70000}}, "listen.port", "at most 65535"),
        ({"listen": {"port": True}}, "listen.port", "YAML reads this as true or false"),
        ({"listen": {"host": "http://x"}}, "listen.host", "not an address"),
        ({"listen": "0.0.0.0:80"}, "listen", "must be keys with values"),
        ({"listen": {"trusted_proxies": "10.0.0.0/8"}}, "listen.trusted_proxies", "must be a list"),
        ({"listen": {"trusted_proxies": ["proxy"]}}, "listen.trusted_proxies[0]", "not an IP address"),
        ({"listen": {"trusted_proxies": ["::1", 10]}}, "listen.trusted_proxies[1]", "must be a text"),
        ({"listen": {"trusted_proxies": ["10.1.2.3/8"]}}, "listen.trusted_proxies[0]", "more bits set"),
        ({"listen": {"trusted_proxies": ["::ffff:10.0.0.0/104"]}}, "listen.trusted_proxies[0]", "IPv4 address in the form"),
        ({"listen": {"host": "127.0.0.1", "port": 8081}}, "admin.port", "is the address of listen"),
        ({"listen": {"host": "0.0.0.0", "port": 8081}}, "admin.port", "is the address of listen"),
        ({"listen": {"port": 8081}, "admin": {"host": "::"}}, "admin.port", "is the address of listen"),
        ({"admin": {"tcp": False}}, "admin.tcp", "leaves no way to ask"),
        ({"admin": {"socket": "admin.sock"}}, "admin.socket", "is not an absolute path"),
        ({"admin": {"socket": f"/{'x' * 107}"}}, "admin.socket", "is longer than the 107 bytes"),
        ({"admin": {"token": "é" * 40}}, "admin.token", "cannot be sent"),
        ({"admin": {"token": f"{SECRET} {SECRET}"}}, "admin.token", "has a space in it"),
        ({"admin": {"token_file": "/nonexistent"}}, "admin.token_file", "cannot be read: No such"),
        ({"homeservers": {"name": "x"}}, "homeservers", "must be a list"),
        ({"homeservers": [{"name": "https://x.org"}]}, "homeservers[0].name", "is a URL"),
        ({"homeservers": [{"name": "a.*.org"}]}, "homeservers[0].name", "not a server name"),
        ({"homeservers": [{"name": "a.org", "url": "a.org"}]}, "homeservers[0].url", "begins with https://"),
        ({"homeservers": [{"name": "a.org", "url": "https://u:hunter2@a.org"}]}, "homeservers[0].url", "must not carry"),
        ({"homeservers": [{"name": "a.org", "url": "https://[a.org"}]}, "homeservers[0].url", "not a URL"),
        ({"homeservers": [{"name": "a.org", "as_token": 12345}]}, "homeservers[0].as_token", "must be a text"),
        ({"homeservers": [{"name": "*.a.org", "as_token": SECRET}]}, "homeservers[0].as_token", "would be sent to whatever server"),
        ({"homeservers": [{"name": "a.org", "as_token": f"{SECRET} {SECRET}"}]}, "homeservers[0].as_token", "has a space in it"),
        ({"homeservers": [{"name": "a.org", "as_token": "…"}]}, "homeservers[0].as_token", "cannot be sent"),
        ({"homeservers": [{"name": "a.org", "as_token_file": "/nonexistent"}]}, "homeservers[0].as_token_file", "cannot be read: No such"),
        ({"homeservers": [{"name": "a.org", "hs_token": SECRET}]}, "homeservers[0].hs_token", "without an as_token"),
        ({"homeservers": [{"name": "a.org", "as_token": SECRET, "hs_token": SECRET}]}, "homeservers[0].hs_token", "the same as the as_token"),
        ({"homeservers": [{"name": "a.org", "as_token": SECRET, "hs_token": "é"}]}, "homeservers[0].hs_token", "cannot be sent"),
        ({"homeservers": [{"name": "a.org", "as_token": SECRET, "hs_token": f"{SECRET} x"}]}, "homeservers[0].hs_token", "has a space in it"),
        ({"homeservers": [{"name": "a.org", "as_token": SECRET, "hs_token_file": "/nonexistent"}]}, "homeservers[0].hs_token_file", "cannot be read"),
        (
            {"homeservers": [{"name": "*.a.org", "url": "https://a.org", "as_token": SECRET, "hs_token": f"{SECRET}2"}]},
            "homeservers[0].hs_token",
            "vouches for the users of one server, and *.a.org stands for several",
        ),
        (
            {"homeservers": [{"name": n, "as_token": f"{SECRET}{n}", "hs_token": f"{SECRET}2"} for n in ("a.org", "b.org")]},
            "homeservers[1].hs_token",
            "is also that of homeservers[0]",
        ),
        ({"homeservers": [{"name": "a.org", "registration_file": "/nonexistent"}]}, "homeservers[0].registration_file", "is not there"),
        ({"membership": {"interval": "9s"}}, "membership.interval", "at least 10s"),
        ({"membership": {"interval": "25h"}}, "membership.interval", "at most 1d"),
        ({"homeservers": [{"name": "a.org", "ca_file": "/nonexistent"}]}, "homeservers[0].ca_file", "cannot be read: No such"),
        ({"sfus": {"Main": sfu()}}, "sfus.Main", "not a name for an SFU"),
        ({"sfus": {"main": sfu(keys={})}}, "sfus.main.keys", "is required"),
        ({"sfus": {"main": sfu(keys={"APIone": ""})}}, "sfus.main.keys.APIone", "is empty"),
        ({"sfus": {"main": sfu(keys={"APIone": f"{SECRET}\nx"})}}, "sfus.main.keys.APIone", "has a line break in it"),
        ({"sfus": {"main": sfu(keys={f"{SECRET} x": SECRET})}}, "sfus.main.keys", "has an API key with a space in it"),
        ({"sfus": {"main": sfu(api_key="APItwo")}}, "sfus.main.api_key", "not among this SFU's keys"),
        ({"sfus": {"main": sfu(), "two": sfu()}}, "sfus.two.keys.APIone", "also a key of main"),
        ({"sfus": {"main": sfu(path_prefixes="/a")}}, "sfus.main.path_prefixes", "must be a list"),
        ({"sfus": {"main": sfu(path_prefixes=["/a", "b"])}}, "sfus.main.path_prefixes[1]", "must begin with a slash"),
        ({"sfus": {"main": sfu(path_prefixes=["/a/"])}}, "sfus.main.path_prefixes[0]", "not end with one"),
        ({"sfus": {"main": sfu(path_prefixes=["/"])}}, "sfus.main.path_prefixes[0]", "not end with one"),
        ({"sfus": {"main": sfu(path_prefixes=["/a//b"])}}, "sfus.main.path_prefixes[0]", "must not have // or .."),
        ({"sfus": {"main": sfu(path_prefixes=["/a/../v1"])}}, "sfus.main.path_prefixes[0]", "must not have // or .."),
        ({"sfus": {"main": sfu(path_prefixes=["/{a}"])}}, "sfus.main.path_prefixes[0]", "characters that the path of a URL cannot have"),
        ({"sfus": {"main": sfu(path_prefixes=["/a%2Fb"])}}, "sfus.main.path_prefixes[0]", "characters that the path of a URL cannot have"),
        ({"sfus": {"main": sfu(path_prefixes=["/v1"])}}, "sfus.main.path_prefixes[0]", "belongs to /v1"),
        ({"sfus": {"main": sfu(path_prefixes=["/v1/delegations"])}}, "sfus.main.path_prefixes[0]", "belongs to /v1"),
        ({"sfus": {"main": sfu(path_prefixes=["/sfu/get"])}}, "sfus.main.path_prefixes[0]", "belongs to /sfu/get"),
        ({"sfus": {"main": sfu(path_prefixes=["/a", "/a"])}}, "sfus.main.path_prefixes[1]", "is there twice"),
        (
            {"sfus": {"main": sfu(path_prefixes=["/a"]), "two": sfu(keys={"APItwo": SECRET}, path_prefixes=["/b", "/a"])}},
            "sfus.two.path_prefixes[1]",
            "also a path of main",
        ),
        ({"homeservers": [{"name": "a.org", "federation_url": "a.org:8448"}]}, "homeservers[0].federation_url", "begins with https://"),
        ({"federation": {"ca_file": "/nonexistent"}}, "federation.ca_file", "cannot be read: No such"),
        ({"federation": {"ca_file": __file__}}, "federation.ca_file", "no certificates"),
        ({"matrixrtc": {"openid_cache": "61m"}}, "matrixrtc.openid_cache", "at most 1h"),
        ({"limits": {"client_rate": -1}}, "limits.client_rate", "at least 0"),
        ({"limits": {"client_rate": float("inf")}}, "limits.client_rate", "at most 1000000"),
        ({"limits": {"user_rate": float("nan")}}, "limits.user_rate", "at most 1000000"),
        ({"limits": {"user_rate": True}}, "limits.user_rate", "YAML reads this as true or false"),
        ({"limits": {"client_burst": 0}}, "limits.client_burst", "at least 1"),
        ({"limits": {"user_burst": 0}}, "limits.user_burst", "at least 1"),
        ({"sfus": {"main": sfu(request_timeout="20s")}}, "sfus.main.request_timeout", "less than actions.lease"),
        ({"timeouts": {"request": "15s"}}, "timeouts.request", "less than actions.lease"),
        ({"timeouts": {"connect": "11s"}}, "timeouts.connect", "at most timeouts.request (10s)"),
        ({"encryption": {"keys": ["hunter2"]}}, "encryption.keys[0]", "not a Fernet key"),
        ({"encryption": {"keys": ["hunter2 hunter2"]}}, "encryption.keys[0]", "has a space in it"),
        ({"departures": {"CLIENT_INITIATED": {"unasked": "maybe"}}}, "departures.CLIENT_INITIATED.unasked", "not one of the words"),
        ({"departures": {"client initiated": {}}}, "departures.CLIENT INITIATED", "not the name of a disconnect reason"),
        ({"departures": {"MISSING": "10s"}}, "departures.MISSING", "must be keys with values"),
        ({"presence": {"first_looks": ["3s", "1s"]}}, "presence.first_looks", "ascending"),
        ({"presence": {"first_looks": ["soon"]}}, "presence.first_looks[0]", "must be a duration"),
        ({"restart": {"at": 1}}, "restart.at", "less than 1"),
        ({"limits": {"body": "12"}}, "limits.body", "at least 1KiB"),
        ({"delegations": {"verify_timeout": "2m"}}, "delegations.verify_timeout", "at most 1m"),
        ({"log": {"level": "loud"}}, "log.level", "not one of the words"),
        ({"cors": {"origins": ["https://x/"]}}, "cors.origins[0]", "not an origin"),
        ({"port": 8080}, "port", "not a key that exists here"),
    ],
)
def test_each_mistake_is_named(changes: dict[str, Any], key: str, said: str) -> None:
    """One mistake is one problem, with its key, and a remedy."""
    found = problems_of(good(**changes))
    assert list(found) == [key]
    assert said in found[key].problem
    assert found[key].remedy
    assert "hunter2" not in str(found[key])


def test_a_key_in_the_wrong_section_is_shown_the_way() -> None:
    """A known key in the wrong place is told where it belongs."""
    assert problems_of(good(port=8080))["port"].remedy == "there is listen.port and admin.port: put it there"


@pytest.mark.parametrize(
    "changes",
    [
        {"sfus": {"main": sfu(keys=f"APIone: {SECRET}")}},
        {"sfus": {"main": sfu(keys=[SECRET])}},
        {"sfus": {"main": sfu(keys={"APIone": [SECRET]})}},
        {"sfus": {"main": sfu(secret=SECRET)}},
        {"sfus": SECRET},
        {"homeservers": [{"name": "a.org", "as_tokn": SECRET}]},
        {"homeservers": [{"name": "a.org", "as_token": {"is": SECRET}}]},
        {"homeservers": [{"name": "a.org", "hs_token": {"is": SECRET}}]},
        {"homeservers": [SECRET]},
        {"encryption": {"keys": SECRET}},
        {"encryption": {"keys": [SECRET]}},
        {"encryption": SECRET},
        {SECRET[:4]: SECRET},
        {"database": {"url": f"postgresql://me:{SECRET}@db/x"}},
        {"database": [f"postgresql://me:{SECRET}@db/x"]},
        {"postgresql": f"postgresql://me:{SECRET}@db/x"},
        {"postgresql": {"password": {"is": SECRET}}},
        {"postgresql": {"passwd": SECRET}},
        {"postgresql": {"address": f"postgresql://me:a/{SECRET}@db/\x7f"}},
        {"homeservers": [{"name": "a.org", "url": f"https://me:a/@{SECRET}@a.org"}]},
    ],
)
def test_no_secret_is_in_a_problem(changes: dict[str, Any]) -> None:
    """Wherever a secret was put by mistake, it is not shown."""
    with pytest.raises(ConfigInvalid) as caught:
        from_mapping(good(**changes))
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_no_secret_is_in_a_repr() -> None:
    """Neither the repr nor the shown configuration has a secret."""
    key = new_key()
    config = from_mapping(good(encryption={"keys": [key]}, homeservers=[{"name": "a.org", "as_token": SECRET, "hs_token": f"{SECRET}2"}]))
    for text in (repr(config), str(config), str(config.shown()), config.model_dump_json()):
        assert SECRET not in text
        assert key not in text
    assert config.shown()["sfus"]["main"]["keys"] == {"APIone": HIDDEN}


def test_problems_name_their_line(tmp_path: Path) -> None:
    """A problem says in which line its key stands."""
    found = problems_of_text(tmp_path, GOOD + "listen:\n  port: x\nlog: {level: loud}\n")
    assert found["listen.port"].where == "line 10"
    assert found["log.level"].where == "line 11"


def test_syntax_errors_name_their_place_and_quote_nothing(tmp_path: Path) -> None:
    """Text that is no YAML is one problem with line and column."""
    found = problems_of_text(tmp_path, f"sfus:\n  main:\n  url: [{SECRET}\nhomeservers: x\n")
    assert found[""].problem.startswith("is not YAML")
    assert found[""].where.startswith("line 4, column")
    for text in (
        f"as_token: *{SECRET}",
        f"as_token: !{SECRET} x",
        f"as_token: '{SECRET}",
        f"as_token: &a%{SECRET}",
        f"a: @{SECRET}",
        f"a: %{SECRET}",
    ):
        assert "" in problems_of_text(tmp_path, text)


def test_a_tab_is_called_a_tab(tmp_path: Path) -> None:
    """YAML allows no tabs for indentation, and hardly anybody sees them."""
    found = problems_of_text(tmp_path, "sfus:\n\tmain:\n")
    assert "found a tab" in found[""].problem
    assert "spaces" in found[""].remedy


def test_a_key_that_is_there_twice_is_a_problem(tmp_path: Path) -> None:
    """YAML would silently take the last one."""
    found = problems_of_text(tmp_path, GOOD + "log: {level: info}\nlog: {level: debug}\n")
    assert found["log"].problem == "is there twice, first in line 9"
    assert found["log"].where == "line 10"


ODD = ["a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: \x07", "- a", "just text", "? [a]\n: b", "a: &a [*a]", "true: 1", b"\xff\xfe\xfa"]


@pytest.mark.parametrize("text", [*ODD, "[" * 5000, "{" * 400])
def test_odd_files_are_problems(tmp_path: Path, text: str | bytes) -> None:
    """Whatever the file holds, the answer is a list of problems."""
    assert problems_of_text(tmp_path, text)


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    """A path that leads nowhere, or to a directory, says so, and how to begin."""
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(ConfigInvalid, match="cannot be read") as caught:
            load(path)
        assert "example-config" in caught.value.problems[0].remedy


def test_a_date_is_a_text(tmp_path: Path) -> None:
    """What YAML would turn into a date stays as it is written."""
    path = tmp_path / "delegate.yaml"
    path.write_text(GOOD.replace(f"APIone: {SECRET}", "APIone: 2026-01-01"))
    assert load(path).sfus["main"].keys["APIone"].get_secret_value() == "2026-01-01"


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_the_admin_token_comes_from_a_file(tmp_path: Path) -> None:
    """Its newline does not count; one that is empty, or given twice, is a problem."""
    file = private(tmp_path / "token", f"{SECRET}\n")
    for section in ({"token_file": str(file)}, {"token": SECRET}):
        token = from_mapping(good(admin=section)).admin.token
        assert token is not None
        assert token.get_secret_value() == SECRET
    assert list(problems_of(good(admin={"token_file": str(file), "token": SECRET}))) == ["admin.token"]
    empty = problems_of(good(admin={"token_file": str(private(tmp_path / "empty", " \n"))}))
    assert empty["admin.token_file"].problem == "is empty"
    odd = problems_of(good(admin={"token_file": str(private(tmp_path / "odd", f"{SECRET}\n{SECRET}"))}))
    assert SECRET not in str(odd["admin.token_file"])


def test_the_admin_section_can_be_read_without_the_secrets(tmp_path: Path) -> None:
    """By whoever asks a running daemon: other sections may be wrong, or name files that it cannot read; its own mistakes are told."""
    path = tmp_path / "c.yaml"
    path.write_text("admin: {port: 9000, token_file: /nonexistent}\nsfus: {main: {key_file: /nonexistent}}\nnonsense: 7\n")
    admin = load_admin(path, {"SFU_DELEGATE_ADMIN__SOCKET": "/run/x.sock", "SFU_DELEGATE_SFUS": "{"})
    assert (admin.port, str(admin.socket), admin.token) == (9000, "/run/x.sock", None)
    path.write_text(f"admin: {{token_file: {private(tmp_path / 'token', SECRET)}}}\n")
    token = load_admin(path).token
    assert token is not None
    assert token.get_secret_value() == SECRET
    for text, key in (("admin: {port: many}", "admin.port"), ("admin: 7", "admin"), ("- 1", ""), ("admin: {porrt: 1}", "admin.porrt")):
        path.write_text(text)
        with pytest.raises(ConfigInvalid) as invalid:
            load_admin(path)
        assert [problem.key for problem in invalid.value.problems] == [key]
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        load_admin(tmp_path / "none.yaml")


def test_secrets_come_from_files(tmp_path: Path) -> None:
    """Each secret can be in a file of its own; the newline at its end does not count."""
    keys = [new_key(), new_key()]
    config = from_mapping(
        good(
            sfus={"main": {"url": "wss://x", "key_file": private(tmp_path / "livekit", f"APIone: {SECRET}\nAPItwo: '{SECRET}2'\n")}},
            homeservers=[
                {
                    "name": "a.org",
                    "as_token_file": private(tmp_path / "as", f"{SECRET}\n"),
                    "hs_token_file": private(tmp_path / "hs", f"{SECRET}2\n"),
                }
            ],
            encryption={"keys_file": private(tmp_path / "keys", f"# new\n{keys[0]}\n{keys[1]}\n")},
        )
    )
    assert {key: secret.get_secret_value() for key, secret in config.sfus["main"].keys.items()} == {"APIone": SECRET, "APItwo": SECRET + "2"}
    assert config.homeservers[0].as_token is not None
    assert config.homeservers[0].as_token.get_secret_value() == SECRET
    assert config.homeservers[0].hs_token is not None
    assert config.homeservers[0].hs_token.get_secret_value() == SECRET + "2"
    assert config.encryption_keys() == tuple(keys)
    assert warnings(config) == []


def test_files_can_be_credentials(tmp_path: Path) -> None:
    """Each key that names a file takes one of the directory that the service manager gives, from the file and from the environment."""
    for name, content in (("livekit-keys", f"APIone: {SECRET}"), ("as", f"{SECRET}1"), ("hs", f"{SECRET}2"), ("password", f"{SECRET}3")):
        private(tmp_path / name, content)
    private(tmp_path / "encryption", new_key())
    at = "${CREDENTIALS_DIRECTORY}"
    data = on_postgresql(
        sfus={"main": {"url": "wss://sfu.example.org", "key_file": f"{at}/livekit-keys"}},
        homeservers=[{"name": "example.org", "as_token_file": f"{at}/as", "hs_token_file": f"{at}/hs"}],
        postgresql={"password_file": f"{at}/password"},
        encryption={"keys_file": "/nonexistent"},
    )
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "SFU_DELEGATE_ENCRYPTION__KEYS_FILE": f"{at}/encryption"}
    made = from_mapping(data, environ)
    assert made.sfus["main"].keys["APIone"].get_secret_value() == SECRET
    [homeserver] = made.homeservers
    tokens = [homeserver.as_token, homeserver.hs_token, made.postgresql.password]
    assert [token and token.get_secret_value() for token in tokens] == [f"{SECRET}1", f"{SECRET}2", f"{SECRET}3"]
    assert len(made.encryption_keys()) == 1
    assert not warnings(made)


@pytest.mark.parametrize("needed", [True, False])
def test_credentials_of_nobody_are_problems(needed: bool) -> None:
    """Run by hand, without the service manager's directory: each key is named, and how to say where the credentials are."""
    at = "${CREDENTIALS_DIRECTORY}"
    data = {
        "sfus": {"main": {"url": "wss://sfu.example.org", "key_file": f"{at}/sfu-delegate.livekit-keys"}},
        "homeservers": [{"name": "example.org", "registration_file": f"{at}/registration", "ca_file": f"{at}/ca"}],
    }
    with pytest.raises(ConfigInvalid) as caught:
        from_mapping(data, registrations_needed=needed)
    found = {problem.key: problem for problem in caught.value.problems}
    assert set(found) == {"sfus.main.key_file", "homeservers[0].registration_file", "homeservers[0].ca_file"}
    for problem in found.values():
        assert problem.value.startswith(f"{at}/")
        assert problem.problem.endswith("CREDENTIALS_DIRECTORY is not set")
        assert "LoadCredential=" in problem.remedy
        assert "CREDENTIALS_DIRECTORY=/etc/credstore sfu-delegate" in problem.remedy


def test_a_credential_that_is_not_there_is_named_by_its_path(tmp_path: Path) -> None:
    """The directory was given, and the unit does not load this one."""
    data = good(sfus={"main": {"url": "wss://sfu.example.org", "key_file": "${CREDENTIALS_DIRECTORY}/none"}})
    with pytest.raises(ConfigInvalid) as caught:
        from_mapping(data, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    [problem] = caught.value.problems
    assert (problem.key, problem.value) == ("sfus.main.key_file", str(tmp_path / "none"))


def test_only_files_are_credentials(tmp_path: Path) -> None:
    """Where a key is no path, the words stand for themselves."""
    data = good(postgresql={"instance": "${CREDENTIALS_DIRECTORY}/x"})
    assert from_mapping(data, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).postgresql.instance == "${CREDENTIALS_DIRECTORY}/x"


def test_bad_secret_files_are_problems_all_at_once(tmp_path: Path) -> None:
    """Empty, odd and missing files are each named, without their content."""
    found = problems_of(
        good(
            sfus={"main": {"url": "wss://x", "key_file": private(tmp_path / "livekit", SECRET)}, "two": {"url": "wss://y", "key_file": "/no"}},
            homeservers=[{"name": "a.org", "as_token_file": private(tmp_path / "as", "\n")}],
            encryption={"keys_file": private(tmp_path / "keys", "# none\n")},
        )
    )
    assert set(found) == {"sfus.main.key_file", "sfus.two.key_file", "homeservers[0].as_token_file", "encryption.keys_file"}


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        (" ", "a space"),
        ("\t", "a space"),
        ("\u00a0", "a space"),
        ("\n", "a line break"),
        ("\x1b", "a control character"),
        ("\x7f", "a control character"),
        ("\u200b", "a character that cannot be seen"),
        ("\ufeff", "a character that cannot be seen"),
    ],
)
def test_what_a_slip_in_copying_leaves_in_a_secret_is_found(inside: str, said: str, tmp_path: Path) -> None:
    """In a file of each kind, and in the configuration itself: the key is named, and what is wrong, but never the secret."""
    odd = f"{SECRET}{inside}x"
    found = problems_of(
        good(
            sfus={
                "main": {"url": "wss://x", "key_file": private(tmp_path / "secret", f"APIone: {json.dumps(odd)}\n")},
                "two": {"url": "wss://y", "key_file": private(tmp_path / "key", f"{json.dumps(odd)}: {SECRET}\n")},
                "three": sfu(keys={"APIthree": odd}),
                "four": sfu(keys={odd: SECRET}),
            },
            homeservers=[
                {"name": "a.org", "as_token_file": private(tmp_path / "as", f" {odd}\n\n")},
                {"name": "b.org", "as_token": odd},
            ],
            encryption={"keys_file": private(tmp_path / "keys", f"{new_key()}\n{new_key()}{inside}x\n")},
        )
    )
    assert {key: problem.problem for key, problem in found.items() if key != "encryption.keys_file"} == {
        "sfus.main.key_file": f"secret 1 in it has {said} in it",
        "sfus.two.key_file": f"API key 1 in it has {said} in it",
        "sfus.three.keys.APIthree": f"has {said} in it",
        "sfus.four.keys": f"has an API key with {said} in it",
        "homeservers[0].as_token_file": f"has {said} in it",
        "homeservers[1].as_token": f"has {said} in it",
    }
    # A file of encryption keys has one a line, so there the rest is a key of its own, and none.
    assert found["encryption.keys_file"].problem.startswith("key 3 in it is not a Fernet key" if inside == "\n" else f"key 2 in it has {said} in it")
    assert all(problem.remedy for problem in found.values())


def test_a_secret_in_the_environment_is_named_by_its_variable() -> None:
    """What is wrong with it is said of the variable that it comes from."""
    found = problems_of(good(), {"SFU_DELEGATE_SFUS__MAIN__KEYS__APIone": f"{SECRET} x"})
    assert found["sfus.main.keys.APIone"].where == "SFU_DELEGATE_SFUS__MAIN__KEYS__APIone"


def test_no_file_can_make_the_daemon_wait(tmp_path: Path) -> None:
    """Named pipes and devices are refused, and not opened: nobody may ever write into them."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = problems_of(
        good(
            sfus={"main": {"url": "wss://x", "key_file": str(pipe)}},
            homeservers=[{"name": "a.org", "as_token_file": "/dev/zero", "ca_file": str(pipe)}],
            encryption={"keys_file": str(pipe)},
            federation={"ca_file": str(pipe)},
        )
    )
    assert {key: problem.problem.partition(": ")[2] for key, problem in found.items()} == {
        "sfus.main.key_file": "it is a pipe",
        "homeservers[0].as_token_file": "it is a device",
        "homeservers[0].ca_file": "it is a pipe",
        "encryption.keys_file": "it is a pipe",
        "federation.ca_file": "it is a pipe",
    }
    with pytest.raises(ConfigInvalid, match="it is a pipe"):
        load(pipe)


def test_a_configuration_may_come_from_another_program() -> None:
    """A pipe that is open already, as a shell makes it of <(…), is read; as a secret's file, which is read again later, it is not."""
    read, write = os.pipe()
    try:
        os.write(write, GOOD.encode())
        os.close(write)
        assert load(Path(f"/dev/fd/{read}")).homeservers[0].name == "example.org"
        found = problems_of(good(sfus={"main": {"url": "wss://x", "key_file": f"/dev/fd/{read}"}}))
        assert "it is a pipe" in found["sfus.main.key_file"].problem
    finally:
        os.close(read)


def test_a_secret_in_two_places_is_a_problem(tmp_path: Path) -> None:
    """Inline and in a file is one too many."""
    file = str(private(tmp_path / "x", f"APItwo: {SECRET}\n"))
    found = problems_of(
        good(
            sfus={"main": sfu(key_file=file)},
            homeservers=[{"name": "a.org", "as_token": SECRET, "as_token_file": file}],
            encryption={"keys": [new_key()], "keys_file": file},
        )
    )
    assert set(found) == {"sfus.main.keys", "homeservers[0].as_token", "encryption.keys"}
    assert all("as well" in problem.problem for problem in found.values())


def test_a_secret_that_everybody_can_read_is_risky(tmp_path: Path) -> None:
    """World-readable secret files, and a world-readable configuration with secrets in it, are warned of."""
    token = private(tmp_path / "as", SECRET)
    token.chmod(0o644)
    path = tmp_path / "delegate.yaml"
    path.write_text(GOOD + f"    as_token_file: {token}\n")
    path.chmod(0o644)
    assert {(w.key, w.value) for w in warnings(load(path))} == {("homeservers[0].as_token_file", str(token)), ("", str(path))}
    path.chmod(0o640)
    token.chmod(0o440)
    assert warnings(load(path)) == []


def test_every_key_can_be_overridden() -> None:
    """Sections, maps and lists are reached by two underscores, in any case, and a list grows by its next number."""
    config = from_mapping(
        good(),
        {
            "SFU_DELEGATE_LISTEN__PORT": "8082",
            "sfu_delegate_log__level": "debug",
            "SFU_DELEGATE_DATABASE": "sqlite:////data/x.db",
            "SFU_DELEGATE_SFUS__MAIN__URL": "wss://other.example.org",
            "SFU_DELEGATE_SFUS__MAIN__KEYS__APITwo": "01234567890123456789012345678901",
            "SFU_DELEGATE_SFUS__SECOND": "{url: 'wss://second', keys: {APIthree: '1234'}}",
            "SFU_DELEGATE_HOMESERVERS__0__AS_TOKEN": "12345",
            "SFU_DELEGATE_HOMESERVERS__1__NAME": "b.org",
            "SFU_DELEGATE_DEPARTURES__CLIENT_INITIATED__LOOK_AFTER": "0",
            "SFU_DELEGATE_CORS__ORIGINS": '["https://call.example.org"]',
            "SFU_DELEGATE_DELEGATIONS__ALLOW_SCOPED_TOKENS": "no",
            "SFU_DELEGATE_RESTART__AT": "0.5",
            "UNRELATED": "x",
        },
    )
    assert (config.listen.port, config.log.level, config.database_path) == (8082, "debug", Path("/data/x.db"))
    assert config.sfus["main"].url == "wss://other.example.org"
    assert list(config.sfus["main"].keys) == ["APIone", "APITwo"]
    assert list(config.sfus["second"].keys) == ["APIthree"]
    first, second = config.homeservers
    assert first.url == "https://matrix.example.org"
    assert first.as_token is not None
    assert first.as_token.get_secret_value() == "12345"
    assert second.name == "b.org"
    assert config.departures["CLIENT_INITIATED"].departure() == Departure(0.0, Unasked.GONE)
    assert config.cors.origins == ("https://call.example.org",)
    assert config.delegations.allow_scoped_tokens is False
    assert config.restart.at == 0.5


def test_the_environment_alone_can_be_the_configuration() -> None:
    """Everything can come from variables, with nothing in the file."""
    config = from_mapping(
        {},
        {
            "SFU_DELEGATE_SFUS__MAIN__URL": "wss://sfu.example.org",
            "SFU_DELEGATE_SFUS__MAIN__KEYS": f'{{"APIone": "{SECRET}"}}',
            "SFU_DELEGATE_HOMESERVERS": "[{name: example.org}]",
        },
    )
    assert config.homeservers[0].name == "example.org"


def test_a_single_key_overrides_within_an_overridden_section() -> None:
    """The more exact variable counts, whatever the order of the names."""
    environ = {"SFU_DELEGATE_LOG__LEVEL": "error", "SFU_DELEGATE_LOG": "{level: debug, format: json}"}
    for variables in (environ, dict(reversed(environ.items()))):
        log = from_mapping(good(), variables).log
        assert (log.level, log.format) == ("error", "json")


def test_null_takes_a_key_away(tmp_path: Path) -> None:
    """A secret in the file gives way to a file named in the environment."""
    file = private(tmp_path / "keys", f"APItwo: {SECRET}\n")
    config = from_mapping(good(), {"SFU_DELEGATE_SFUS__MAIN__KEYS": "null", "SFU_DELEGATE_SFUS__MAIN__KEY_FILE": str(file)})
    assert list(config.sfus["main"].keys) == ["APItwo"]


def test_problems_name_their_variable() -> None:
    """What is wrong in the environment is said to be there, all at once, without the value of a secret."""
    found = problems_of(
        good(),
        {
            "SFU_DELEGATE_LISTEN__PORT": "x",
            "SFU_DELEGATE_LISTEN__PRT": "1",
            "SFU_DELEGATE_SFUS__MAIN__KEYS": f"{{{SECRET}: [",
            "SFU_DELEGATE_HOMESERVERS__0__AS_TOKN": SECRET,
            "SFU_DELEGATE_HOMESERVERS__7__NAME": "c.org",
        },
    )
    assert {key: problem.where for key, problem in found.items()} == {
        "listen.port": "SFU_DELEGATE_LISTEN__PORT",
        "listen.prt": "SFU_DELEGATE_LISTEN__PRT",
        "sfus.main.keys": "SFU_DELEGATE_SFUS__MAIN__KEYS",
        "homeservers[0].as_tokn": "SFU_DELEGATE_HOMESERVERS__0__AS_TOKN",
        "homeservers": "SFU_DELEGATE_HOMESERVERS__7__NAME",
    }


def test_an_unknown_variable_is_ignored_and_warned_of() -> None:
    """A name that is no key may belong to somebody else, such as Kubernetes, and never stops the daemon."""
    config = from_mapping(
        good(),
        {
            "SFU_DELEGATE_LISTN__PORT": "1",
            "SFU_DELEGATE_CONFIG": "/x",
            "SFU_DELEGATE_PORT": "tcp://10.0.0.1:8080",
            "SFU_DELEGATE_PORT_8080_TCP_ADDR": "10.0.0.1",
            "SFU_DELEGATE_SERVICE_HOST": "10.0.0.1",
            "SFU_DELEGATE_POSTGRESQL_PORT_5432_TCP": "tcp://10.0.0.2:5432",
            "SFU_DELEGATE_POSTGRESQL_SERVICE_HOST": "10.0.0.2",
        },
    )
    assert [(w.key, "SFU_DELEGATE_LISTEN" in w.remedy) for w in warnings(config)] == [("SFU_DELEGATE_LISTN__PORT", True)]


def test_the_process_environment_is_not_read_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the environment that is handed over counts."""
    monkeypatch.setitem(os.environ, "SFU_DELEGATE_LISTEN__PORT", "1")
    assert from_mapping(good()).listen.port == 8080


def test_a_usual_configuration_has_no_warnings() -> None:
    """TLS, loopback listeners and long secrets are fine."""
    assert warnings(from_mapping(good())) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"listen": {"host": "0.0.0.0"}}, "listen.host"),
        ({"admin": {"host": "::"}}, "admin.host"),
        ({"admin": {"host": "::", "token": SECRET}}, "admin.host"),
        ({"admin": {"token": "short"}}, "admin.token"),
        ({"admin": {"token": SECRET, "tcp": False, "socket": "/run/x.sock"}}, "admin.token"),
        ({"database": "sqlite:////nonexistent/x.db"}, "database"),
        ({"database": f"sqlite:////{'x' * 300}/x.db"}, "database"),
        ({"postgresql": {"instance": "delegate-1"}}, "postgresql"),
        ({"sfus": {"main": sfu(keys={"devkey": "secret"})}}, "sfus.main.keys.devkey"),
        ({"sfus": {"main": sfu(keys={"APIone": "short"})}}, "sfus.main.keys.APIone"),
        ({"sfus": {"main": sfu(keys={"APIone": EXAMPLE_SECRET})}}, "sfus.main.keys.APIone"),
        ({"sfus": {"main": sfu(keys={"APIone": "change-me-to-a-secret-of-32-characters"})}}, "sfus.main.keys.APIone"),
        ({"sfus": {"main": sfu(url="ws://sfu.example.org")}}, "sfus.main.url"),
        ({"homeservers": [{"name": "a.org", "as_token": "short"}]}, "homeservers[0].as_token"),
        ({"homeservers": [{"name": "a.org", "as_token": "put-one-long-random-text-here-and-there"}]}, "homeservers[0].as_token"),
        ({"homeservers": [{"name": "a.org", "as_token": "changeme-changeme-changeme-changeme"}]}, "homeservers[0].as_token"),
        ({"homeservers": [{"name": "a.org", "as_token": "example-example-example-example-example"}]}, "homeservers[0].as_token"),
        ({"homeservers": [{"name": "a.org", "as_token": SECRET, "hs_token": "short"}]}, "homeservers[0].hs_token"),
        (
            {"homeservers": [{"name": "a.org", "as_token": SECRET, "hs_token": "put-another-one-here-put-another-one-here"}]},
            "homeservers[0].hs_token",
        ),
        ({"membership": {"enforce": True}}, "membership.enforce"),
        ({"homeservers": [{"name": "a.org", "url": "http://matrix.a.org"}]}, "homeservers[0].url"),
        ({"homeservers": [{"name": "*"}]}, "homeservers[0].name"),
        ({"homeservers": [{"name": "*", "url": "https://matrix.a.org"}]}, "homeservers[0].name"),
        ({"homeservers": [{"name": "a.org", "federation_url": "http://matrix.a.org"}]}, "homeservers[0].federation_url"),
        ({"homeservers": [{"name": "*.a.org", "federation_url": "https://matrix.a.org"}]}, "homeservers[0].federation_url"),
        ({"federation": {"verify_tls": False}}, "federation.verify_tls"),
        ({"federation": {"allow_private_addresses": True}}, "federation.allow_private_addresses"),
        ({"listen": {"trusted_proxies": ["10.0.0.0/8", "::/0"]}}, "listen.trusted_proxies[1]"),
        ({"sfus": {"main": sfu(), "two": sfu(keys={"APItwo": SECRET})}}, "sfus.two.path_prefixes"),
        ({"homeservers": [{"name": "*.a.org", "allow_private_addresses": True}]}, "homeservers[0].allow_private_addresses"),
        (
            {"homeservers": [{"name": "*.a.org", "url": "https://a.org", "allow_private_addresses": True}]},
            "homeservers[0].allow_private_addresses",
        ),
        ({"departures": {"CLIENT_INITATED": {}}}, "departures.CLIENT_INITATED"),
        ({"departures": {"DUPLICATE_IDENTITY": {"look_after": 0}}}, "departures.DUPLICATE_IDENTITY"),
        ({"departures": {"ROOM_MISSING": {"unasked": "gone"}}}, "departures.ROOM_MISSING"),
        ({"restart": {"at": 0.95}}, "restart.at"),
        ({"delegations": {"min_delay": 2}, "restart": {"at": 0.1, "spread": 0}}, "restart.at"),
        ({"history": {"keep": "1m"}}, "history.keep"),
        ({"log": {"level": "debug"}}, "log.level"),
    ],
)
def test_risky_settings_are_warned_of(changes: dict[str, Any], key: str) -> None:
    """A risky setting can be used, and is named with a remedy."""
    found = {warning.key: warning for warning in warnings(from_mapping(good(**changes)))}
    assert key in found
    assert found[key].remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"sfus": {"main": sfu(), "two": sfu(keys={"APItwo": SECRET}, path_prefixes=["/two"])}},
        {"sfus": {"main": sfu(), "two": sfu(keys={"APItwo": SECRET})}, "matrixrtc": {"enabled": False}},
        {"homeservers": [{"name": "*", "url": "https://matrix.a.org"}], "matrixrtc": {"enabled": False}},
        {"federation": {"allow_private_addresses": True}, "matrixrtc": {"other_homeservers": False}},
        {"homeservers": [{"name": "a.org", "federation_url": "http://[::1]:8008"}]},
        {"listen": {"trusted_proxies": []}},
        {"listen": {"port": 8081}, "admin": {"host": "::1"}},
        {"membership": {"enforce": True}, "homeservers": [{"name": "b.org"}, {"name": "a.org", "as_token": SECRET, "hs_token": f"{SECRET}2"}]},
    ],
)
def test_what_does_no_harm_is_not_warned_of(changes: dict[str, Any]) -> None:
    """The same settings where nobody is concerned."""
    assert warnings(from_mapping(good(**changes))) == []


@pytest.mark.parametrize(
    ("place", "said", "remedy"),
    [
        ("db/x", "delay_ids, by which memberships can be ended, may cross the network readable", "sslmode=verify-full&sslrootcert="),
        ("db/x?sslmode=disable", "(sslmode is disable)", "sslmode=verify-full&sslrootcert="),
        ("192.0.2.7/x?sslmode=require", "anybody on the way can pose as the database (sslmode is require)", "sslmode=verify-full&sslrootcert="),
        ("localhost,db/x?target_session_attrs=primary", "anybody on the way can pose as the database", "sslmode=verify-full&sslrootcert="),
        ("localhost/x?hostaddr=192.0.2.7", "anybody on the way can pose as the database", "sslmode=verify-full&sslrootcert="),
        ("db/x?sslmode=verify-full", "home directory of the daemon's user", "add sslrootcert="),
        ("127.0.0.1,[::1]/x", "though it be a standby", "target_session_attrs=read-write"),
        ("127.0.0.1,[::1]/x?target_session_attrs=any", "though it be a standby", "target_session_attrs=read-write"),
    ],
)
def test_a_database_that_is_not_safe_is_warned_of(place: str, said: str, remedy: str) -> None:
    """Who could read along, or pose as the database, and where the daemon could not write."""
    (warning,) = warnings(from_mapping(on_postgresql(database=f"postgresql://{place}")))
    assert (warning.key, warning.value) == ("database", f"postgresql://{place}")
    assert said in warning.problem
    assert remedy in warning.remedy


@pytest.mark.parametrize(
    "place",
    [
        "localhost/x",
        "[::1]/x",
        "/x",
        "/x?host=/run/postgresql",
        "/x?host=/run/postgresql&sslcert=&sslkey=&sslrootcert=",
        "db/x?hostaddr=127.0.0.1",
        "db/x?sslmode=verify-full&sslrootcert={ca}",
        "db/x?sslmode=verify-ca&sslrootcert={ca}",
        "db/x?sslmode=require&sslrootcert={ca}",
        "one,two/x?sslmode=verify-full&sslrootcert={ca}&target_session_attrs=read-write",
    ],
)
def test_a_database_that_is_safe_is_not_warned_of(place: str, tmp_path: Path) -> None:
    """On this machine, or with a certificate that is checked."""
    config = from_mapping(on_postgresql(database=f"postgresql://{place.format(ca=authority(tmp_path))}"))
    assert warnings(config) == []


def authority(directory: Path) -> Path:
    """A file with the certificate of an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, begin + timedelta(days=1)).sign(key, SHA256())
    path = directory / "ca.pem"
    path.write_bytes(made.public_bytes(Encoding.PEM))
    return path


def test_what_does_nothing_with_sqlite_is_named(tmp_path: Path) -> None:
    """The keys that are given, not those that have their defaults; a file that is not needed is not read."""
    section = {"password_file": str(tmp_path / "none"), "password": SECRET, "address": None, "instance": "one"}
    (warning,) = warnings(from_mapping(good(postgresql=section)))
    assert (warning.key, warning.problem) == ("postgresql", "does nothing, as the database is SQLite: password, password_file, instance")
    assert "`database`" in warning.remedy
    assert SECRET not in str(warning)


def test_what_is_for_a_database_that_is_wrong_is_not_called_useless() -> None:
    """While it is not known which database it is."""
    with pytest.raises(ConfigInvalid) as caught:
        from_mapping(good(database="postgresql://db", postgresql={"instance": "one"}))
    assert [problem.key for problem in caught.value.problems] == ["database"]
    assert caught.value.warnings == ()


def test_a_password_that_is_none_is_warned_of(tmp_path: Path) -> None:
    """What an example has in its place, by the key that it comes from."""
    placeholder = "put-the-password-here"
    assert [w.key for w in warnings(from_mapping(on_postgresql(postgresql={"password": placeholder})))] == ["postgresql.password"]
    file = private(tmp_path / "password", placeholder)
    assert [w.key for w in warnings(from_mapping(on_postgresql(postgresql={"password_file": str(file)})))] == ["postgresql.password_file"]


def test_who_may_create_rooms_is_said() -> None:
    """Serving all homeservers means more where their users get tokens from us."""
    said = {
        enabled: warnings(from_mapping(good(homeservers=[{"name": "*"}], matrixrtc={"enabled": enabled})))[0].problem for enabled in (True, False)
    }
    assert said[False] == "users of any homeserver in the world may delegate"
    assert "create rooms on your SFU, and delegate" in said[True]


def test_a_directory_that_cannot_be_seen_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a directory that only the daemon may enter, as systemd makes it, nothing is known, and nothing is said."""
    config = from_mapping(good(database="sqlite:////var/lib/private/x/x.db"))

    def stat(self: Path) -> None:
        raise PermissionError(str(self))

    monkeypatch.setattr(Path, "stat", stat)
    assert warnings(config) == []


def test_a_random_token_is_no_placeholder() -> None:
    """What `openssl rand` makes is fine, in the file as well as in a file of its own."""
    assert warnings(from_mapping(good(homeservers=[{"name": "a.org", "as_token": "c0ffee" * 8}]))) == []


def test_a_token_from_a_file_is_judged_by_the_key_of_the_file(tmp_path: Path) -> None:
    """The warning names the key that has to be mended."""
    token = tmp_path / "token"
    token.write_text("short\n")
    token.chmod(0o600)
    assert [w.key for w in warnings(from_mapping(good(homeservers=[{"name": "a.org", "as_token_file": str(token)}])))] == [
        "homeservers[0].as_token_file"
    ]


def test_warnings_come_with_the_problems() -> None:
    """What is risky in the rest is said at once, and nothing of what is wrong or has been left out."""
    with pytest.raises(ConfigInvalid) as caught:
        from_mapping(good(log={"level": "debug"}, listen={"port": "x", "host": "0.0.0.0"}, restart={"at": 2}, delegations={"min_delay": 2}))
    assert {problem.key for problem in caught.value.problems} == {"listen.port", "restart.at"}
    assert {warning.key for warning in caught.value.warnings} == {"listen.host", "delegations.min_delay", "log.level"}


def test_values_are_shown_as_they_were_written() -> None:
    """A problem quotes the text of the file, not what it was read as."""
    found = problems_of(good(delegations={"min_delay": "0s"}, presence={"first_looks": ["1s", "-1"]}, limits={"body": "1B"}))
    assert {key: problem.value for key, problem in found.items()} == {
        "delegations.min_delay": "0s",
        "presence.first_looks[1]": "-1",
        "limits.body": "1B",
    }


@pytest.mark.parametrize("url", ["http://127.0.0.1:8008", "http://localhost:8008", "http://[::1]:8008"])
def test_plain_http_to_this_machine_is_fine(url: str) -> None:
    """Nothing leaves the machine, so nothing needs encryption."""
    assert warnings(from_mapping(good(homeservers=[{"name": "a.org", "url": url}]))) == []


def test_what_can_be_reloaded() -> None:
    """SFUs, homeservers, rules, limits and the log level change in a running daemon."""
    old = from_mapping(good())
    new = from_mapping(
        good(
            sfus={"main": sfu(keys={"APInew": SECRET}), "more": sfu(url="wss://y")},
            homeservers=[{"name": "b.org"}],
            departures={"MISSING": {"look_after": "1m"}},
            restart={"at": 0.5},
            delegations={"max_events": 2},
            limits={"body": "1MiB"},
            log={"level": "debug"},
            membership={"enforce": True, "interval": "1m"},
        )
    )
    assert reloadable_changes(old, new) == (True, [])
    assert reloadable_changes(old, old) == (True, [])


def test_what_needs_a_restart_is_named() -> None:
    """Listeners, database, encryption and the log's format cannot change in a running daemon; the keys that did are listed, without their values."""
    old = from_mapping(good())
    new = from_mapping(
        good(
            listen={"port": 1},
            admin={"host": "::1"},
            database="sqlite:///y.db",
            encryption={"keys": [new_key()]},
            log={"format": "json", "level": "debug"},
        )
    )
    assert reloadable_changes(old, new) == (False, ["admin.host", "database", "encryption.keys", "listen.port", "log.format"])
    old, new = (from_mapping(on_postgresql(encryption=new.encryption.model_dump(), postgresql={"password": word})) for word in ("one", "hunter2"))
    assert reloadable_changes(old, new) == (False, ["postgresql.password"])


def test_routes_of_the_listener_need_a_restart() -> None:
    """Where the MatrixRTC endpoints are, and which SFU they hand out, is decided at the start."""
    two = sfu(keys={"APItwo": SECRET}, path_prefixes=["/two"])
    old = from_mapping(good(sfus={"main": sfu(path_prefixes=["/a"]), "two": two}))
    for sfus, named in (
        ({"main": sfu(path_prefixes=["/b"]), "two": two}, ["sfus.main.path_prefixes"]),
        ({"main": sfu(path_prefixes=["/a"])}, ["sfus.two.path_prefixes"]),
        ({"two": two, "main": sfu(path_prefixes=["/a"])}, ["sfus (which is the first)"]),
        ({"main": sfu(path_prefixes=["/a"]), "two": two, "new": sfu(keys={"APInew": SECRET})}, []),
    ):
        assert reloadable_changes(old, from_mapping(good(sfus=sfus))) == (not named, named)
    assert reloadable_changes(old, from_mapping(good(sfus={"main": sfu(path_prefixes=["/a"]), "two": two}, matrixrtc={"enabled": False}))) == (
        False,
        ["matrixrtc.enabled"],
    )
    proxies = from_mapping(good(sfus={"main": sfu(path_prefixes=["/a"]), "two": two}, listen={"trusted_proxies": []}))
    assert reloadable_changes(old, proxies) == (False, ["listen.trusted_proxies"])


def test_what_needs_a_restart_keeps_its_old_value() -> None:
    """After a reload everything else is new, and the next reload names the same keys again."""
    old = from_mapping(good(sfus={"main": sfu(path_prefixes=["/a"]), "two": sfu(keys={"APItwo": SECRET})}))
    new = from_mapping(
        good(
            sfus={"two": sfu(keys={"APItwo": SECRET}, path_prefixes=["/b"]), "main": sfu(url="wss://new", path_prefixes=["/c", "/a"])},
            homeservers=[{"name": "b.org"}],
            listen={"port": 1},
            admin={"port": 2},
            database="sqlite:///y.db",
            postgresql={"instance": "two"},
            encryption={"keys": [new_key()]},
            log={"format": "json", "level": "debug"},
            timeouts={"connect": 1, "request": 9},
            matrixrtc={"enabled": False, "other_homeservers": False},
            limits={"user_rate": 0.5},
        )
    )
    now = reloaded(old, new)
    assert now.matrixrtc_paths == old.matrixrtc_paths == {"": "main", "/a": "main"}
    assert (now.listen, now.admin, now.database, now.encryption) == (old.listen, old.admin, old.database, old.encryption)
    assert now.postgresql == old.postgresql
    assert (now.log.format, now.log.level) == (old.log.format, "debug")
    assert (now.timeouts.connect, now.timeouts.request) == (old.timeouts.connect, 9.0)
    assert (now.matrixrtc.enabled, now.matrixrtc.other_homeservers) == (True, False)
    assert (now.sfus["main"].url, now.homeservers, now.limits.user_rate) == ("wss://new", new.homeservers, 0.5)
    assert reloadable_changes(old, now) == (True, [])
    assert reloadable_changes(now, new) == reloadable_changes(old, new)


def test_an_sfu_that_is_taken_out_is_gone_with_its_paths() -> None:
    """A reload never keeps an SFU alive that the file does not have, nor gives a new one paths before the restart."""
    old = from_mapping(good(sfus={"main": sfu(path_prefixes=["/a"])}))
    now = reloaded(old, from_mapping(good(sfus={"two": sfu(keys={"APItwo": SECRET}, path_prefixes=["/a", "/b"])})))
    assert now.matrixrtc_paths == {"": "two"}


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates() | st.binary(max_size=5)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10) | scalars, inner, max_size=4), max_leaves=10
)
names = st.sampled_from(
    [
        *Config.model_fields,
        "main",
        "url",
        "keys",
        "name",
        "as_token",
        "hs_token",
        "registration_file",
        "look_after",
        "port",
        "MISSING",
        "0",
        "1",
        "x",
        "_env_file",
    ]
)
shaped = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5), max_leaves=20)


def outcome(data: object, environ: Mapping[str, str]) -> None:
    problems: tuple[Problem, ...] | None = None
    try:
        config = from_mapping(data, environ)
        warnings(config)
        config.policy()
    except ConfigInvalid as error:
        problems = error.problems
    assert problems is None or (problems and all(problem.problem and problem.remedy for problem in problems))


@settings(max_examples=150, deadline=None)
@given(anything | shaped | st.dictionaries(st.sampled_from(list(Config.model_fields)), shaped | anything))
def test_any_data_is_good_or_a_list_of_problems(data: object) -> None:
    """No data raises anything but ConfigInvalid."""
    outcome(data, {})


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Config.model_fields)), shaped))
def test_anything_beside_good_keys_is_good_or_a_list_of_problems(data: dict[str, Any]) -> None:
    """The same where the rest is valid, so that the deeper checks are reached."""
    outcome({**good(), **data}, {})


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.lists(names | st.text(max_size=5), min_size=1, max_size=4).map(lambda parts: "SFU_DELEGATE_" + "__".join(parts)),
        st.text(max_size=20) | anything.map(lambda value: repr(value)),
        max_size=4,
    )
)
def test_any_environment_is_good_or_a_list_of_problems(environ: dict[str, str]) -> None:
    """No variable raises anything but ConfigInvalid."""
    outcome(good(), environ)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text()
    | st.text(alphabet="sfumain: \n-[]{}'\"&*!#|>%@`,?0")
    | st.builds(lambda at, insert: GOOD[:at] + insert + GOOD[at:], st.integers(0, len(GOOD)), st.text(max_size=3))
)
def test_any_text_is_good_or_a_list_of_problems(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """No file raises anything but ConfigInvalid."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigInvalid):
        load(path)


def test_a_small_file_that_stands_for_an_endless_one_is_refused(tmp_path: Path) -> None:
    """Aliases of aliases: said at once, without building what they stand for."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    problems = problems_of_text(tmp_path, "\n".join(lines))
    assert any("more than 100000 values" in str(problem) for problem in problems.values())


@pytest.mark.parametrize(
    ("homeserver", "key"),
    [
        ({"name": "hs.test:99999"}, "homeservers[0].name"),
        ({"name": "hs.test", "url": "https://hs.test:0"}, "homeservers[0].url"),
        ({"name": "hs.test", "url": "https://hs.test/" + "x" * 3000}, "homeservers[0].url"),
        ({"name": "hs.test", "url": "https://bücher.example"}, "homeservers[0].url"),
    ],
)
def test_what_could_not_be_served_is_no_good_configuration(homeserver: dict[str, str], key: str) -> None:
    """`serve` must not refuse what `check-config` calls good."""
    with pytest.raises(ConfigInvalid) as refused:
        from_mapping({"sfus": {"main": {"url": "wss://sfu.test", "keys": {"APIkey": "s" * 32}}}, "homeservers": [homeserver]})
    assert key in [problem.key for problem in refused.value.problems]


def test_a_host_may_have_an_underscore() -> None:
    """Containers are named so."""
    config = from_mapping(
        {
            "sfus": {"main": {"url": "ws://livekit_main:7880", "keys": {"APIkey": "s" * 32}}},
            "homeservers": [{"name": "hs.test", "url": "http://synapse_main:8008"}],
        }
    )
    assert config.homeservers[0].url == "http://synapse_main:8008"


def test_a_certificate_file_has_to_hold_certificates(tmp_path: Path) -> None:
    """Said by `check-config`, not only at the first request."""
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    with pytest.raises(ConfigInvalid) as refused:
        from_mapping(
            {
                "sfus": {"main": {"url": "wss://sfu.test", "keys": {"APIkey": "s" * 32}}},
                "homeservers": [{"name": "hs.test", "ca_file": str(file)}],
            }
        )
    assert [problem.key for problem in refused.value.problems] == ["homeservers[0].ca_file"]


def test_a_key_file_is_read_as_livekit_reads_it(tmp_path: Path) -> None:
    """Values are text as they are written, also those that YAML would take for numbers; what is wrong is said by its line, without the secret."""
    file = tmp_path / "keys.yaml"
    file.write_text("APIone: 01234567890123456789012345678901\n7: secret-of-a-key-that-looks-like-a-number\n")
    mapping = {"sfus": {"main": {"url": "wss://sfu.test", "key_file": str(file)}}, "homeservers": [{"name": "hs.test"}]}
    keys = from_mapping(mapping).sfus["main"].keys
    assert {key: secret.get_secret_value() for key, secret in keys.items()} == {
        "APIone": "01234567890123456789012345678901",
        "7": "secret-of-a-key-that-looks-like-a-number",
    }
    file.write_text("APIone: one-secret\nAPIone: hunter2\n")
    with pytest.raises(ConfigInvalid) as refused:
        from_mapping(mapping)
    (problem,) = refused.value.problems
    assert "line 2" in problem.problem
    assert "hunter2" not in str(problem)
