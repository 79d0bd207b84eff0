"""Shells complete the command line by the scripts that it prints; real shells, where there are some, try them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sfu_delegate.cli import app
from sfu_delegate.operate.completion import VARIABLE, Shell, outcomes, presences, script, states
from typer.main import get_command

from tests.snippets import given

COMMANDS = set(getattr(get_command(app), "commands", {}))


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Directories for programs, the first of which has a `sfu-delegate` of this checkout."""
    program = tmp_path / "bin" / "sfu-delegate"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{os.pathsep.join(sys.path)}" exec "{sys.executable}" -W error -m sfu_delegate.cli "$@"\n')
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def run(*command: str, **environ: str) -> str:
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout


def shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def test_the_command_prints_the_script(path: str) -> None:
    """To standard output, and nowhere else; for a shell that cannot, it is wrong usage."""
    assert run("sfu-delegate", "completion", "bash", PATH=path) == script(Shell.BASH)
    done = subprocess.run(("sfu-delegate", "completion", "tcsh"), env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'bash', 'zsh', 'fish'" in done.stderr


def test_they_are_put_where_the_manual_says(path: str, tmp_path: Path) -> None:
    """The commands of docs/operating.md write the scripts, each into the directory of its shell."""
    for directory in ("bash-completion/completions", "zsh/vendor-completions", "fish/vendor_completions.d"):
        (tmp_path / directory).mkdir(parents=True)
    run("bash", "-e", "-c", given("docs/operating.md", "completion bash >").replace("/usr/share/", f"{tmp_path}/"), PATH=path)
    written = {file.name: file.read_text() for directory in ("bash-completion", "zsh", "fish") for file in (tmp_path / directory).rglob("*sfu*")}
    assert written == {"sfu-delegate": script(Shell.BASH), "_sfu-delegate": script(Shell.ZSH), "sfu-delegate.fish": script(Shell.FISH)}


@pytest.mark.parametrize(("name", "check"), [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")])
def test_the_scripts_can_be_read(name: str, check: str, tmp_path: Path) -> None:
    """Each shell finds its own script well written."""
    file = tmp_path / "script"
    file.write_text(script(Shell(name)))
    assert run(shell(name), check, str(file)) == ""


def in_bash(path: str, words: str) -> set[str]:
    """What bash would offer for the last word."""
    count = len(words.split(" ")) - 1
    ask = f"""{script(Shell.BASH)}
        COMP_WORDS=({words} ""); COMP_CWORD={count}
        _sfu_delegate_completion sfu-delegate
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return set(run(shell("bash"), "--norc", "-c", ask, PATH=path).split())


def in_zsh(path: str, words: str) -> set[str]:
    """What zsh would: `_arguments` is replaced by what prints its choices. The script is read as a file of $fpath, as it is installed."""
    directory = Path(path.partition(os.pathsep)[0]).parent / "functions"
    directory.mkdir(exist_ok=True)
    (directory / "_sfu-delegate").write_text(script(Shell.ZSH))
    given = " ".join(f'"{word}"' for word in words.split(" "))
    ask = f"""
        fpath=({directory} $fpath); autoload -Uz _sfu-delegate
        _arguments() {{ print -r -- "$@" }}
        words=({given}); CURRENT=${{#words}}
        _sfu-delegate
    """
    said = run(shell("zsh"), "-f", "-c", ask, PATH=path)
    return set(re.findall(r'"([^":\\]+)\\?"(?=[\s:)])', said))


def in_fish(path: str, words: str) -> set[str]:
    """What fish would, by its own builtin."""
    ask = f'{script(Shell.FISH)}\ncomplete --do-complete "{words}"\n'
    said = run(shell("fish"), "--no-config", "-c", ask, PATH=path)
    return {line.partition("\t")[0] for line in said.splitlines()}


@pytest.mark.parametrize("ask", [in_bash, in_zsh, in_fish])
def test_what_is_completed(ask: Callable[[str, str], set[str]], path: str) -> None:
    """The commands, those of them that begin so, a command's options, and the words of an argument."""
    assert ask(path, "sfu-delegate ") >= COMMANDS
    assert ask(path, "sfu-delegate check") & COMMANDS == {"check-config"}
    assert "--strict" in ask(path, "sfu-delegate check-config --s")
    assert ask(path, "sfu-delegate completion ") >= {"bash", "zsh", "fish"}
    assert {"connected", "expected", "away", "gone"} <= ask(path, "sfu-delegate list --presence ")


def test_lists_of_words_go_on_behind_a_comma() -> None:
    """With each word that is not there yet."""
    assert states("l") == ["live"]
    assert states("live,") == [f"live,{word}" for word in ("ending", "superseded", "vanished", "adrift", "done")]
    assert presences("gone,a") == ["gone,away"]
    assert "sent" in outcomes("")
    assert "" not in outcomes("")


def test_the_program_answers_shells_only_when_asked(path: str) -> None:
    """Its variable is the one of the scripts, and the command line has no options that would change somebody's start-up files."""
    assert all(VARIABLE in script(one) for one in Shell)
    assert "-completion" not in run("sfu-delegate", "--help", PATH=path)
