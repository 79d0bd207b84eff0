"""The command line. What a subcommand needs is imported when it runs, so that `version` and `--help` are quick.

A user's mistake must never end in a traceback: wrong usage exits with 2, a bad configuration with 1, each with words that help.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sfu_delegate import __version__
from sfu_delegate.config import Config, ConfigInvalid, Problem, example, load, warnings

DEFAULT_CONFIG = Path("/etc/sfu-delegate/sfu-delegate.yaml")

app = typer.Typer(
    name="sfu-delegate",
    add_completion=False,
    no_args_is_help=True,
    # Pretty tracebacks show local variables, and with them secrets.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path,
    typer.Option("--config", "-c", envvar="SFU_DELEGATE_CONFIG", metavar="FILE", help="The configuration file.", show_envvar=True),
]


@app.callback()
def _about() -> None:
    """Keeps Matrix call memberships alive while the SFU sees their participants, and ends them within seconds of a departure.

    \b
    To begin:
      sfu-delegate demo --no-synapse                 see it work
      sfu-delegate example-config > delegate.yaml    a configuration to begin with
      sfu-delegate import-env > delegate.yaml        … from the LIVEKIT_… variables of lk-jwt-service
      sfu-delegate check-config -c delegate.yaml     find everything that is wrong with it
      sfu-delegate serve -c delegate.yaml            run
    """


@app.command()
def serve(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Run the daemon.

    SIGTERM stops it after what is in flight; SIGHUP reads the configuration again.

    \b
    Examples:
      sfu-delegate serve --config /etc/sfu-delegate/sfu-delegate.yaml
      SFU_DELEGATE_LOG__LEVEL=debug sfu-delegate serve -c delegate.yaml
    """
    loaded = _load_or_exit(config)
    from sfu_delegate.daemon.serve import run

    raise typer.Exit(run(loaded, config))


@app.command("check-config", short_help="Find everything that is wrong with a configuration.")
def check_config(
    config: ConfigOption = DEFAULT_CONFIG,
    strict: Annotated[bool, typer.Option("--strict", help="Risky settings count as problems.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Also write the effective configuration, with the secrets hidden.")] = False,
) -> None:
    """Check a configuration file with the environment laid over it: all problems at once, and what is risky.

    Exits with 0 when it can be used, 1 when it cannot. What is risky is also shown beside problems, as far as it can be told then.

    \b
    Examples:
      sfu-delegate check-config -c delegate.yaml --strict
      sfu-delegate check-config -c delegate.yaml --json | jq '.problems[].key'
    """
    problems: Sequence[Problem] = ()
    risks: Sequence[Problem] = ()
    loaded: Config | None = None
    try:
        loaded = load(config, os.environ)
        risks = warnings(loaded)
    except ConfigInvalid as error:
        problems, risks = error.problems, error.warnings
    good = not problems and not (strict and risks)
    if as_json:
        report: dict[str, object] = {
            "ok": good,
            "file": str(config),
            "problems": [_as_dict(problem) for problem in problems],
            "warnings": [_as_dict(risk) for risk in risks],
        }
        if show and loaded is not None:
            report["config"] = loaded.shown()
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print("Problem", problems, error=False)
        _print("Warning", risks, error=False)
        if show and loaded is not None:
            import yaml

            typer.echo(yaml.safe_dump(loaded.shown(), sort_keys=False, allow_unicode=True), nl=False)
        typer.echo(_verdict(config, problems, risks, strict), err=show)
    raise typer.Exit(0 if good else 1)


@app.command("example-config", short_help="Print a commented configuration.")
def example_config() -> None:
    """Print the commented example: every key with its default.

    \b
    Example:
      sfu-delegate example-config > /etc/sfu-delegate/sfu-delegate.yaml
    """
    typer.echo(example(), nl=False)


@app.command("import-env", short_help="Make a configuration from LIVEKIT_… variables.")
def import_env(
    env_file: Annotated[
        Path | None,
        typer.Option(
            "--env-file",
            metavar="FILE",
            help="Read the variables from this file, and not from the environment: a regular file, - for standard input, or the shell's <(…).",
        ),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="Put LiveKit's key and secret into this new file, and print no secret.")
    ] = None,
) -> None:
    """Print a configuration made from the variables of a MatrixRTC authorization service (lk-jwt-service): LIVEKIT_URL, LIVEKIT_KEY and so on.

    What has no counterpart, and what is risky, is told on standard error. Exits with 1, and prints nothing, when a variable cannot be used.

    \b
    Examples:
      (umask 077; sfu-delegate import-env > delegate.yaml)
      sfu-delegate import-env --env-file jwt.env --key-file /etc/sfu-delegate/livekit-keys.yaml > delegate.yaml
      docker inspect --format '{{range .Config.Env}}{{println .}}{{end}}' jwt | sfu-delegate import-env --env-file - > delegate.yaml
    """
    from sfu_delegate.config.import_env import STANDARD_INPUT, import_env, read_env_file

    try:
        variables, problems, notes = (dict(os.environ), [], []) if env_file is None else read_env_file(env_file)
        imported = import_env(variables, key_file=key_file, before=problems)
    except ConfigInvalid as error:
        _print("Problem", error.problems, error=True)
        source = "standard input" if env_file == STANDARD_INPUT else env_file or "the environment"
        typer.echo(f"{source}: {_count(error.problems, 'problem')}; nothing was made of it", err=True)
        raise typer.Exit(1) from None
    for note in (*notes, *imported.notes):
        typer.echo(f"note: {note}", err=True)
    if imported.written is not None:
        typer.echo(f"note: {imported.written} holds the key and its secret. The daemon's user must be able to read it, and nobody else.", err=True)
    _print("Warning", imported.risks, error=True)
    typer.echo(imported.text, nl=False)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"sfu-delegate {__version__}")


@app.command(short_help="See the main job done, live.")
def demo(
    no_synapse: Annotated[bool, typer.Option("--no-synapse", help="With a stand-in for Synapse, which needs nothing installed.")] = False,
    seconds: Annotated[float | None, typer.Option("--seconds", min=1, metavar="N", help="End after about this many seconds.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of a live picture.")] = False,
) -> None:
    """Show the main job: people join a call, reconnect, leave and crash, and their leave events find their way into the room.

    It takes about a minute, and leaves nothing behind; Ctrl-C ends it. Unless --no-synapse is given, it needs the package matrix-synapse: `make demo`
    in a checkout installs it, and runs this.

    \b
    Examples:
      sfu-delegate demo --no-synapse
      sfu-delegate demo --plain
    """
    from sfu_delegate.demo import run

    raise typer.Exit(run(synapse=not no_synapse, seconds=seconds, plain=plain))


def main() -> None:
    """The entry point."""
    try:
        app(prog_name="sfu-delegate")
    except BrokenPipeError:
        # Whoever read our output has gone (`… | head`); the interpreter must not stumble over it once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _load_or_exit(path: Path) -> Config:
    try:
        return load(path, os.environ)
    except ConfigInvalid as error:
        _fail(path, error.problems)


def _fail(path: Path, problems: Sequence[Problem]) -> NoReturn:
    _print("Problem", problems, error=True)
    typer.echo(_verdict(path, problems, (), strict=False), err=True)
    raise typer.Exit(1)


def _verdict(path: Path, problems: Sequence[Problem], risks: Sequence[Problem], strict: bool) -> str:
    if problems:
        return f"{path}: {_count(problems, 'problem')}; it cannot be used"
    if risks:
        return f"{path}: {_count(risks, 'warning')}; " + ("refused, as --strict is on" if strict else "it can be used")
    return f"{path}: good"


def _count(items: Sequence[object], word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def _as_dict(problem: Problem) -> dict[str, str]:
    return {"key": problem.key, "value": problem.value, "problem": problem.problem, "remedy": problem.remedy, "where": problem.where}


def _print(kind: str, problems: Sequence[Problem], *, error: bool) -> None:
    """A table on a terminal; elsewhere one line each, which programs like grep can work with."""
    if not problems:
        return
    stream = sys.stderr if error else sys.stdout
    if not stream.isatty():
        for problem in problems:
            typer.echo(f"{kind.lower()}: {problem}", err=error)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{kind}s", title_justify="left", title_style="bold red" if kind == "Problem" else "bold yellow", show_lines=True)
    for heading in ("Key", "Value", kind, "Remedy"):
        table.add_column(heading, overflow="fold")
    for problem in problems:
        # As Text: in values, square brackets are no markup.
        key = Text(problem.key or "(the file)", style="bold")
        if problem.where:
            key.append(f"\n{problem.where}", style="dim")
        table.add_row(key, Text(problem.value), Text(problem.problem), Text(problem.remedy))
    Console(file=stream).print(table)


if __name__ == "__main__":
    main()
