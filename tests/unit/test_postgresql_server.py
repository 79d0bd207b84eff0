"""The PostgreSQL that tests run on: it does what it is told, and leaves nothing behind."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests import postgresql
from tests.integration.certificates import Certificates
from tests.postgresql import Server, Tls, several

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One with a password, for all tests of this file."""
    with Server(password="secret") as server:
        yield server


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    """A database with a table of one row."""
    with server.database(one_row) as url:
        yield url


def one_row(url: str) -> None:
    with psycopg.connect(url, password="secret") as connection:
        connection.execute("CREATE TABLE version (number integer)")
        connection.execute("CREATE TABLE thing (id bigint GENERATED ALWAYS AS IDENTITY, name text)")
        connection.execute("INSERT INTO thing (name) VALUES ('first')")
        connection.execute("INSERT INTO version VALUES (7)")


def names(connection: psycopg.Connection[tuple[str]]) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM thing ORDER BY id")]


def test_a_password_is_needed_where_there_is_one(server: Server, url: str) -> None:
    """And a wrong one is refused."""
    for password in ("wrong", ""):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(url, password=password)
    with psycopg.connect(url, password="secret") as connection:
        assert names(connection) == ["first"]
        assert connection.execute("SELECT current_user, rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == ("delegate", False)


def test_databases_are_copies_of_the_first_one_and_do_not_share_anything(server: Server, url: str) -> None:
    """What is written to one is not in another."""
    with psycopg.connect(url, password="secret") as connection:
        connection.execute("INSERT INTO thing (name) VALUES ('mine')")
    with server.database(one_row) as other, psycopg.connect(other, password="secret") as connection:
        assert names(connection) == ["first"]


def test_an_emptied_database_is_as_new(server: Server, url: str) -> None:
    """Ids begin again, and the version is still there."""
    server.empty(url, but="version")
    assert server.query(url, "SELECT * FROM version") == [(7,)]
    server.query(url, "INSERT INTO thing (name) VALUES ('again')")
    assert server.query(url, "SELECT * FROM thing") == [(1, "again")]


def test_a_dump_has_what_was_stored_and_deleted(server: Server, url: str) -> None:
    """Also where it is compressed."""
    server.query(url, "INSERT INTO thing (name) SELECT string_agg('needle' || n, ' ') FROM generate_series(1, 5000) n")
    server.query(url, "DELETE FROM thing WHERE name = 'first'")
    dump = server.dump(url)
    assert b"needle4999" in dump
    assert b"first" in dump
    assert b"nowhere" not in dump


def test_backends_are_terminated(server: Server, url: str) -> None:
    """Of one database only."""
    with (
        server.database(one_row) as other,
        psycopg.connect(other, password="secret") as there,
        psycopg.connect(url, password="secret") as here,
    ):
        assert server.terminate_backends(url) == 1
        with pytest.raises(psycopg.OperationalError):
            here.execute("SELECT 1")
        assert names(there) == ["first"]


@pytest.mark.parametrize("end", ["fast", "immediate", "kill"])
def test_what_was_committed_survives_every_end(server: Server, url: str, end: str) -> None:
    """On the same port as before; nobody is connected any more, and meanwhile nobody can connect."""
    with psycopg.connect(url, password="secret") as connection:
        connection.execute("INSERT INTO thing (name) VALUES ('second')")
        connection.commit()
        match end:
            case "kill":
                server.kill()
            case "fast":
                server.stop()
            case _:
                server.stop("immediate")
        assert not server.running
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(url, password="secret")
    server.start()
    with psycopg.connect(url, password="secret") as connection:
        assert names(connection) == ["first", "second"]


def test_a_hung_server_answers_when_it_goes_on(server: Server, url: str) -> None:
    """And not before."""
    with psycopg.connect(url, password="secret") as connection:
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.extend(names(connection)))
        with server.hung():
            asking.start()
            asking.join(0.2)
            assert found == []
            with pytest.raises(psycopg.OperationalError, match="timeout"):
                psycopg.connect(url, password="secret", connect_timeout=2)
        asking.join()
        assert found == ["first"]


def test_a_standby_takes_over_with_all_that_was_acknowledged() -> None:
    """When the first server is killed. A URL of both leads to the one that takes changes."""
    with Server() as first:
        url = first.create_database(one_row)
        with first.standby() as second:
            both = several(postgresql.name_in(url), first, second)
            with psycopg.connect(both) as connection:
                connection.execute("INSERT INTO thing (name) VALUES ('second')")
            assert second.query(second.url(postgresql.name_in(url)), "SELECT pg_is_in_recovery()") == [(True,)]
            first.kill()
            with pytest.raises(psycopg.OperationalError, match="read-only"):
                psycopg.connect(both)
            second.promote()
            with psycopg.connect(both) as connection:
                assert names(connection) == ["first", "second"]
                connection.execute("INSERT INTO thing (name) VALUES ('third')")


def test_tls_is_verified_and_required(server: Server, url: str, tmp_path: Path) -> None:
    """With the certificate of another name, another authority, or without TLS there is no connection."""
    certificates = Certificates(tmp_path)
    (tmp_path / "other").mkdir()
    others = Certificates(tmp_path / "other")
    with Tls(server, certificates.server("localhost")) as tls:
        known = {"password": "secret", "port": str(tls.port), "host": "localhost", "sslmode": "verify-full"}
        with psycopg.connect(make_conninfo(url, **known, sslrootcert=str(certificates.ca_file))) as connection:
            assert names(connection) == ["first"]
            assert connection.pgconn.ssl_in_use
        for wrong, reason in (
            ({"sslrootcert": str(others.ca_file)}, "certificate verify failed"),
            ({"sslrootcert": str(certificates.ca_file), "host": "127.0.0.1"}, "does not match"),
            ({"sslmode": "disable"}, "TLS is required"),
        ):
            with pytest.raises(psycopg.OperationalError, match=reason):
                psycopg.connect(make_conninfo(url, **known | wrong))


LEAVES_A_SERVER = """
import os, signal, sys
from tests.postgresql import Server, shared
other = Server().__enter__()
print(shared().directory, other.directory, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_nothing_is_left_when_the_process_has_ended(how: str) -> None:
    """However it ended: neither a server nor its folder."""
    made = subprocess.run([sys.executable, "-c", LEAVES_A_SERVER, how], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert made.stderr == ""
    folders = [Path(folder) for folder in made.stdout.split()]
    assert len(folders) == 2
    deadline = time.monotonic() + postgresql.WITHIN
    while any(folder.parent.exists() for folder in folders):
        assert time.monotonic() < deadline, "something is left"
        time.sleep(0.05)
