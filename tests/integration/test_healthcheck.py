"""`sfu-delegate healthcheck` tells by its exit code, and in a line, whether the daemon of a configuration is well."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from sfu_delegate.cli import app
from sfu_delegate.operate.healthcheck import check
from typer.testing import CliRunner

from tests.integration.daemon import Site, broken_database, open_site, until


def configuration(directory: Path, **admin: object) -> Path:
    """A file with the section `admin`, and what else only the daemon may be able to use."""
    file = directory / "delegate.yaml"
    file.write_text(yaml.safe_dump({"admin": admin, "sfus": {"main": {"url": "wss://sfu.example.org", "key_file": "/not/for/us"}}}))
    return file


async def ask(config: Path, *, ready: bool = False) -> tuple[bool, str]:
    return await asyncio.to_thread(check, config, {}, ready=ready)


def port_of(site: Site) -> int:
    return site.daemon.admin_port


async def test_a_daemon_that_is_well(tmp_path: Path) -> None:
    """It lives, and is ready; no secret of the configuration was needed, nor the token."""
    async with open_site(tmp_path, admin={"token": "a-token-of-the-operator-that-nobody-else-has"}) as site:
        await until(lambda: len(site.daemon.actions.conditions) >= 2, "all were asked")
        config = configuration(tmp_path, port=port_of(site), token_file="/not/for/us")
        assert await ask(config) == (True, f"It lives, at http://127.0.0.1:{port_of(site)}.")
        assert await ask(config, ready=True) == (True, "It is ready.")


async def test_a_token_that_is_none_is_neither_sent_nor_shown(tmp_path: Path) -> None:
    """Health is told without one. Commands that need it say what is wrong with it, and not what it is."""
    for text in ("its-first-line\nand-more", "its-first-line-\u20ac"):
        (tmp_path / "token").write_text(text, encoding="utf-8")
        async with open_site(tmp_path) as site:
            config = configuration(tmp_path, port=port_of(site), token_file=str(tmp_path / "token"))
            assert (await ask(config))[0]
            refused = await asyncio.to_thread(CliRunner().invoke, app, ["status", "-c", str(config)])
        assert refused.exit_code == 3
        assert "printable ASCII" in refused.output
        assert "its-first-line" not in refused.output


async def test_over_the_socket(tmp_path: Path) -> None:
    """Where the daemon listens there only."""
    path = tmp_path / "admin.sock"
    async with open_site(tmp_path, admin={"tcp": False, "socket": str(path)}):
        assert await ask(configuration(tmp_path, tcp=False, socket=str(path))) == (True, f"It lives, at unix:{path}.")
    well, line = await ask(configuration(tmp_path, tcp=False, socket=str(path)))
    assert not well
    assert line.startswith(f"There is no socket {path}.")


async def test_without_a_database_it_lives_and_is_not_ready(tmp_path: Path) -> None:
    """To restart it would help nobody; the line says what the trouble is."""
    async with open_site(tmp_path) as site:
        config = configuration(tmp_path, port=port_of(site))
        with broken_database(site):
            await site.delegate(await site.participant())
            await until(lambda: site.daemon.inbox.trouble, "it is noticed")
            assert (await ask(config))[0]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(site.daemon._store, "save_clock_mark", site.daemon._store.atomically)
                well, line = await ask(config, ready=True)
        assert not well
        assert line == "It is not ready: its database has trouble: The database failed: database or disk is full."


async def test_what_is_down_elsewhere_is_told_and_is_no_reason(tmp_path: Path) -> None:
    """A homeserver that is away makes the daemon no less ready."""
    async with open_site(tmp_path, homeservers=[{"name": "gone.test", "url": "http://127.0.0.1:1"}]) as site:
        await until(lambda: site.daemon.actions.conditions.get(("homeserver", "gone.test")), "it was asked")
        well, line = await ask(configuration(tmp_path, port=port_of(site)), ready=True)
        assert well
        assert line.startswith("It is ready, with trouble elsewhere: homeserver gone.test: ")


def test_nobody_is_there(tmp_path: Path) -> None:
    """Exit code 1, and one line that says what to look for."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = CliRunner().invoke(app, ["healthcheck", "--config", str(configuration(tmp_path, port=port))])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert f"http://127.0.0.1:{port}" in result.stderr


@contextmanager
def somebody_else(answer: bytes) -> Iterator[int]:
    """Another program at the port, which gives this answer to one request."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{"status":"up"}',
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n{",
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
    ],
)
@pytest.mark.parametrize("ready", [False, True])
def test_somebody_else_is_there(tmp_path: Path, answer: bytes, ready: bool) -> None:
    """What is no sfu-delegate is not well, whatever it answers."""
    with somebody_else(answer) as port:
        well, line = check(configuration(tmp_path, port=port), {}, ready=ready)
    assert not well
    assert f"http://127.0.0.1:{port}" in line


def test_a_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    """The problem is the one of `check-config`."""
    config = configuration(tmp_path, port="many")
    result = CliRunner().invoke(app, ["healthcheck", "--config", str(config)])
    assert result.exit_code == 1
    assert "admin.port" in result.stderr
    result = CliRunner().invoke(app, ["healthcheck", "--config", str(tmp_path / "none")])
    assert (result.exit_code, "cannot be read" in result.stderr) == (1, True)


def test_a_token_that_is_a_credential_is_not_needed(tmp_path: Path) -> None:
    """Where the service manager keeps it, a probe does not see it, and asks without."""
    config = configuration(tmp_path, port=1, token_file="${CREDENTIALS_DIRECTORY}/sfu-delegate.admin-token")
    assert check(config, {})[0] is False
    assert check(config, {"CREDENTIALS_DIRECTORY": str(tmp_path)})[0] is False
