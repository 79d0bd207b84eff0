"""The operator's commands at a running daemon: over its socket and over TCP, for people and for programs."""

import asyncio
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sfu_delegate.cli import app
from sfu_delegate.config import ConfigInvalid
from sfu_delegate.livekit.names import room_name
from sfu_delegate.operate import admin, commands
from sfu_delegate.sandbox.homeserver import End
from typer.testing import CliRunner, Result

from tests.integration.daemon import GENEROUS, MATRIX_ROOM, broken_database, open_site

TOKEN = "the-admin-token-that-nobody-else-may-see"
NASTY = "e\x1b[2J\u202evil[bold]\x9b"
HARMLESS = "e\\x1b[2J\\u202evil[bold]\\x9b"


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine is in Kathmandu, which nobody has by chance."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Kathmandu")
        patch.delenv("SFU_DELEGATE_CONFIG", raising=False)
        time.tzset()
        yield
    time.tzset()


async def run(*arguments: object) -> Result:
    """A command, beside the daemon."""
    result = await asyncio.to_thread(CliRunner().invoke, app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def socket(directory: Path) -> Path:
    return directory / "admin.sock"


def at_socket(directory: Path) -> tuple[str, ...]:
    """The options that name it."""
    return ("--admin", f"unix:{socket(directory)}")


def with_socket(directory: Path) -> dict[str, Any]:
    """What the configuration says."""
    return {"admin": {"socket": str(socket(directory))}}


def ids(result: Result) -> list[str]:
    """What `cut -f 1` gives."""
    return [line.split("\t")[0] for line in result.stdout.splitlines()]


def strings(value: Any) -> Iterator[str]:
    """All that there are in JSON, without `room ` before them."""
    if isinstance(value, str):
        yield value.removeprefix("room ")
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


# ── questions ──


async def test_the_status_of_a_daemon_that_is_well(tmp_path: Path) -> None:
    """0, and the verdict first; as JSON what the API answers."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        await site.in_call(await site.participant("alice"))
        shown, data = await run("status", *at_socket(tmp_path)), await run("status", *at_socket(tmp_path), "--json")
    assert (shown.exit_code, data.exit_code) == (0, 0)
    assert shown.stdout.startswith("ok: sfu-delegate ")
    assert "Times are in UTC+05:45." in shown.stdout
    assert json.loads(data.stdout)["events"]["live_by_presence"]["connected"] == 1


async def test_the_status_of_a_daemon_whose_database_fails(tmp_path: Path) -> None:
    """1, and what it does; lists are answered all the same, as they read beside the engine."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        with broken_database(site):
            shown = await run("status", *at_socket(tmp_path))
    assert shown.exit_code == 1
    assert shown.stdout.startswith("unavailable: ")
    assert "  ! The database takes nothing: " in shown.stdout


async def test_lists_are_lines_for_programs(tmp_path: Path) -> None:
    """With the id in the first column, filtered, page by page; nothing is 1."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        first = await site.in_call(await site.participant("alice"))
        bob = await site.participant("bob")
        second = await site.in_call(bob)
        await site.leave(bob)
        await site.done(second)
        at = at_socket(tmp_path)
        both = [second["id"], first["id"]]
        assert ids(await run("list", *at)) == ids(await run("list", *at, "--all")) == both
        assert ids(await run("list", *at, "--open", "--newer-than", "1h")) == ids(await run("list", *at, "--presence", "connected")) == both[1:]
        assert ids(await run("list", *at, "--finished")) == ids(await run("list", *at, "--outcome", "sent,lost")) == both[:1]
        one = await run("list", *at, "--limit", 1)
        assert (ids(one), one.exit_code) == (both[:1], 0)
        assert "--all shows them" in one.stderr
        for nothing in (("--room", "other"), ("--older-than", "2h")):
            none = await run("list", *at, *nothing)
            assert (none.exit_code, none.stdout, none.stderr) == (1, "", "No delegations match.\n")
        data = json.loads((await run("list", *at, "--json")).stdout)
        assert [event["id"] for event in data["events"]] == both
        fields = (await run("list", *at)).stdout.splitlines()[1].split("\t")
        assert fields[2:5] == ["live", "-", "connected"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+05:45", fields[5])
        rooms = await run("rooms", *at)
        assert rooms.stdout.split("\t")[:6] == ["main", "call", "1", "0", "0", "0"]


async def test_all_pages_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, each is there once."""
    monkeypatch.setattr(commands, "PAGE", 2)
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        made = [(await site.in_call(await site.participant(f"p{number}", f"room {number}")))["id"] for number in range(5)]
        at = at_socket(tmp_path)
        assert ids(await run("list", *at, "--all")) == ids(await run("list", *at, "--limit", 5)) == made[::-1]
        assert ids(await run("list", *at, "--limit", 3)) == made[:1:-1]
        rooms = json.loads((await run("rooms", *at, "--all", "--json")).stdout)["rooms"]
        assert [room["room"] for room in rooms] == [f"room {number}" for number in range(5)]


async def test_why_somebody_is_gone_is_explained(tmp_path: Path) -> None:
    """By the Matrix room, and by the user alone; around a time of day, and since a while."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        bob = await site.participant("bob", room_name(MATRIX_ROOM))
        given = await site.in_call(bob)
        await site.leave(bob)
        await site.done(given)
        at = at_socket(tmp_path)
        by_room, by_user = await run("explain", "--room", MATRIX_ROOM, *at), await run("explain", "--user", "bob", *at)
        minute = time.strftime("%H:%M")
        then = await run("explain", "--user", "bob", "--at", minute, *at)
        before = await run("explain", "--user", "bob", "--at", time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - 86_400)), *at)
        since = await run("explain", "--user", "bob", "--since", "1h", "--limit", "1", *at)
        data = json.loads((await run("explain", "--user", "bob", "--json", *at)).stdout)
    assert by_room.stdout.splitlines()[2:] == by_user.stdout.splitlines()[2:]
    assert "the client hung up, or its tab was closed or reloaded (CLIENT_INITIATED)" in by_room.stdout
    assert re.search(r"\n> \d\d:\d\d:\d\d  Gone: the client hung up", then.stdout)
    assert "── the time that you ask about ──" in then.stdout
    assert (before.exit_code, since.exit_code) == (1, 0)
    assert before.stdout.startswith("Nothing is known of user bob within 5 min of ")
    assert "6 lines before" in since.stdout
    assert [line["what"] for line in data["participants"][0]["story"]][-1] == "sent"


async def test_a_user_who_was_not_named_in_full_is_suggested(tmp_path: Path) -> None:
    """By the beginning of the name, and only where nothing is found."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        await site.in_call(await site.participant("@alice:hs.test:DEVICE"))
        at = at_socket(tmp_path)
        short, full, other = [await run("explain", "--user", user, *at) for user in ("alice", "@alice:hs.test", "bob")]
    assert (short.exit_code, full.exit_code, other.exit_code) == (1, 0, 1)
    assert "A Matrix user is written @name:server. Is it one of these? @alice:hs.test\n" in short.stdout
    assert "one of these" not in full.stdout + other.stdout


async def test_who_never_delegated_is_explained(tmp_path: Path) -> None:
    """1, with the room's name at LiveKit, and how long it would be known."""
    async with open_site(tmp_path, **with_socket(tmp_path)):
        nobody = await run("explain", "--room", "!other:hs.test", "--user", "@a:hs.test", *at_socket(tmp_path))
    assert nobody.exit_code == 1
    assert f"Searched, too: {room_name('!other:hs.test')}" in nobody.stdout
    assert "kept for 7 d" in nobody.stdout


async def test_names_do_no_harm(tmp_path: Path) -> None:
    """Whatever a client calls itself and its room, nothing that a terminal obeys comes out: lines, stories and JSON."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        given = await site.in_call(await site.participant(NASTY, f"room {NASTY}", user="@alice:hs.test"))
        at = at_socket(tmp_path)
        asked = [("list",), ("rooms",), ("show", given["id"]), ("explain", "--room", f"room {NASTY}"), ("explain", "--user", NASTY)]
        for arguments in [*asked, ("end", given["id"])]:
            result = await run(*arguments, *at)
            assert result.exit_code == 0
            assert HARMLESS in result.stdout
            assert re.sub(r"[\n\t]", "", result.output).isprintable()
        for arguments in asked:
            text = (await run(*arguments, *at, "--json")).stdout
            assert text.replace("\n", "").isprintable()
            assert NASTY in list(strings(json.loads(text)))


# ── changes ──


async def test_a_delegation_is_ended_and_another_one_released(tmp_path: Path) -> None:
    """What will happen, and what has; by id and by row, each once; over already is no mistake."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        alice, bob = await site.participant("alice"), await site.participant("bob")
        first, second = await site.in_call(alice), await site.in_call(bob)
        at = at_socket(tmp_path)
        row = json.loads((await run("show", first["id"], *at, "--json")).stdout)["events"][0]["row"]
        ended = await run("end", first["id"], row, *at)
        assert site.event(alice).end is End.SENT
        released = await run("release", second["id"], "--json", *at)
        assert site.event(bob).end is End.PENDING
        again = await run("end", first["id"], second["id"], *at)
        missing = await run("end", "dlg_nothing", first["id"], "--json", *at)
        assert len(site.lines("operator_ended")) == 1
    assert ended.exit_code == 0
    assert "hs.test is told to send the leave event now. The participant will be shown as gone, though it is in the call now." in ended.stdout
    assert ended.stdout.count(f"{first['id']}: sent. ") == 1
    told = json.loads(released.stdout)
    assert (released.exit_code, told["ok"], told["delegations"][0]["changed"]) == (0, True, 1)
    assert again.exit_code == 0
    assert again.stdout.count("it was over already") == 2
    told = json.loads(missing.stdout)
    assert (missing.exit_code, told["ok"], len(told["delegations"])) == (1, False, 1)
    assert "dlg_nothing: There is no such delegation" in told["problems"][0]


async def test_an_end_that_does_not_get_through_says_what_it_waits_for(tmp_path: Path) -> None:
    """1 after the wait, and 0 where nobody waits: the daemon goes on trying."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        given = await site.in_call(await site.participant("alice"))
        await site.homeserver.call("faults", down=True)
        waited = await run("end", given["id"], "--wait", "300ms", *at_socket(tmp_path))
        at_once = await run("end", given["id"], "--wait", "0", *at_socket(tmp_path))
    assert (waited.exit_code, at_once.exit_code) == (1, 0)
    assert f"{given['id']}: not yet: Gone for " in waited.stdout
    assert "The daemon goes on trying." in waited.stdout


# ── who may, and who is there ──


async def test_over_tcp_the_token_counts(tmp_path: Path) -> None:
    """Of a file; without it, or with a wrong one, 3 with what to do, and the token is never shown."""
    right, wrong, bad = tmp_path / "right", tmp_path / "wrong", tmp_path / "bad"
    right.write_text(TOKEN + "\n")
    wrong.write_text("wrong")
    bad.write_text("two\nlines")
    async with open_site(tmp_path, admin={"token": TOKEN}) as site:
        site.secrets.add(TOKEN)
        given = await site.in_call(await site.participant("alice"))
        url = f"http://127.0.0.1:{site.daemon.admin_port}"
        for more, said in (
            ((), "Here: --token-file FILE"),
            (("--token-file", wrong), "The admin token is needed"),
            (("--token-file", bad), "must hold the token, in one line"),
            (("--token-file", tmp_path / "none"), "cannot be read: No such file or directory"),
        ):
            refused = await run("status", "--admin", url, *more)
            assert (refused.exit_code, refused.stdout) == (3, "")
            assert said in refused.stderr
        assert (await run("end", given["id"], "--admin", url, "--token-file", wrong)).exit_code == 3
        assert (await site.show(given))["state"] == "live"
        assert (await run("end", given["id"], "--admin", url, "--token-file", right)).exit_code == 0
        assert TOKEN not in (await run("status", "--admin", url, "--token-file", right, "--json")).output


async def test_without_a_token_nothing_is_changed_over_tcp(tmp_path: Path) -> None:
    """1: refused, with what proves who asks."""
    async with open_site(tmp_path) as site:
        given = await site.in_call(await site.participant("alice"))
        refused = await run("release", given["id"], "--admin", f"http://127.0.0.1:{site.daemon.admin_port}")
        assert (await site.show(given))["state"] == "live"
    assert refused.exit_code == 1
    assert "use the Unix socket (admin.socket), or set admin.token" in refused.stderr


async def test_the_configuration_says_whom_to_ask(tmp_path: Path) -> None:
    """Its section `admin` alone: the rest may be wrong, and its secrets missing. With a file for the token, that is read."""
    config, token = tmp_path / "delegate.yaml", tmp_path / "token"
    token.write_text(TOKEN)
    async with open_site(tmp_path, admin={"token": TOKEN}) as site:
        config.write_text(f"admin: {{port: {site.daemon.admin_port}, token_file: {token}}}\nsfus: {{main: {{key_file: /nowhere}}}}\n")
        assert (await run("status", "-c", config)).exit_code == 0
        config.write_text(f"admin: {{port: {site.daemon.admin_port}}}\n")
        assert (await run("status", "-c", config, "--token-file", token)).exit_code == 0
        assert (await run("status", "-c", config)).exit_code == 3


@pytest.mark.parametrize("command", [["status"], ["list"], ["rooms"], ["show", "1"], ["explain", "--user", "a"], ["end", "1"], ["release", "1"]])
async def test_a_daemon_that_is_not_there(tmp_path: Path, command: list[str]) -> None:
    """3, with where it was looked for and what to do; for programs as JSON."""
    shown = await run(*command, *at_socket(tmp_path))
    assert (shown.exit_code, shown.stdout) == (3, "")
    assert shown.stderr == f"problem: There is no socket {socket(tmp_path)}. Is the daemon running, with this configuration?\n"
    data = await run(*command, *at_socket(tmp_path), "--json")
    assert (data.exit_code, json.loads(data.stdout)["ok"]) == (3, False)


async def test_a_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    """3, with its problems, and how to do without."""
    for text in (None, "admin: {port: eighty}\n"):
        config = tmp_path / "delegate.yaml"
        if text:
            config.write_text(text)
        result = await run("status", "-c", config)
        assert result.exit_code == 3
        assert "name the admin listener: --admin" in result.stderr


def test_only_a_file_that_is_certainly_missing_means_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory that may not be entered there may be one, and it may name another listener."""

    def stat(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    assert admin.find(tmp_path / "none", {}, may_be_missing=True).place == "http://127.0.0.1:8081"
    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(ConfigInvalid, match="Permission denied"):
        admin.find(tmp_path / "none", {}, may_be_missing=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain"], "name the room, the user, or both"),
        (["explain", "--user", "a", "--at", "noon"], "such as 10:42"),
        (["explain", "--user", "a", "--at", "10:42", "--since", "1h"], "goes without --since"),
        (["list", "--older-than", "yesterday"], "such as 500ms, 30s"),
        (["status", "--watch"], "needs a terminal"),
        (["list", "--admin", "ftp://x"], "http://HOST:PORT or unix:/PATH"),
        (["list", "--admin", "unix:"], "http://HOST:PORT or unix:/PATH"),
        (["show", "\udcff"], "no text"),
        (["explain", "--room", "\udcff"], "no text"),
        (["show"], "Missing argument"),
    ],
)
async def test_wrong_usage(arguments: list[str], said: str) -> None:
    """2, with what to write (a listener that is none cannot be asked: 3)."""
    result = await run(*arguments)
    assert result.exit_code == (3 if "--admin" in arguments else 2)
    assert said in " ".join(result.stderr.split())


async def test_a_filter_that_is_not_understood_is_wrong_usage(tmp_path: Path) -> None:
    """The daemon knows which words there are."""
    async with open_site(tmp_path, **with_socket(tmp_path)):
        result = await run("list", "--state", "happy", *at_socket(tmp_path))
    assert result.exit_code == 2
    assert "state cannot be happy: it is one of live, ending" in result.stderr


# ── terminals and pipes ──


class Terminal:
    """A command on a terminal of its own, of 100 columns."""

    def __init__(self, *arguments: object) -> None:
        self._ours, theirs = pty.openpty()
        environ = {**os.environ, "COLUMNS": "100", "TERM": "xterm", "NO_COLOR": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        environ.pop("NO_COLOR")
        command = [sys.executable, "-m", "sfu_delegate.cli", *(str(argument) for argument in arguments)]
        self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True)
        os.close(theirs)
        self.text = ""

    async def until(self, said: str) -> None:
        """It has written that."""
        await asyncio.to_thread(self._read, said)

    def _read(self, said: str | None) -> None:
        deadline = time.monotonic() + GENEROUS
        while said is None or said not in self.text:
            ready, _, _ = select.select([self._ours], [], [], deadline - time.monotonic())
            assert ready, f"{said!r} is not written: {self.text}"
            try:
                more = os.read(self._ours, 65_536)
            except OSError:  # the other end is closed
                more = b""
            if not more:
                assert said is None, f"{said!r} was not written: {self.text}"
                return
            self.text += more.decode()

    def type(self, text: str) -> None:
        """As a person does."""
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(2)

    async def ended(self) -> int:
        """Its exit code."""
        await asyncio.to_thread(self._read, None)
        os.close(self._ours)
        return self._process.wait(GENEROUS)


async def test_on_a_terminal_there_is_a_table_and_a_question(tmp_path: Path) -> None:
    """Whoever says no changes nothing; with colours, and no markup in names."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        given = await site.in_call(await site.participant(NASTY, "call", user="@alice:hs.test"))
        table = Terminal("list", *at_socket(tmp_path))
        asked = Terminal("end", given["id"], *at_socket(tmp_path))
        await asked.until("End 1 delegation? [y/N]")
        asked.type("n\n")
        assert (await table.ended(), await asked.ended()) == (0, 1)
        assert (await site.show(given))["state"] == "live"
        watched = Terminal("status", "--watch", *at_socket(tmp_path))
        await watched.until("Times are in")
        watched.interrupt()
        assert await watched.ended() == 0
    assert "Homeserver" in table.text
    assert HARMLESS in table.text
    assert NASTY not in table.text
    assert "Nothing was done." in asked.text
    assert "\x1b[32m" in watched.text or "\x1b[1;32m" in watched.text
    assert "Traceback" not in watched.text


async def test_a_reader_that_goes_away_is_no_trouble(tmp_path: Path) -> None:
    """As in `sfu-delegate list | head -1`: no traceback, whatever is still to be written."""
    async with open_site(tmp_path, **with_socket(tmp_path)) as site:
        await site.in_call(await site.participant("alice"))
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "sfu_delegate.cli", "list", *at_socket(tmp_path)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = await asyncio.to_thread(subprocess.run, command, stdout=writing, stderr=subprocess.PIPE, env=environ, check=False)
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
