"""The command line helps: exit codes as documented, words instead of tracebacks, and no secret on the screen."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from sfu_delegate import __version__
from sfu_delegate.cli import app
from sfu_delegate.config import Config, example
from typer.testing import CliRunner, Result

SECRET = "hunter2-hunter2-hunter2-hunter2-hunter2"
GOOD = f"sfus: {{main: {{url: 'wss://sfu.example.org', keys: {{APIone: {SECRET}}}}}}}\nhomeservers: [{{name: example.org}}]\n"


def run(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    # Click's runner ends with SystemExit for every exit code; anything else is a bug.
    result = CliRunner().invoke(app, list(arguments), env={"SFU_DELEGATE_CONFIG": None, **(environ or {})})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file that only its owner can read, and give its path."""

    def file(text: str) -> str:
        path = tmp_path / "delegate.yaml"
        path.write_text(text)
        path.chmod(0o600)
        return str(path)

    return file


def test_version() -> None:
    """`version` prints the version."""
    assert run("version").stdout == f"sfu-delegate {__version__}\n"


def test_help_is_there_for_every_command() -> None:
    """Each command explains itself, with an example."""
    assert "check-config" in run("--help").stdout
    commands = ("serve", "check-config", "doctor", "example-config", "import-env", "appservice", "copy-database", "healthcheck", "completion", "demo")
    for command in commands:
        assert "Example" in run(command, "--help").stdout


@pytest.mark.parametrize("arguments", [["srve"], ["serve", "--cofig", "x"], ["check-config", "extra"], ["demo", "--seconds", "soon"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    """A mistyped command or option is an error of usage, and says where the help is."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_the_example_is_printed() -> None:
    """`example-config` prints the commented example, letter by letter."""
    assert run("example-config").stdout == example()


def test_a_good_configuration_exits_with_0(write: Write) -> None:
    """Nothing wrong, nothing risky: one line, and 0."""
    path = write(GOOD)
    result = run("check-config", "--config", path)
    assert (result.exit_code, result.stdout) == (0, f"{path}: good\n")


def test_all_problems_are_printed_and_exit_with_1(write: Write) -> None:
    """One line for each problem, with its key, line, value and remedy."""
    result = run("check-config", "-c", write(GOOD + "listen: {prt: 1, port: eighty}\nlog: {level: loud}\n"))
    assert result.exit_code == 1
    assert "problem: listen.prt (line 3) = (hidden): is not a key that exists here; did you mean port?" in result.stdout
    assert "problem: listen.port (line 3) = eighty: must be a whole number; the default is 8080" in result.stdout
    assert "problem: log.level (line 4) = loud: is not one of the words for this; write one of: debug, info, warning, error" in result.stdout
    assert "3 problems; it cannot be used" in result.stdout
    assert SECRET not in result.output


def test_warnings_fail_only_when_strict(write: Write) -> None:
    """A risky setting is printed and exits with 0, or 1 with --strict."""
    path = write(GOOD + "log: {level: debug}\n")
    result = run("check-config", "-c", path)
    assert result.exit_code == 0
    assert "warning: log.level" in result.stdout
    assert run("check-config", "-c", path, "--strict").exit_code == 1


def test_warnings_are_printed_beside_problems(write: Write) -> None:
    """Who mends the problems sees what is risky, too."""
    result = run("check-config", "-c", write(GOOD + "log: {level: debug}\nlisten: {port: x}\n"))
    assert result.exit_code == 1
    assert "problem: listen.port" in result.stdout
    assert "warning: log.level" in result.stdout


def test_json_is_for_programs(write: Write) -> None:
    """With --json the same comes as data."""
    result = run("check-config", "-c", write("listen: {port: x}\n"), "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["ok"] is False
    assert {p["key"] for p in report["problems"]} == {"listen.port", "sfus", "homeservers"}
    assert all(set(p) == {"key", "value", "problem", "remedy", "where"} for p in report["problems"])
    assert json.loads(run("check-config", "-c", write(GOOD), "--json", "--show").stdout)["config"]["listen"]["port"] == 8080


def test_show_prints_what_is_in_force_without_secrets(write: Write) -> None:
    """--show writes the effective configuration, the environment included, as YAML on standard output."""
    result = run("check-config", "-c", write(GOOD), "--show", environ={"SFU_DELEGATE_LISTEN__PORT": "8082"})
    assert result.exit_code == 0
    assert SECRET not in result.output
    shown = yaml.safe_load(result.stdout)
    assert shown["listen"]["port"] == 8082
    assert shown["sfus"]["main"]["keys"] == {"APIone": "(hidden)"}
    assert shown["timeouts"]["connect"] == "5s"


def test_the_environment_names_the_file(write: Write) -> None:
    """Without --config, SFU_DELEGATE_CONFIG counts."""
    assert run("check-config", environ={"SFU_DELEGATE_CONFIG": write(GOOD)}).exit_code == 0


def test_a_missing_file_is_explained() -> None:
    """A path that leads nowhere exits with 1 and says how to begin."""
    for command in ("check-config", "serve"):
        result = run(command, "-c", "/nonexistent/delegate.yaml")
        assert result.exit_code == 1
        assert "No such file or directory" in result.output
        assert "example-config" in result.output


def test_on_a_terminal_problems_are_paragraphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets in values and keys are text; and a path is in one piece, however narrow the terminal is, so that it can be copied."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    from sfu_delegate import cli
    from sfu_delegate.config import Problem

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    path = f"/etc/{'long-' * 12}name"
    cli._print("Problem", [Problem("homeservers[0].name", "[red]x[/blue]", "is odd", f"change {path}", "line 7")], error=False)
    for part in ("Problems", "homeservers[0].name", "[red]x[/blue]", "is odd", path, "line 7"):
        assert part in terminal.getvalue()


@pytest.mark.parametrize(("command", "code"), [("check-config", 1), ("serve", 1), ("doctor", 1), ("healthcheck", 1), ("status", 3)])
def test_a_file_that_may_not_be_read_is_explained(command: str, code: int, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do, and the exit codes that the manual has: it is no wrong usage."""
    path = write("{}")

    def denied(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    result = run(command, "-c", str(path))
    assert result.exit_code == code
    assert "Permission denied" in result.output
    assert "the daemon's user may read it" in result.output
    assert ("As somebody who may not read it" in result.output) is (command == "status")


def test_where_no_file_is_the_hint_does_not_tell_of_rights() -> None:
    """But which other ways there are to name the daemon."""
    result = run("status", "-c", "/nonexistent/delegate.yaml")
    assert result.exit_code == 3
    assert "who may not read it" not in result.output
    assert "Or name the admin listener: --admin http://127.0.0.1:8081" in result.output
    assert "or another file: --config FILE." in result.output


def test_the_version_is_an_option_too() -> None:
    """As of most programs."""
    assert run("--version").output == run("version").output


def test_the_help_names_arguments_as_people_do() -> None:
    """Without types of the language that this is written in, and without braces."""
    for command in ("show", "end", "release", "copy-database", "completion"):
        said = run(command, "--help").output
        assert not re.search(r"\{|<str|<list|\(10s\)", said)
    assert "Usage: sfu-delegate end [OPTIONS] ID...\n" in run("end", "--help").output


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., int]) -> None:
    module = types.ModuleType(name)
    module.run = function  # type: ignore[attr-defined]
    parent = name.rpartition(".")[0]
    if parent != "sfu_delegate":
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)


def test_serve_hands_over_the_configuration(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` loads the file with the environment, runs the daemon, and exits with its code."""
    seen: list[tuple[Config, Path]] = []

    def daemon(config: Config, path: Path) -> int:
        seen.append((config, path))
        return 3

    stand_in(monkeypatch, "sfu_delegate.daemon.serve", daemon)
    path = write(GOOD)
    assert run("serve", "-c", path, environ={"SFU_DELEGATE_LISTEN__PORT": "8082"}).exit_code == 3
    assert [(config.listen.port, file) for config, file in seen] == [(8082, Path(path))]


def test_serve_does_not_start_with_a_bad_configuration(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """All problems go to standard error, and nothing runs."""

    def daemon(config: Config, path: Path) -> int:
        raise AssertionError("started")

    stand_in(monkeypatch, "sfu_delegate.daemon.serve", daemon)
    result = run("serve", "-c", write(f"homeservers: [{{name: a.org, as_token: [{SECRET}]}}]\nlisten: 1\n"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "listen (line 2)" in result.stderr
    assert "homeservers[0].as_token (line 1) = (hidden)" in result.stderr
    assert SECRET not in result.output


def test_demo_hands_over_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo` passes its options on and exits with the demonstration's code."""
    seen: list[dict[str, Any]] = []

    def demonstration(**options: Any) -> int:
        seen.append(options)
        return 0

    stand_in(monkeypatch, "sfu_delegate.demo", demonstration)
    assert run("demo").exit_code == 0
    assert run("demo", "--no-synapse", "--seconds", "5", "--plain").exit_code == 0
    assert seen == [{"synapse": True, "seconds": None, "plain": False}, {"synapse": False, "seconds": 5.0, "plain": True}]


def test_a_reader_that_has_gone_is_no_error() -> None:
    """Piped into a program that stops reading, the command ends without a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-m", "sfu_delegate.cli", "example-config"], stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""
