"""What an operator asks of a running daemon, and has it do, on the command line: each function is a command, and returns its exit code.

All of it goes over the admin listener: no command reads the database, or a secret of the daemon's but the admin token. It must never show that.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from sfu_delegate.config import ConfigInvalid
from sfu_delegate.observe.story import Tone
from sfu_delegate.operate import shown
from sfu_delegate.operate.admin import AdminListener, CannotAsk, Refused, find, is_missing, listener_at, part
from sfu_delegate.operate.screen import drawn, is_terminal, show_json, show_lines, show_table, tell_problem
from sfu_delegate.operate.shown import Around, Line, Times

PAGE: Final = 1000  # the most that the daemon gives at a time
ALIKE: Final = 5  # users who are suggested, at the most
EVERY: Final = 2.0  # seconds between the looks of `status --watch`
_POLL: Final = 0.25  # seconds


class Exit(IntEnum):
    """What the exit codes mean."""

    DONE = 0  # done, found, all is well
    NOT = 1  # not found, refused, not done; of the status: something is wrong
    USAGE = 2
    CANNOT_ASK = 3  # the daemon cannot be asked, or it cannot answer


@dataclass(frozen=True, slots=True)
class Asking:
    """Whom to ask, and how to show the answer."""

    config: Path
    config_may_be_missing: bool
    admin: str | None
    token_file: Path | None
    as_json: bool

    def listener(self) -> AdminListener:
        """The admin listener. Raises ConfigInvalid, CannotAsk."""
        if self.admin is not None:
            return listener_at(self.admin, self.token_file)
        return find(self.config, os.environ, may_be_missing=self.config_may_be_missing, token_file=self.token_file)


def _asked(asking: Asking, work: Callable[[AdminListener], int]) -> int:
    """Do it, and put into words what keeps it from being done."""
    try:
        return work(asking.listener())
    except ConfigInvalid as error:
        unreadable = not is_missing(asking.config) and not os.access(asking.config, os.R_OK)
        named = "name the admin listener: --admin http://127.0.0.1:8081, or --admin unix:/PATH"
        remedy = f"As somebody who may not read it, {named}." if unreadable else f"Or {named}; or another file: --config FILE."
        return _fail(asking, Exit.CANNOT_ASK, *(str(problem) for problem in error.problems), remedy)
    except CannotAsk as error:
        return _fail(asking, Exit.CANNOT_ASK, str(error))
    except Refused as error:
        match error.status:
            case 400:
                return _fail(asking, Exit.USAGE, str(error))
            case 404:
                return _fail(asking, Exit.NOT, str(error))
            case 401:
                remedy = "Here: --token-file FILE, or run this as somebody who may read admin.token_file, or open admin.socket."
                return _fail(asking, Exit.CANNOT_ASK, f"{error} {remedy}")
            case _:
                return _fail(asking, Exit.CANNOT_ASK, str(error))
    except UnicodeEncodeError:
        return _fail(asking, Exit.USAGE, "A name that was given is no text in this locale: give it in UTF-8, with LC_ALL=C.UTF-8 where need be.")
    except (KeyError, TypeError, ValueError, AttributeError, LookupError) as error:
        sentence = f"The daemon's answer is not understood ({type(error).__name__}): is it of the same version as this command?"
        return _fail(asking, Exit.CANNOT_ASK, sentence)


def _fail(asking: Asking, code: Exit, *sentences: str) -> int:
    if asking.as_json:
        show_json({"ok": False, "problems": list(sentences)})
    else:
        for sentence in sentences:
            tell_problem(sentence)
    return code


# ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def status(asking: Asking, *, watch: bool = False) -> int:
    """The overview, once, or again and again."""

    def work(at: AdminListener) -> int:
        if watch:
            return _watch(at)
        answer = at.get("/status")
        if asking.as_json:
            show_json(answer)
        else:
            show_lines(list(shown.status_lines(answer, Times(answer["now_ts"]))))
        return Exit.DONE if shown.is_well(answer) else Exit.NOT

    return _asked(asking, work)


def _watch(at: AdminListener) -> int:
    """Until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    before = at.get("/status")  # who cannot be asked at the beginning is not waited for
    lines = list(shown.status_lines(before, Times(before["now_ts"])))
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(drawn(lines, console.width), refresh=True)
                time.sleep(EVERY)
                try:
                    answer = at.get("/status")
                    lines = list(shown.status_lines(answer, Times(answer["now_ts"]), before))
                    before = answer
                except (CannotAsk, Refused) as error:
                    lines = [Line(shown.plain(error), Tone.BAD, heading=True), Line(f"It is asked again every {EVERY:g} s.")]
    except KeyboardInterrupt:
        return Exit.DONE


def events(asking: Asking, query: Mapping[str, str], limit: int | None) -> int:
    """Delayed events that match; `limit`: None is no limit."""
    return _list(asking, "/delegations", query, "events", "delegations", ("before",), limit, shown.events_table)


def rooms(asking: Asking, query: Mapping[str, str], limit: int | None) -> int:
    """Rooms."""
    return _list(asking, "/rooms", query, "rooms", "rooms with delegations", ("after_sfu", "after"), limit, shown.rooms_table)


def _list(
    asking: Asking,
    path: str,
    query: Mapping[str, str],
    key: str,
    what: str,
    cursors: Sequence[str],
    limit: int | None,
    table: Callable[[Sequence[shown.Json], Times], shown.Table],
) -> int:
    def work(at: AdminListener) -> int:
        found: list[Any] = []
        answer: dict[str, Any] = {}
        cursor: dict[str, str] = {}
        while limit is None or len(found) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            answer = at.get(path, {**query, **cursor, "limit": str(size)})
            found += answer[key]
            cursor = {name: str(answer[name]) for name in cursors if name in answer}
            if not cursor:
                break
        if asking.as_json:
            show_json({**answer, key: found})
        elif found:
            drawing = table(found, Times(answer["now_ts"]))
            show_table(drawing)
            if is_terminal(sys.stdout):
                show_lines([Line(Times(answer["now_ts"]).said())])
            if cursor:
                show_lines([Line(f"There may be more than these {len(found):,}: --all shows them.", Tone.NOTICE)], error=True)
        else:
            show_lines([Line(f"No {what} match." if query else f"No {what} yet.", Tone.NOTICE)], error=True)
        return Exit.DONE if found else Exit.NOT

    return _asked(asking, work)


def show(asking: Asking, id: str) -> int:
    """One delegation."""

    def work(at: AdminListener) -> int:
        answer = at.get(f"/delegations/{part(id)}")
        if asking.as_json:
            show_json(answer)
        else:
            show_lines(list(shown.delegation_lines(answer, Times(answer["now_ts"]))))
        return Exit.DONE

    return _asked(asking, work)


def explain(
    asking: Asking,
    *,
    room: str | None,
    user: str | None,
    sfu: str | None = None,
    around: float | None = None,
    since: float | None = None,
    limit: int = 0,
) -> int:
    """Why it is, or was, so. `around` in Unix seconds, `since` in seconds before now."""
    query = {name: value for name, value in (("room", room), ("user", user), ("sfu", sfu)) if value is not None}
    ago = None if around is None else time.time() - around
    if ago is not None:  # those that were there then
        query["older_than_s"] = str(max(0, math.floor(ago - shown.NEAR)))
        query["finished_within_s"] = str(max(0, math.ceil(ago + shown.NEAR)))
    elif since is not None:
        query["finished_within_s"] = str(math.ceil(since))
    asked = " and ".join(f"{name} {shown.plain(value)}" for name, value in (("room", room), ("user", user), ("SFU", sfu)) if value is not None)

    def work(at: AdminListener) -> int:
        answer = at.get("/explain", query)
        if asking.as_json:
            show_json(answer)
        else:
            now = answer["now_ts"]
            lines = shown.explanation_lines(
                answer,
                Times(now),
                asked=asked,
                around=None if around is None else Around(int(around * 1000)),
                since=None if since is None else int(now - since * 1000),
                limit=limit,
                alike=() if answer["participants"] or user is None else _alike(at, user),
            )
            show_lines(list(lines))
        return Exit.DONE if answer["participants"] else Exit.NOT

    return _asked(asking, work)


def _alike(at: AdminListener, user: str) -> list[str]:
    """Matrix users, or identities made of them, who have delegated lately and begin with what was given."""
    if user.startswith("@") and ":" in user:
        return []
    begun = f"@{user.removeprefix('@')}".lower()
    newest = at.get("/delegations", {"limit": str(PAGE)})["events"]
    names = dict.fromkeys(event["user"] or event["identity"] for event in newest)
    return [name for name in names if name.lower().startswith(begun)][:ALIKE]


# ── changes ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def change(asking: Asking, verb: str, ids: Sequence[str], *, confirm: Callable[[str], bool] | None, wait: float) -> int:
    """Have delegations ended (`end`), or released. `confirm` asks whether it shall be done; `wait`: so many seconds for the outcome of an end."""

    def work(at: AdminListener) -> int:
        return _Change(asking, at, verb).done(ids, confirm, wait)

    return _asked(asking, work)


class _Change:
    def __init__(self, asking: Asking, at: AdminListener, verb: str) -> None:
        self._asking = asking
        self._at = at
        self._verb = verb
        self._problems: list[str] = []
        self._changed: dict[str, int] = {}

    def done(self, ids: Sequence[str], confirm: Callable[[str], bool] | None, wait: float) -> int:
        before = dict(self._look(dict.fromkeys(ids)))
        open_ones = [id for id, answer in before.items() if not shown.done(answer["events"])]
        if not self._asking.as_json or (open_ones and confirm):
            for answer in before.values():
                show_lines(list(shown.intention(answer, self._verb, Times(answer["now_ts"]))), error=self._asking.as_json)
        if open_ones and confirm is not None and not confirm(f"{self._verb.capitalize()} {shown.count(len(open_ones), 'delegation')}?"):
            show_lines([Line("Nothing was done.")], error=True)
            return Exit.NOT
        after = self._carried_out(before, wait)
        self._report(after)
        over = all(shown.done(answer["events"]) for answer in after.values())
        return Exit.DONE if not self._problems and (over or wait <= 0) else Exit.NOT

    def _look(self, ids: Mapping[str, None]) -> Iterator[tuple[str, Any]]:
        for id in ids:
            try:
                answer = self._at.get(f"/delegations/{part(id)}")
            except Refused as error:
                if error.status != 404:
                    raise
                self._problem(f"{id}: {error}")
            else:
                yield answer["id"], answer

    def _problem(self, sentence: str) -> None:
        self._problems.append(sentence)
        if not self._asking.as_json:
            tell_problem(sentence)

    def _carried_out(self, before: Mapping[str, Any], wait: float) -> dict[str, Any]:
        after: dict[str, Any] = {}
        for id, answer in before.items():
            if shown.done(answer["events"]):
                self._changed[id], after[id] = 0, answer
                continue
            try:
                self._changed[id] = self._at.post(f"/delegations/{part(id)}/{self._verb}")["changed"]
            except Refused as error:
                self._problem(f"{id}: {error}")
                if error.status in (401, 403):
                    break
            else:
                after[id] = self._at.get(f"/delegations/{part(id)}")
        deadline = time.monotonic() + wait
        while (left := [id for id, answer in after.items() if not shown.done(answer["events"])]) and time.monotonic() < deadline:
            time.sleep(_POLL)
            for id in left:
                after[id] = self._at.get(f"/delegations/{part(id)}")
        return after

    def _report(self, after: Mapping[str, Any]) -> None:
        if self._asking.as_json:
            told = [
                {"id": id, "changed": self._changed[id], "done": shown.done(answer["events"]), "events": answer["events"]}
                for id, answer in after.items()
            ]
            show_json({"ok": not self._problems, "delegations": told, "problems": self._problems})
        else:
            show_lines([shown.result(answer, self._verb, self._changed[id]) for id, answer in after.items()])
