"""The command line. What a subcommand needs is imported when it runs, so that `version` and `--help` are quick.

A user's mistake must never end in a traceback: wrong usage exits with 2, a bad configuration with 1, each with words that help.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from sfu_delegate import __version__
from sfu_delegate.config import Config, ConfigInvalid, Problem, example, load, parse_duration, warnings
from sfu_delegate.operate.completion import VARIABLE, Shell, answer_shells, outcomes, presences, script, states

if TYPE_CHECKING:
    from sfu_delegate.operate.commands import Asking
    from sfu_delegate.store.copying import Place, Report

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


class _Command(TyperCommand):
    """A command that calls its arguments by their names alone: the library adds braces and the types of this program to them."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        for parameter in self.params:
            if parameter.param_type_name == "argument" and parameter.metavar:
                named: Any = parameter  # versions of the library that do not add them do not ask these either
                named._usage_display_name = partial(str, parameter.metavar)
                named.display_type_rich = lambda **_: ""


command = partial(app.command, cls=_Command)

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        envvar="SFU_DELEGATE_CONFIG",
        metavar="FILE",
        help="The configuration file.",
        show_envvar=True,
        readable=False,  # that it is not is told by whoever reads it, with what to do
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _about(
    _: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Keeps Matrix call memberships alive while the SFU sees their participants, and ends them within seconds of a departure.

    \b
    To begin:
      sfu-delegate demo --no-synapse                 see it work
      sfu-delegate example-config > delegate.yaml    a configuration to begin with
      sfu-delegate import-env > delegate.yaml        … from the LIVEKIT_… variables of lk-jwt-service
      sfu-delegate check-config -c delegate.yaml     find everything that is wrong with it
      sfu-delegate appservice -c delegate.yaml       make the daemon an application service of the homeserver
      sfu-delegate doctor -c delegate.yaml           look at all that it needs: database, SFUs, homeservers
      sfu-delegate serve -c delegate.yaml            run

    \b
    While it runs:
      sfu-delegate status                            how it is, and what is wrong
      sfu-delegate explain --user @alice:example.org --at 10:42
    """


@command()
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


@command("check-config", short_help="Find everything that is wrong with a configuration.")
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


@command(short_help="Look at everything that the daemon needs: what is wrong, and what to do.")
def doctor(
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
) -> None:
    """Look at everything that the daemon needs, and tell what is wrong and what to do: the configuration, the database, each SFU and whether its
    webhooks come, each homeserver with its rate limit, application service and federation, and the daemon itself.

    It works before the first start, and beside a running daemon, which it does not disturb: run it there as the daemon's user, or as root. On each
    SFU it makes a room of nobody, and deletes it. It takes some seconds, and 45 at the most.

    Exits with 0 when all is well, or there are warnings only; with 1 when something does not work.

    \b
    Examples:
      sfu-delegate doctor --config /etc/sfu-delegate/sfu-delegate.yaml
      sfu-delegate doctor -c delegate.yaml --json | jq '.checks[] | select(.verdict == "problem")'
    """
    from sfu_delegate.doctor import as_data, diagnose, progress, show
    from sfu_delegate.operate.screen import show_json

    with progress() as tell:
        report = diagnose(config, os.environ, tell)
    if as_json:
        show_json(as_data(report))
    else:
        show(report)
    raise typer.Exit(report.exit_code)


@command("example-config", short_help="Print a commented configuration.")
def example_config() -> None:
    """Print the commented example: every key with its default.

    \b
    Example:
      sfu-delegate example-config > /etc/sfu-delegate/sfu-delegate.yaml
    """
    typer.echo(example(), nl=False)


@command("import-env", short_help="Make a configuration from LIVEKIT_… variables.")
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


@command(short_help="Make the registration by which a homeserver knows the daemon.")
def appservice(
    config: ConfigOption = DEFAULT_CONFIG,
    homeserver: Annotated[
        str | None, typer.Option("--homeserver", metavar="NAME", help="For which one, where the configuration has several.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write it. Otherwise: the entry's registration_file, or a file right here."),
    ] = None,
    proxy_url: Annotated[
        str | None,
        typer.Option("--proxy-url", metavar="URL", help="The daemon's public listener as Synapse reaches it. Otherwise: as `listen` says."),
    ] = None,
    new_tokens: Annotated[bool, typer.Option("--new-tokens", help="Make new tokens, though there are some.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
) -> None:
    """Write the daemon's registration as an application service of a homeserver, and tell what to put into Synapse's configuration, and into ours.

    With it the homeserver's limits do not hold for the daemon, clients reach the daemon through the homeserver (MSC4512), and the daemon can ask who
    is in a room (MSC4502). A registration that is there keeps its tokens, unless they are placeholders; running this again brings the rest up to
    date. No token is printed.

    Exits with 0 when the file is as it should be, 1 when it could not be written or the configuration has problems, and 2 when something else has to
    be asked for, such as one of several homeservers.

    \b
    Examples:
      sfu-delegate appservice -c delegate.yaml --output /etc/matrix-synapse/sfu-delegate-registration.yaml
      sfu-delegate appservice -c delegate.yaml --homeserver example.org --proxy-url http://10.0.0.7:8080
      sfu-delegate appservice -c delegate.yaml --new-tokens
    """
    from sfu_delegate.config.appservice import CannotRegister, register

    def fail(problems: Sequence[str], code: int) -> NoReturn:
        typer.echo(json.dumps({"ok": False, "problems": problems}, indent=2, ensure_ascii=False))
        raise typer.Exit(code)

    try:
        loaded = load(config, os.environ, registrations_needed=False)
    except ConfigInvalid as error:
        if as_json:
            fail([str(problem) for problem in error.problems], 1)
        _fail(config, error.problems)
    try:
        done = register(loaded, homeserver, output, proxy_url, new_tokens=new_tokens)
    except CannotRegister as error:
        code = 2 if error.usage else 1
        if as_json:
            fail([str(error)], code)
        typer.echo(f"problem: {error}", err=True)
        typer.echo("appservice: nothing was written", err=True)
        raise typer.Exit(code) from None
    if as_json:
        said: dict[str, object] = {"ok": True, "homeserver": done.homeserver, "file": str(done.file), "action": done.action}
        said |= {"homeserver_yaml": done.homeserver_yaml, "config": done.config, "notes": done.notes, "next": done.steps}
        typer.echo(json.dumps(said, indent=2, ensure_ascii=False))
        return
    for note in done.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{done.action.capitalize()}: {done.file}, the registration for {done.homeserver}.")
    typer.echo()
    if done.action != "unchanged" or done.config:
        typer.echo(f"For Synapse (homeserver.yaml), beside what stands there under the same keys:\n\n{done.homeserver_yaml}")
    if done.config:
        typer.echo(f"For sfu-delegate ({config}), to the entry of {done.homeserver}:\n\n    {done.config}")
    typer.echo("Now:")
    for number, step in enumerate(done.steps, 1):
        typer.echo(f"{number}. {step}")


# ── looking into a running daemon ──

AdminOption = Annotated[
    str | None,
    typer.Option("--admin", metavar="URL", help="The daemon's admin listener, http://… or unix:/path. Otherwise: as the configuration says."),
]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="The admin token. Otherwise: the one of the configuration, if that can be read.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, metavar="N", help="How many at the most.")]
AllOption = Annotated[bool, typer.Option("--all", help="All that there are, however many.")]
RoomOption = Annotated[str | None, typer.Option("--room", metavar="ROOM", help="A Matrix room id, or the room's name at LiveKit.")]
UserOption = Annotated[str | None, typer.Option("--user", metavar="USER", help="A Matrix user, or an identity at LiveKit.")]
SfuOption = Annotated[str | None, typer.Option("--sfu", metavar="NAME", help="An SFU, by its name in the configuration.")]
IdsArgument = Annotated[list[str], typer.Argument(metavar="ID...", help="Delegations, by their ids (dlg_…) or the numbers of their rows.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask. Without a terminal nobody is asked.")]


def _duration(text: str) -> float:
    from sfu_delegate.config.values import DURATION_REMEDY

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}: {DURATION_REMEDY}") from None


def _moment(text: str) -> float:
    from time import time

    from sfu_delegate.operate.shown import moment

    try:
        return moment(text, time())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _asking(config: Path, admin: str | None, token_file: Path | None, as_json: bool) -> "Asking":
    from sfu_delegate.operate.commands import Asking

    return Asking(config, config == DEFAULT_CONFIG, admin, token_file, as_json)


@command(short_help="How the running daemon is.")
def status(
    config: ConfigOption = DEFAULT_CONFIG,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every 2 s, until Ctrl-C.")] = False,
) -> None:
    """Show how the running daemon is: a verdict and what is wrong right now; whether nobody is dropped and nobody stays a ghost; rates, homeservers
    and what their limits mean, SFUs, the database.

    Exits with 0 when all is well, 1 when it is degraded or unavailable, or something else is wrong, and 3 when the daemon cannot be asked.

    \b
    Examples:
      sfu-delegate status
      sfu-delegate status --watch
      sfu-delegate status --json | jq -r '.causes[]'
      sfu-delegate status --admin unix:/run/sfu-delegate/admin.sock
    """
    from sfu_delegate.operate import commands

    if watch and (as_json or not sys.stdout.isatty()):
        raise typer.BadParameter("needs a terminal, and no --json: elsewhere, run it again and again", param_hint="--watch")
    raise typer.Exit(commands.status(_asking(config, admin, token_file, as_json), watch=watch))


@command("list", short_help="List delegations.")
def list_delegations(
    config: ConfigOption = DEFAULT_CONFIG,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
    room: RoomOption = None,
    user: UserOption = None,
    homeserver: Annotated[str | None, typer.Option("--homeserver", metavar="NAME", help="Of this homeserver.")] = None,
    sfu: SfuOption = None,
    state: Annotated[
        str | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="live, ending, superseded, vanished, adrift, done; several with commas between.",
            autocompletion=states,
        ),
    ] = None,
    presence: Annotated[
        str | None,
        typer.Option(
            "--presence", metavar="PRESENCE", help="expected, connected, away, gone; several with commas between.", autocompletion=presences
        ),
    ] = None,
    outcome: Annotated[
        str | None,
        typer.Option(
            "--outcome",
            metavar="OUTCOME",
            help="How it ended: sent, already_ended, lost, …; several with commas between.",
            autocompletion=outcomes,
        ),
    ] = None,
    opened: Annotated[bool | None, typer.Option("--open/--finished", help="Only those that are open, or finished.", show_default=False)] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", parser=_duration, metavar="DURATION", help="Delegated before that: 2h, 30m, 1d.")
    ] = None,
    newer_than: Annotated[float | None, typer.Option("--newer-than", parser=_duration, metavar="DURATION", help="Delegated since then.")] = None,
    limit: LimitOption = 100,
    everything: AllOption = False,
) -> None:
    """List delayed events that were delegated, the newest first; all filters that are given have to match.

    On a terminal it is a table. Elsewhere it is one line each, without headings, with tabs between: delegation, row, state, outcome, presence, time,
    SFU, room, user or identity, homeserver. What cannot be seen in a name stands there as an escape (\\x1b, \\u202e).

    Exits with 0 when there are some, 1 when nothing matches, 2 for a filter that is not understood, and 3 when the daemon cannot be asked.

    \b
    Examples:
      sfu-delegate list --open --room '!abcdefg:example.org'
      sfu-delegate list --outcome lost --newer-than 1d
      sfu-delegate list --all | cut -f 10 | sort | uniq -c
      sfu-delegate list --json --user @alice:example.org | jq -r '.events[].sentence'
    """
    from sfu_delegate.operate import commands

    words = {"room": room, "user": user, "homeserver": homeserver, "sfu": sfu, "state": state, "presence": presence, "outcome": outcome}
    words["open"] = None if opened is None else str(opened).lower()
    words["older_than_s"] = None if older_than is None else str(math.floor(older_than))
    words["newer_than_s"] = None if newer_than is None else str(math.ceil(newer_than))
    query = {name: word for name, word in words.items() if word is not None}
    raise typer.Exit(commands.events(_asking(config, admin, token_file, as_json), query, None if everything else limit))


@command(short_help="List rooms with delegations.")
def rooms(
    config: ConfigOption = DEFAULT_CONFIG,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
    room: RoomOption = None,
    sfu: SfuOption = None,
    limit: LimitOption = 100,
    everything: AllOption = False,
) -> None:
    """List rooms with delegations, by SFU and name, and how many of those who have delegated are in them.

    On a terminal it is a table. Elsewhere it is one line each, without headings, with tabs between: SFU, room, participants that are connected,
    expected, away and gone, open delayed events, the last look at the room, looks that have failed since.

    Exits with 0 when there are some, 1 when there are none, and 3 when the daemon cannot be asked.

    \b
    Examples:
      sfu-delegate rooms
      sfu-delegate rooms --room '!abcdefg:example.org'
      sfu-delegate rooms --all | sort -t "$(printf '\\t')" -k 3 -n | tail -5
    """
    from sfu_delegate.operate import commands

    query = {name: word for name, word in (("room", room), ("sfu", sfu)) if word is not None}
    raise typer.Exit(commands.rooms(_asking(config, admin, token_file, as_json), query, None if everything else limit))


@command(short_help="Show one delegation, and its story.")
def show(
    id: Annotated[str, typer.Argument(metavar="ID", help="A delegation, by its id (dlg_…) or the number of a row.")],
    config: ConfigOption = DEFAULT_CONFIG,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one delegation: whose it is, how it is with each of its delayed events, and what happened to them.

    Exits with 0 when there is one, 1 when there is none, and 3 when the daemon cannot be asked.

    \b
    Examples:
      sfu-delegate show dlg_0f8fad5bd9cb469fa16570867728950e
      sfu-delegate show 1234
      sfu-delegate show 1234 --json | jq '.story[]'
    """
    from sfu_delegate.operate import commands

    raise typer.Exit(commands.show(_asking(config, admin, token_file, as_json), id))


@command(short_help="Why somebody was dropped, or is still there.")
def explain(
    config: ConfigOption = DEFAULT_CONFIG,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
    room: RoomOption = None,
    user: UserOption = None,
    sfu: SfuOption = None,
    at: Annotated[
        float | None,
        typer.Option(
            "--at",
            parser=_moment,
            metavar="TIME",
            help="Who was there at this time, local time (10:42, or '2026-03-01 10:42'), with what happened within 5 minutes of it marked.",
        ),
    ] = None,
    since: Annotated[
        float | None, typer.Option("--since", parser=_duration, metavar="DURATION", help="Only what happened since then: 2h, 1d.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, metavar="N", help="Lines for each participant: the newest, or nearest. 0: all.")] = 40,
) -> None:
    """Tell the story of a room or a user: for each participant how it is now, what happened, when and why, and what is wrong right now.

    With --at, the lines near to that time are marked with >, and the time itself stands between the lines.

    Exits with 0 when somebody was found, 1 when nobody has delegated there, 2 for wrong usage, and 3 when the daemon cannot be asked.

    \b
    Examples:
      sfu-delegate explain --room '!abcdefg:example.org'
      sfu-delegate explain --user @alice:example.org --at 10:42
      sfu-delegate explain --room '!abcdefg:example.org' --user @alice:example.org --since 2h
    """
    from sfu_delegate.operate import commands

    if room is None and user is None:
        raise typer.BadParameter("name the room, the user, or both", param_hint="--room, --user")
    if at is not None and since is not None:
        raise typer.BadParameter("goes without --since", param_hint="--at")
    asking = _asking(config, admin, token_file, as_json)
    raise typer.Exit(commands.explain(asking, room=room, user=user, sfu=sfu, around=at, since=since, limit=limit))


@command(short_help="Have the leave events of delegations sent now.")
def end(
    ids: IdsArgument,
    config: ConfigOption = DEFAULT_CONFIG,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
    yes: YesOption = False,
    wait: Annotated[
        float,
        typer.Option("--wait", parser=_duration, metavar="DURATION", help="How long to wait for the outcome. Otherwise: 10s.", show_default=False),
    ] = 10.0,
) -> None:
    """End delegations: their homeserver is told to send the leave events now (or to cancel them, where the client wants that), as if the participants
    had left. Whoever is in the call stays connected to the SFU, and is no longer shown in it.

    It tells what will happen, asks on a terminal, and waits for the outcome. Over host and port it takes the admin token. It is logged.

    Exits with 0 when all of them are over, 1 when one is not (yet), is not found or is refused, and 3 when the daemon cannot be asked.

    \b
    Examples:
      sfu-delegate end dlg_0f8fad5bd9cb469fa16570867728950e
      sfu-delegate end 1234 1235 --yes
      sfu-delegate list --open --room '!abcdefg:example.org' | cut -f 1 | xargs sfu-delegate end --yes
    """
    _change("end", ids, _asking(config, admin, token_file, as_json), yes, wait)


@command(short_help="Have the daemon forget delegations.")
def release(
    ids: IdsArgument,
    config: ConfigOption = DEFAULT_CONFIG,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
    yes: YesOption = False,
) -> None:
    """Release delegations: the daemon forgets them, and neither restarts nor ends their events any more. These stay at the homeserver as they are,
    and run out after their delay unless the client restarts them: who is in the call then is dropped from it, if its client has relied on the daemon.

    It tells what will happen, and asks on a terminal. Over host and port it takes the admin token. It is logged.

    Exits with 0 when it is done, 1 when one is not found or refused, and 3 when the daemon cannot be asked.

    \b
    Examples:
      sfu-delegate release dlg_0f8fad5bd9cb469fa16570867728950e
      sfu-delegate release 1234 --yes --json
    """
    _change("release", ids, _asking(config, admin, token_file, as_json), yes, 0.0)


def _change(verb: str, ids: Sequence[str], asking: "Asking", yes: bool, wait: float) -> NoReturn:
    from sfu_delegate.operate import commands

    people = sys.stdin.isatty() and sys.stderr.isatty()
    confirm = None if yes or not people else lambda question: typer.confirm(question, err=True)
    raise typer.Exit(commands.change(asking, verb, ids, confirm=confirm, wait=wait))


PasswordFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A file with the password for this one, if it is PostgreSQL.")]


@command("copy-database", short_help="Move to PostgreSQL, or back.")
def copy_database(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The database that there is, written as the key `database`.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The one to fill, without delegations. A file of SQLite need not be there.")],
    from_password_file: PasswordFile = None,
    to_password_file: PasswordFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only see whether it can be done; daemons may be at work, and nothing changes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
) -> None:
    """Copy all that a database holds to another one, and compare the two row by row before the copy is kept: from SQLite to PostgreSQL, back, or
    between two of the same kind.

    No daemon may be at work with either. TO has everything in the end, or is as it was; FROM is brought to the schema of this version, and otherwise
    left alone. Passwords can also be given as libpq has them: PGPASSWORD, PGPASSFILE, ~/.pgpass.

    Exits with 0 when it is done (with --dry-run: when it can be), and 1 when not.

    \b
    Examples:
      sfu-delegate copy-database --dry-run sqlite:////var/lib/sfu-delegate/sfu-delegate.db postgresql://sfu_delegate@db/sfu_delegate
      sfu-delegate copy-database --to-password-file /etc/sfu-delegate/postgresql-password \\
          sqlite:////var/lib/sfu-delegate/sfu-delegate.db postgresql://sfu_delegate@db/sfu_delegate
      PGPASSWORD=… sfu-delegate copy-database postgresql://sfu_delegate@db/sfu_delegate sqlite:///sfu-delegate.db
    """
    from sfu_delegate.daemon.clock import Clock
    from sfu_delegate.store.copying import CannotCopy, copy

    problems: list[Problem] = []
    ours = _place("FROM", source, "--from-password-file", from_password_file, problems)
    theirs = _place("TO", target, "--to-password-file", to_password_file, problems)
    if ours is None or theirs is None:
        _print("Problem", problems, error=True)
        typer.echo(f"copy-database: {_count(problems, 'problem')}; nothing was copied", err=True)
        raise typer.Exit(2)
    said: dict[str, object] = {"ok": False, "dry_run": dry_run}
    try:
        with _progress() as tell:
            report = copy(ours, theirs, Clock(), dry_run=dry_run, tell=tell)
    except CannotCopy as error:
        if as_json:
            typer.echo(json.dumps(said | {"problems": error.problems}, indent=2, ensure_ascii=False))
        else:
            for sentence in error.problems:
                typer.echo(f"problem: {sentence}", err=True)
            typer.echo("copy-database: " + ("it cannot be copied" if dry_run else "it was not copied"), err=True)
        raise typer.Exit(1) from None
    steps = [] if dry_run else _after_copying(ours, theirs, target, report)
    if as_json:
        said |= {"ok": True, "problems": [], "from": report.source, "to": report.target, "rows": dict(report.rows), "open": report.open}
        said |= {"with_token": report.tokens, "seconds": round(report.seconds, 3), "notes": report.notes, "next": steps}
        typer.echo(json.dumps(said, indent=2, ensure_ascii=False))
        return
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"From {report.source}\nto {report.target}:")
    for table, count in report.rows.items():
        more = f"  ({report.open} open, {report.tokens} with a client's token)" if table == "delayed_event" else ""
        typer.echo(f"  {table:<15}{count:>10}{more}")
    if dry_run:
        typer.echo(f"It can be copied ({report.seconds:.1f} s to look). Nothing was changed.")
        return
    typer.echo(f"Copied, and each row compared, in {report.seconds:.1f} s.\n\nNow:")
    for number, step in enumerate(steps, 1):
        typer.echo(f"{number}. {step}")


def _place(name: str, url: str, option: str, password_file: Path | None, problems: list[Problem]) -> "Place | None":
    """A database that was named on the command line; None, and why, if it cannot be one."""
    from pydantic import TypeAdapter, ValidationError

    from sfu_delegate.config.values import DatabaseUrl, is_postgresql, shown_database
    from sfu_delegate.store.copying import Postgresql, Sqlite

    try:
        TypeAdapter(DatabaseUrl).validate_python(url)
    except ValidationError as invalid:
        for error in invalid.errors():
            said = error.get("ctx", {})
            remedy = str(said.get("remedy")).replace("postgresql.password_file, or postgresql.password", option)
            problems.append(Problem(name, shown_database(url), str(said.get("problem")), remedy))
        return None
    if not is_postgresql(url):
        if password_file is None:
            return Sqlite(Path(url.removeprefix("sqlite:///")))
        problems.append(Problem(option, str(password_file), f"is given, and {name} is SQLite, which has no password", "remove it"))
        return None
    remedy = f"Check the user in {name}, and the password: {option} FILE, PGPASSWORD, or ~/.pgpass."
    if password_file is None:
        return Postgresql(url, None, remedy)
    password = _password_in(password_file, option, problems)
    return None if password is None else Postgresql(url, password, remedy)


def _password_in(path: Path, option: str, problems: list[Problem]) -> str | None:
    from sfu_delegate.config.loading import read_text
    from sfu_delegate.config.values import odd_character

    text, wrong = read_text(path, option, "the password's file")
    problems += wrong
    password = (text or "").strip()
    if text is not None and not password:
        problems.append(Problem(option, str(path), "is empty", "put the password into it"))
    elif odd := odd_character(password):
        problems.append(Problem(option, str(path), f"has {odd} in it", "put the password into it, in one line, and nothing else"))
        return None
    return password or None


def _after_copying(ours: "Place", theirs: "Place", target: str, report: "Report") -> list[str]:
    """What the operator has to do now."""
    from sfu_delegate.store.copying import Sqlite

    lost = "Without the same encryption keys, clients' management tokens are void" + (
        f", and {report.tokens} tokens in the database cannot be opened: their delayed events cannot be restarted." if report.tokens else "."
    )
    key_file = Path(f"{ours.path}.key") if isinstance(ours, Sqlite) else None
    if key_file is not None and key_file.exists():
        place = f"copy it to {theirs.path}.key, with mode 0600" if isinstance(theirs, Sqlite) else "put its content into a file for all instances"
        named = "" if isinstance(theirs, Sqlite) else ", and name that in `encryption.keys_file`"
        keys = f"THE ENCRYPTION KEY is in {key_file}, unless `encryption` is configured: {place}{named}. {lost}"
    else:
        keys = f"THE ENCRYPTION KEYS stay as they are configured (`encryption.keys`, or `keys_file`). {lost}"
    password = "" if isinstance(theirs, Sqlite) else ", and `postgresql.password_file` if there is a password"
    return [
        keys,
        f"Set `database: {target}` in the configuration{password}; `sfu-delegate check-config` tells whether all is well.",
        "Start the daemon. It looks at all rooms: who has left meanwhile is found.",
        f"Start no daemon with {report.source} any more: what it holds is of the past now.",
    ]


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """What shows how far it is, on a terminal: takes what is being done, how much of it is, and of how much."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield tell


@command(short_help="Ask whether the running daemon is well.")
def healthcheck(
    config: ConfigOption = DEFAULT_CONFIG,
    ready: Annotated[bool, typer.Option("--ready", help="Can it take delegations and webhooks? Otherwise: does it live?")] = False,
) -> None:
    """Ask the daemon that has this configuration whether it lives, in a line: for containers, probes and scripts.

    No token is needed, nor any secret of the configuration.

    Exits with 0 when it is well, and with 1 when it is not, or cannot be asked.

    \b
    Examples:
      sfu-delegate healthcheck
      sfu-delegate healthcheck --ready --config /etc/sfu-delegate/sfu-delegate.yaml
    """
    from sfu_delegate.operate.healthcheck import check
    from sfu_delegate.operate.screen import write
    from sfu_delegate.operate.shown import plain

    try:
        well, line = check(config, os.environ, ready=ready)
    except ConfigInvalid as error:
        _fail(config, error.problems)
    write(sys.stdout if well else sys.stderr, f"{plain(line)}\n")
    raise typer.Exit(0 if well else 1)


@command(short_help="Print what lets a shell complete the commands.")
def completion(shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="Which one.")]) -> None:
    """Print the script that lets a shell complete this command line. Nothing is installed.

    \b
    Examples:
      sfu-delegate completion bash > /usr/share/bash-completion/completions/sfu-delegate
      sfu-delegate completion zsh > /usr/share/zsh/vendor-completions/_sfu-delegate
      sfu-delegate completion fish > /usr/share/fish/vendor_completions.d/sfu-delegate.fish
    """
    typer.echo(script(shell), nl=False)


@command()
def version() -> None:
    """Print the version."""
    typer.echo(f"sfu-delegate {__version__}")


@command(short_help="See the main job done, live.")
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
    if VARIABLE in os.environ:
        answer_shells()
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
    """For people on a terminal; elsewhere one line each, which programs like grep can work with."""
    if not problems:
        return
    stream = sys.stderr if error else sys.stdout
    if not stream.isatty():
        for problem in problems:
            typer.echo(f"{kind.lower()}: {problem}", err=error)
        return
    from sfu_delegate.observe.story import Tone
    from sfu_delegate.operate.screen import show_paragraphs
    from sfu_delegate.operate.shown import Line, Paragraph

    tone = Tone.BAD if kind == "Problem" else Tone.NOTICE
    paragraphs = [Paragraph([Line(f"{kind}s", tone, heading=True)])]
    for problem in problems:
        where = f"  ({problem.where})" if problem.where else ""
        value = f" = {problem.value}" if problem.value and problem.key else ""
        first = Line(f"{problem.key or problem.value or '(the file)'}{value}{where}", heading=True)
        paragraphs.append(Paragraph([first, Line(problem.problem, tone), Line(f"→ {problem.remedy}")], hang=2))
    show_paragraphs(paragraphs, error=error)


if __name__ == "__main__":
    main()
