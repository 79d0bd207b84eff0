"""The script by which a shell completes the command line. It is printed and nothing else: whose start-up files it belongs into, we do not decide."""

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
