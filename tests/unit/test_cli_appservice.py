"""`sfu-delegate appservice` writes a registration that works at once, keeps the tokens that there are, and shows none of them."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sfu_delegate.cli import app
from sfu_delegate.config import load, warnings
from sfu_delegate.config.registration import Registration, judge, make, parse
from typer.testing import CliRunner, Result

AS_TOKEN = "hunter2-as-hunter2-as-hunter2-as-hunter2"
HS_TOKEN = "hunter2-hs-hunter2-hs-hunter2-hs-hunter2"
NAME = "example.org"
URL = "http://127.0.0.1:8080"
OURS = make(NAME, AS_TOKEN, HS_TOKEN, URL)


class Desk:
    """A directory with a configuration, in which the command runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "delegate.yaml"
        self.file = path / "sfu-delegate-registration.yaml"
        self.write({"name": NAME})

    def write(self, *homeservers: dict[str, Any], **changes: Any) -> None:
        sfu = {"url": "wss://sfu.example.org", "keys": {"APIone": "hunter2" * 8}}
        self.config.write_text(yaml.safe_dump({"sfus": {"main": sfu}, "homeservers": list(homeservers), **changes}))
        self.config.chmod(0o600)

    def put(self, text: str = OURS, mode: int = 0o600) -> None:
        self.file.write_text(text)
        self.file.chmod(mode)

    def run(self, *arguments: str, code: int = 0, environ: dict[str, str] | None = None) -> Result:
        result = CliRunner().invoke(app, ["appservice", "-c", str(self.config), *arguments], env={"SFU_DELEGATE_CONFIG": None, **(environ or {})})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code, result.output
        assert "hunter2" not in result.output
        for file in self.path.glob("*registration*"):
            for token in tokens(file.read_text()):
                assert token not in result.output
        assert [file.name for file in self.path.iterdir() if file.name.startswith(".")] == []
        return result

    def said(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run(*arguments, "--json", code=code).stdout)
        return answer

    @property
    def registration(self) -> Registration:
        return parse(self.file.read_text())


def tokens(text: str) -> list[str]:
    if len(text) > 1_000_000:
        return []  # nothing of the kind, which takes seconds to find out
    try:
        found = parse(text)
    except ValueError:
        return []
    return [found.as_token, found.hs_token]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ── what is written ──


def test_a_new_registration_is_complete_and_its_owners_alone(desk: Desk) -> None:
    """Two new tokens, everything that the daemon can use, and mode 0600 whatever the umask."""
    before = os.umask(0)
    try:
        result = desk.run()
    finally:
        os.umask(before)
    made = desk.registration
    assert list(judge(made, NAME)) == []
    assert (made.proxy_url, mode_of(desk.file)) == (URL, 0o600)
    assert [len(made.as_token), len(made.hs_token)] == [64, 64]
    assert made.as_token != made.hs_token
    assert result.stdout.startswith(f"Written: {desk.file}")


def test_what_it_says_makes_a_configuration_that_works(desk: Desk) -> None:
    """Both snippets are YAML; with ours in its place the daemon's configuration is good, and has the tokens of the file."""
    said = desk.said()
    assert set(said) == {"ok", "homeserver", "file", "action", "homeserver_yaml", "config", "notes", "next"}
    assert (said["ok"], said["homeserver"], said["file"], said["action"]) == (True, NAME, str(desk.file), "written")
    assert yaml.safe_load(said["homeserver_yaml"]) == {
        "app_service_config_files": [str(desk.file)],
        "experimental_features": {"msc4512_enabled": True, "msc4502_enabled": True},
        "max_event_delay_duration": "24h",
    }
    desk.write({"name": said["homeserver"], **yaml.safe_load(said["config"])})
    config = load(desk.config)
    [homeserver] = config.homeservers
    assert homeserver.as_token is not None
    assert homeserver.as_token.get_secret_value() == desk.registration.as_token
    assert warnings(config) == []


def test_people_are_told_the_same(desk: Desk) -> None:
    """The snippets, and the steps that are left, are on standard output; notes beside it."""
    desk.run()
    result = desk.run()
    said = desk.said()
    assert f"to the entry of {NAME}:\n\n    registration_file: {desk.file}\n" in result.stdout
    assert "homeservers:" not in result.stdout
    for part in (said["homeserver_yaml"], said["config"], *(f"{number}. {step}\n" for number, step in enumerate(said["next"], 1))):
        assert part in result.stdout
    assert "restart it" in result.stdout
    assert "Start the daemon, or reload it" in result.stdout
    assert "application_service_works" in result.stdout
    assert [f"note: {note}" for note in said["notes"]] == result.stderr.splitlines()


def test_a_configured_file_that_is_not_there_is_written(desk: Desk) -> None:
    """That is what the command is for; and what is configured need not be told."""
    file = desk.path / "elsewhere-registration.yaml"
    desk.write({"name": NAME, "registration_file": str(file)})
    said = desk.said()
    assert (said["file"], said["config"], said["action"]) == (str(file), "", "written")
    assert load(desk.config).homeservers[0].hs_token is not None
    assert not any("check-config" in step for step in said["next"])
    assert desk.said("--output", str(desk.file))["config"] != ""


def test_the_environment_counts(desk: Desk) -> None:
    """As for every other command."""
    desk.run(environ={"SFU_DELEGATE_LISTEN__PORT": "8090"})
    assert desk.registration.proxy_url == "http://127.0.0.1:8090"


# ── tokens ──


def test_tokens_of_the_configuration_are_kept(desk: Desk) -> None:
    """Those that Synapse knows already go on; what is missing is made; and the keys that have to go are named."""
    desk.write({"name": NAME, "as_token": AS_TOKEN})
    said = desk.said()
    assert desk.registration.as_token == AS_TOKEN
    assert len(desk.registration.hs_token) == 64
    assert any(note.startswith("Take as_token out of the entry of example.org") for note in said["notes"])


def test_running_it_again_changes_nothing(desk: Desk) -> None:
    """The file is not even written."""
    desk.run()
    before = desk.file.stat()
    assert desk.said()["action"] == "unchanged"
    assert desk.run().stdout.startswith("Unchanged: ")
    assert (desk.file.stat().st_ino, desk.file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_out_of_date_is_updated_and_the_tokens_stay(desk: Desk) -> None:
    """Also where the configuration has others."""
    desk.put(f"id: sfu-delegate\nurl: {URL}\nas_token: {AS_TOKEN}\nhs_token: {HS_TOKEN}\nprotocols: []\n", mode=0o640)
    desk.write({"name": NAME, "as_token": "x" * 32})
    said = desk.said()
    assert said["action"] == "updated"
    assert desk.file.read_text() == OURS
    assert any("they are others than those in the daemon's configuration" in note for note in said["notes"])
    assert any("protocols" in note for note in said["notes"])


def test_new_tokens_are_made_when_asked_for(desk: Desk) -> None:
    """In the file alone; that Synapse and the daemon need them is told."""
    desk.put()
    desk.write({"name": NAME, "registration_file": str(desk.file)})
    said = desk.said("--new-tokens")
    assert said["action"] == "updated"
    assert len({AS_TOKEN, HS_TOKEN, desk.registration.as_token, desk.registration.hs_token}) == 4
    assert any("keep to the order" in note and "M_UNKNOWN_TOKEN" in note for note in said["notes"])
    assert not any("others than those" in note for note in said["notes"])
    order = [
        next(number for number, step in enumerate(said["next"]) if part in step) for part in ("Stop the daemon", "restart it", "Start the daemon")
    ]
    assert order == sorted(order)
    assert not any("reload" in step for step in said["next"])


@pytest.mark.parametrize(
    ("before", "replaced"),
    [
        (
            ("made-by-sfu-delegate-appservice", "made-by-sfu-delegate-appservice-too"),
            "The as_token and the hs_token that stood there were placeholders",
        ),
        ((AS_TOKEN, "put-the-token-here"), "The hs_token that stood there was a placeholder"),
    ],
)
def test_placeholders_are_replaced(before: tuple[str, str], replaced: str, desk: Desk) -> None:
    """What stands in the documentation can be known to everybody; a true token beside it stays."""
    desk.put(make(NAME, *before, URL))
    desk.write({"name": NAME, "registration_file": str(desk.file)})
    said = desk.said()
    made = desk.registration
    assert said["action"] == "updated"
    assert any(note.startswith(replaced) for note in said["notes"])
    assert any("Stop the daemon" in step for step in said["next"])
    assert not any("were kept" in note for note in said["notes"])
    assert (made.as_token == AS_TOKEN, len(made.hs_token)) == (before[0] == AS_TOKEN, 64)
    assert warnings(load(desk.config)) == []
    assert desk.said()["action"] == "unchanged"


def test_placeholders_of_the_configuration_are_not_taken(desk: Desk) -> None:
    """Nor from there."""
    desk.write({"name": NAME, "as_token": "made-by-sfu-delegate-appservice", "hs_token": HS_TOKEN})
    assert any(note.startswith("The as_token that stood there was a placeholder") for note in desk.said()["notes"])
    assert len(desk.registration.as_token) == 64
    assert desk.registration.hs_token == HS_TOKEN


def test_when_nothing_changed_only_what_is_left_is_told(desk: Desk) -> None:
    """What the configuration has, and the file's mode shows, has been done."""
    desk.put(mode=0o640)
    desk.write({"name": NAME, "registration_file": str(desk.file)})
    result = desk.run()
    assert result.stdout.startswith("Unchanged: ")
    for done in ("homeserver.yaml", "registration_file:", "chown", "restart", "reload"):
        assert done not in result.stdout
    assert result.stdout.count("application_service_works") == 1
    desk.file.chmod(0o600)
    assert "chown" in desk.run().stdout
    desk.write({"name": NAME})
    result = desk.run()
    assert "registration_file:" in result.stdout
    assert "homeserver.yaml" in result.stdout


# ── files ──


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a registration"),
        ("sfus: {}\n", "is not a registration"),
        (f"as_token: {AS_TOKEN}\n", "has no hs_token"),
        ("[", "is not YAML"),
        (OURS.replace("id: sfu-delegate", "id: bridge"), "another application service"),
        ("x" * 5_000_000, "larger than 4 MiB"),
    ],
)
def test_a_file_that_is_something_else_is_never_overwritten(text: str, said: str, desk: Desk) -> None:
    """Not even for new tokens; it stays as it was, to the letter."""
    desk.put(text)
    for arguments in ([], ["--new-tokens"], ["--output", str(desk.file)]):
        result = desk.run(*arguments, code=1)
        assert said in result.stderr
        assert result.stdout == ""
        assert desk.file.read_text() == text
    answer = desk.said(code=1)
    assert answer["ok"] is False
    assert said in answer["problems"][0]


def test_mode_and_owner_stay(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who could read the file can read it afterwards."""
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _, uid, gid: seen.append((uid, gid)))
    desk.put(mode=0o640)
    before = desk.file.stat()
    desk.run("--new-tokens")
    assert (seen, mode_of(desk.file)) == ([(before.st_uid, before.st_gid)], 0o640)


@pytest.mark.parametrize(("group", "mode", "lost"), [(True, 0o640, "owner could"), (False, 0o600, "owner and its group could")])
def test_an_owner_that_cannot_be_kept_is_told(group: bool, mode: int, lost: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the former group might read, another one must not."""

    def refuse(_: int, uid: int, gid: int) -> None:
        if uid != -1 or not group:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    desk.put(mode=0o640)
    assert any(lost in note for note in desk.said("--new-tokens")["notes"])
    assert mode_of(desk.file) == mode


def test_a_file_that_everybody_can_read_is_told(desk: Desk) -> None:
    """Its mode is the operator's to change."""
    desk.put(mode=0o644)
    assert any("chmod o=" in note for note in desk.said()["notes"])


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("call", ["fsync", "publish", "fchmod"])
def test_nothing_is_half_written(call: str, there: bool, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full the old file is whole, a new one is not there, and no draft is left."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if there:
        desk.put()
    monkeypatch.setattr(os, ("replace" if there else "link") if call == "publish" else call, full)
    result = desk.run("--new-tokens", code=1)
    left = "it is as it was" if there else "nothing was written"
    assert f"cannot be written: No space left on device; {left}\n" in result.stderr
    assert (desk.file.read_text() if desk.file.exists() else None) == (OURS if there else None)


@pytest.fixture(params=["links", "no links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with and one without hard links."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


def appears(desk: Desk, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run writes the file, after this one has seen that there is none."""
    fsync = os.fsync

    def other(number: int) -> None:
        if not desk.file.exists():
            desk.put(text)
        fsync(number)

    monkeypatch.setattr(os, "fsync", other)


@pytest.mark.usefixtures("file_system")
def test_of_two_runs_at_once_one_writes_the_file(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finds what was written, and keeps its tokens."""
    appears(desk, OURS, monkeypatch)
    assert desk.said()["action"] == "unchanged"
    assert desk.file.read_text() == OURS


@pytest.mark.usefixtures("file_system")
def test_what_appears_meanwhile_is_not_given_new_tokens(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run has just told somebody that it has written them."""
    appears(desk, OURS, monkeypatch)
    assert "was not there, and is now" in desk.run("--new-tokens", code=1).stderr
    assert desk.file.read_text() == OURS


@pytest.mark.usefixtures("file_system")
def test_something_else_that_appears_meanwhile_is_left_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had been there before."""
    appears(desk, "sfus: {}\n", monkeypatch)
    assert "is not a registration" in desk.run(code=1).stderr
    assert desk.file.read_text() == "sfus: {}\n"


def test_a_place_that_was_taken_is_given_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hard links, too, nothing is there when it cannot be written."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert desk.said()["action"] == "written"
    desk.file.unlink()
    monkeypatch.setattr(os, "replace", refuse)
    assert "nothing was written" in desk.run(code=1).stderr
    assert not desk.file.exists()


def test_many_runs_at_once_agree_on_the_tokens(desk: Desk) -> None:
    """Each in a process of its own; one says that it has written the file."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SFU_DELEGATE")}
    command = [sys.executable, "-m", "sfu_delegate.cli", "appservice", "-c", str(desk.config), "--json"]
    runs = [subprocess.Popen(command, cwd=desk.path, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    actions = sorted(json.loads(run.communicate(timeout=60)[0])["action"] for run in runs)
    assert actions == ["unchanged"] * 5 + ["written"]
    assert len(desk.registration.as_token) == 64


def test_a_directory_that_is_not_there_is_told(desk: Desk) -> None:
    """It is not made: its mode and owner are the operator's."""
    assert f"there is no directory {desk.path / 'no'}" in desk.run("--output", "no/registration.yaml", code=1).stderr
    assert not (desk.path / "no").exists()


def test_what_is_no_file_is_left_alone(desk: Desk) -> None:
    """Directories, pipes, and a path through a file."""
    os.mkfifo(desk.path / "pipe")
    for path, said in ((desk.path, "Is a directory"), (desk.path / "pipe", "it is a pipe"), (desk.config / "x", "Not a directory")):
        assert said in desk.run("--output", str(path), code=1).stderr


def test_a_link_stays_a_link(desk: Desk) -> None:
    """What it leads to is written."""
    target = desk.path / "target.yaml"
    desk.file.symlink_to(target)
    assert desk.said()["file"] == str(desk.file)
    assert desk.file.is_symlink()
    assert list(judge(parse(target.read_text()), NAME)) == []


# ── for which homeserver ──


def test_of_several_homeservers_one_has_to_be_chosen(desk: Desk) -> None:
    """The choices are listed; each has a file of its own."""
    desk.write({"name": "a.org:8448"}, {"name": "b.org"}, {"name": "*.c.org"})
    result = desk.run(code=2)
    assert "--homeserver: a.org:8448, b.org" in result.stderr
    assert "*.c.org" not in result.stderr
    assert desk.said("--homeserver", "A.org:8448")["file"] == str(desk.path / "a.org_8448-registration.yaml")
    assert desk.said("--homeserver", "b.org")["file"] == str(desk.path / "b.org-registration.yaml")


@pytest.mark.parametrize(("asked", "said"), [("*.c.org", "belongs to one server"), ("d.org", "no entry of homeservers")])
def test_only_a_configured_server_can_have_one(asked: str, said: str, desk: Desk) -> None:
    """A pattern cannot, and why is said."""
    desk.write({"name": NAME}, {"name": "*.c.org"})
    result = desk.run("--homeserver", asked, code=2)
    assert said in result.stderr
    assert result.stderr.count(NAME) == 1
    assert desk.said()["homeserver"] == NAME


def test_patterns_alone_have_none(desk: Desk) -> None:
    """Nor is there anything to choose from."""
    desk.write({"name": "*.c.org"})
    assert "belongs to one server" in desk.run(code=2).stderr


def test_the_file_of_another_homeserver_is_not_taken(desk: Desk) -> None:
    """Its tokens would be lost to it."""
    desk.put(make("a.org", AS_TOKEN, HS_TOKEN, URL))
    desk.write({"name": "a.org", "registration_file": str(desk.file)}, {"name": "b.org"})
    assert "is the registration for a.org" in desk.run("--homeserver", "b.org", "--output", str(desk.file), code=2).stderr
    assert tokens(desk.file.read_text()) == [AS_TOKEN, HS_TOKEN]


def test_a_file_that_is_for_another_homeserver_by_its_namespaces_is_not_taken(desk: Desk) -> None:
    """Though the configuration does not name it; one that is for both, or for neither, is as good as any."""
    desk.write({"name": "one.example"}, {"name": "two.example"}, {"name": "*.three.example"})
    text = make("one.example", AS_TOKEN, HS_TOKEN, URL)
    desk.put(text)
    refused = f"{desk.file} is the registration for one.example: name another file with --output"
    for more in ([], ["--new-tokens"]):
        assert refused in desk.run("--homeserver", "two.example", "-o", str(desk.file), *more, code=1).stderr
        assert desk.file.read_text() == text
    desk.write({"name": "one.example"}, {"name": "two.example", "registration_file": str(desk.file)})
    assert refused in desk.run("--homeserver", "two.example", code=1).stderr
    for name in ("[a-z.]*", "four.example"):
        desk.put(text.replace(r"one\.example", name))
        assert desk.said("--homeserver", "two.example", "-o", str(desk.file))["action"] == "updated"


# ── the URL ──


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ({"host": "0.0.0.0", "port": 9000}, "http://127.0.0.1:9000"),
        ({"host": "::"}, "http://[::1]:8080"),
        ({"host": "0::0"}, "http://[::1]:8080"),
        ({"host": "2001:db8::7"}, "http://[2001:db8::7]:8080"),
        ({"host": "192.0.2.7"}, "http://192.0.2.7:8080"),
        ({"host": "delegate"}, "http://delegate:8080"),
    ],
)
def test_the_listener_is_where_requests_go(listen: dict[str, Any], url: str, desk: Desk) -> None:
    """As one connects to it; that it is this machine only, or unencrypted, is told."""
    desk.write({"name": NAME}, listen=listen)
    notes = desk.said()["notes"]
    assert desk.registration.proxy_url == url
    local = "127.0.0.1" in url or "[::1]" in url
    assert [("must run on the same machine" in note, "unencrypted" in note) for note in notes] == [(local, not local)]


def test_a_url_that_was_given_is_kept(desk: Desk) -> None:
    """Until another one is; one that was made from the listener follows the listener."""
    desk.run("--proxy-url", "https://delegate.example.org/x/")
    assert desk.registration.proxy_url == "https://delegate.example.org/x"
    said = desk.said()
    assert (said["action"], any("was kept" in note for note in said["notes"])) == ("unchanged", True)
    said = desk.said("--proxy-url", URL)
    assert (said["action"], desk.registration.proxy_url) == ("updated", URL)
    assert any(f"was https://delegate.example.org/x, and is {URL} now" in note for note in said["notes"])
    desk.write({"name": NAME}, listen={"port": 9000})
    assert desk.said()["action"] == "updated"
    assert desk.registration.proxy_url == "http://127.0.0.1:9000"


@pytest.mark.parametrize("url", ["ftp://x", "delegate:8080", "http://u:hunter2@x", "http://x?hunter2", "http://x/#hunter2", "http://x:99999", ""])
def test_what_is_no_url_is_wrong_usage(url: str, desk: Desk) -> None:
    """It is not repeated: it may hold a password."""
    assert "--proxy-url" in desk.run("--proxy-url", url, code=2).stderr
    assert not desk.file.exists()


def test_any_free_port_is_no_address(desk: Desk) -> None:
    """Nobody knows it before the daemon runs."""
    desk.write({"name": NAME}, listen={"port": 0})
    assert "--proxy-url" in desk.run(code=2).stderr
    assert desk.said("--proxy-url", URL)["action"] == "written"


# ── a configuration with problems ──


def test_other_problems_stop_it(desk: Desk) -> None:
    """As they stop the daemon; nothing is written."""
    desk.write({"name": NAME, "registration_file": str(desk.file), "ca_file": "/nonexistent"}, listen={"port": "x"})
    result = desk.run(code=1)
    assert "problem: listen.port" in result.stderr
    assert "problem: homeservers[0].ca_file" in result.stderr
    assert "registration_file" not in result.stderr
    assert "2 problems" in result.stderr
    answer = desk.said(code=1)
    assert (answer["ok"], len(answer["problems"])) == (False, 2)
    assert not desk.file.exists()
