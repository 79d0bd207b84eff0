"""The script by which a shell completes the command line. It is printed and nothing else: whose start-up files it belongs into, we do not decide."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]  # it is re-exported there, and not said so

VARIABLE: Final = "_SFU_DELEGATE_COMPLETE"
"""What the script sets to ask the program for completions."""


class Shell(StrEnum):
    """Shells that can complete."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


_NAME: Final = "sfu-delegate"
_ZSH: Final = "compdef _sfu_delegate_completion sfu-delegate"
# A file in $fpath is the function itself when it is first asked; Typer's own would complete nothing that time.
_ZSH_IN_FPATH: Final = f"""\
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _sfu_delegate_completion "$@"
else
  {_ZSH}
fi
"""


def script(shell: Shell) -> str:
    """What the shell is to read."""
    text = f"{get_completion_script(prog_name=_NAME, complete_var=VARIABLE, shell=shell.value).strip()}\n"
    return text.replace(f"{_ZSH}\n", _ZSH_IN_FPATH) if shell is Shell.ZSH else text


def answer_shells() -> None:
    """Let the command line answer what these scripts ask, when it is called by one. Typer does so where it may install them itself, too."""
    completion_init()


# What these name is imported when a shell asks: all other commands do without.


def states(incomplete: str) -> list[str]:
    """States of a delayed event that go on so."""
    from sfu_delegate.delegation.model import State

    return _one_more(incomplete, State)


def presences(incomplete: str) -> list[str]:
    """How participants may be."""
    from sfu_delegate.delegation.model import Presence

    return _one_more(incomplete, Presence)


def outcomes(incomplete: str) -> list[str]:
    """How a delayed event may have ended."""
    from sfu_delegate.delegation.model import Outcome

    return _one_more(incomplete, filter(None, Outcome))


def _one_more(incomplete: str, words: Iterable[str]) -> list[str]:
    """Each word that may stand at the end of a list with commas, with what stands there already."""
    before, comma, begun = incomplete.rpartition(",")
    used = before.split(",")
    return [f"{before}{comma}{word}" for word in map(str, words) if word.startswith(begun) and word not in used]
