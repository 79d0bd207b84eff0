"""What people see: three columns that move on a terminal, plain lines elsewhere, and the summary."""

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sfu_delegate.demo.story import Outcome

PLAIN_WIDTH = 130
KEPT_LINES = 200
STAGE_HEIGHT = 4
FRAME = 2  # lines of a panel that are not its content
REFRESHES = 8  # a second
NARROW = 120  # columns; below it three panels side by side would cut every line


class Column(Enum):
    """Whose words a line is: the plain label, and the colour."""

    STAGE = ("", "bold")
    SFU = ("SFU", "cyan")
    DAEMON = ("daemon", "magenta")
    ROOM = ("room", "green")


class Screen:
    """Use as a context manager. `homeserver` is whose word about the room is shown, `sfu` the same for the SFU."""

    def __init__(self, *, plain: bool, sfu: str = "the SFU", homeserver: str = "the homeserver") -> None:
        terminal = sys.stdout.isatty()
        self.console = Console(highlight=False, soft_wrap=not terminal, width=None if terminal else PLAIN_WIDTH)
        self.titles = {Column.SFU: f"What {sfu} sees", Column.DAEMON: "What the daemon does", Column.ROOM: f"The call, as {homeserver} tells it"}
        self.length: float | None = None  # seconds of the whole
        self._began: float | None = None
        self._lines: dict[Column, deque[Text]] = {column: deque(maxlen=KEPT_LINES) for column in Column}
        self._members: dict[str, tuple[bool | None, str]] = {}
        self._live: Live | None = None
        self._over = False
        if terminal and not plain:  # last: it asks for its first picture at once
            self._live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=REFRESHES, screen=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; from here on there are only lines. May be called again."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, length: float) -> None:
        """The clock of the story starts now."""
        self._began, self.length = time.monotonic(), length

    @property
    def elapsed(self) -> float:
        """Seconds since `begin`."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def say(self, column: Column, text: str, style: str = "") -> None:
        """One line. Nothing more is said once the summary has been shown: what comes then is of the cleaning up."""
        if self._over:
            return
        label, colour = column.value
        stamp = "" if self._began is None else f"{self.elapsed:5.1f} s  "
        if self._live is None:
            line = Text(stamp, style="dim")
            line.append(f"{label:<7}" if label else "── ", style=colour)
            line.append(text, style=style)
            self.console.print(line)
        else:
            # One line each: wrapped ones would push the newest out of the picture.
            line = Text(stamp, style="dim", no_wrap=True, overflow="ellipsis")
            line.append(text, style=style)
            self._lines[column].append(line)

    def members(self, rows: Mapping[str, tuple[bool | None, str]]) -> None:
        """Who is in the call (None: has never been), with a word about each."""
        for name, (in_call, word) in rows.items():
            if in_call is not None and self._members.get(name, (None, ""))[0] is not in_call and self._live is None:
                text = f"{name} is in the call" if in_call else f"{name} has left the call{f' ({word})' if word else ''}"
                self.say(Column.ROOM, text)
        self._members = dict(rows)

    def summary(self, outcomes: Sequence[Outcome], now: float, wrong: Sequence[str], lost: float, *, complete: bool = True) -> None:
        """The table at the end, and the verdict; `complete`: the whole story was played. Closes the live picture first, and says nothing later."""
        self.close()
        self._over = True
        self.console.print()
        self.console.print(_table(outcomes, now))
        self.console.print(f"Events lost while their participant was connected, by the daemon's own count: {lost:g}")
        for sentence in wrong:
            self.console.print(Text(f"missing: {sentence}", style="bold red"))
        good = "Everything is as it must be: whoever left has left the room's call, and whoever stayed is still in it."
        if not complete:
            good = f"Ended early after {self.length or 0:g} s. Everything so far is as it must be."
        verdict = Text(good, style="bold green") if not wrong else Text("Not everything is as it must be.", style="bold red")
        self.console.print(verdict)

    def _picture(self) -> RenderableType:
        layout = Layout()
        layout.split_column(Layout(self._stage(), name="stage", size=STAGE_HEIGHT), Layout(name="columns"))
        height = max(FRAME + 1, self.console.height - STAGE_HEIGHT)
        if self.console.width >= NARROW:
            layout["columns"].split_row(*(Layout(self._column(column, height), ratio=ratio) for column, ratio in _RATIOS.items()))
        else:
            room = min(len(self._members) + FRAME, height // 2)
            heights = {Column.SFU: (height - room) // 2, Column.DAEMON: height - room - (height - room) // 2, Column.ROOM: room}
            layout["columns"].split_column(*(Layout(self._column(column, size), size=size) for column, size in heights.items()))
        return layout

    def _stage(self) -> RenderableType:
        lines = self._lines[Column.STAGE]
        if self._began is None or self.length is None:
            clock = "starting"
        elif self.elapsed <= self.length:
            clock = f"{self.elapsed:.0f} of {self.length:.0f} s"
        else:
            clock = f"{self.elapsed:.0f} s: waiting for the last leave events"
        latest = Group(*([*lines][-2:]))
        return Panel(latest, title=f"sfu-delegate · {clock} · Ctrl-C ends it", title_align="left", border_style="bold")

    def _column(self, column: Column, height: int) -> RenderableType:
        title, colour = self.titles[column], column.value[1]
        if column is Column.ROOM:
            return Panel(self._member_table(), title=title, border_style=colour)
        # The newest lines are what matters; what does not fit is above.
        room = max(1, height - FRAME)
        return Panel(Group(*[*self._lines[column]][-room:]), title=title, border_style=colour)

    def _member_table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for name, (in_call, word) in self._members.items():
            mark = {True: Text("● in the call", style="bold green"), False: Text("○ left", style="red"), None: Text("· not yet", style="dim")}[
                in_call
            ]
            table.add_row(Text(name, style="bold"), mark, Text(word, style="dim"))
        return table


_MARKS: dict[bool | None, tuple[str, str]] = {True: ("● in the call", "bold green"), False: ("○ left", "red"), None: ("· not yet", "dim")}
_RATIOS = {Column.SFU: 3, Column.DAEMON: 4, Column.ROOM: 4}


def _table(outcomes: Sequence[Outcome], now: float) -> Table:
    caption = (
        "In the room: is the leave event there? Delay: from the SFU's word to the leave event. Restarts: after the first, which is the check; "
        "in brackets, how many were due."
    )
    table = Table(title="What became of everybody", title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    for heading in ("Who", "How it ended", "The SFU's word", "In the room", "Delay", "Member", "Restarts"):
        table.add_column(heading, overflow="fold")
    for one in outcomes:
        table.add_row(*(Text(cell) for cell in _cells(one, now)))
    return table


def _cells(one: Outcome, now: float) -> tuple[str, ...]:
    how = one.person.how if one.acted or one.person.act is None else "still in the call at the end"
    if not one.came:
        return one.person.name, "has not joined before the end", *["–"] * 5
    if not one.person.leaves or one.left_at is None:
        due, restarts = one.restarts_due(now), max(0, one.restarts - 1)
        word = "has not noticed yet" if one.person.leaves and one.acted else one.reason or "–"
        member = "yes" if one.in_call and one.announced_once else "NO"
        return one.person.name, how, word, "–", "–", member, f"{restarts} (at least {due})" if due else str(restarts)
    found = "NO" if one.leave_at is None else "yes"
    after = "–" if one.delay is None else f"{max(0.0, one.delay):.1f} s"
    return one.person.name, how, one.reason, found, after, "YES" if one.in_call else "no", str(max(0, one.restarts - 1))
