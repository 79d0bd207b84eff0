"""Draws the two tables of `lifecycle.py`, so that the picture in the documentation is never older than the rules.

`python -m sfu_delegate.delegation.diagram [FILE]` writes the SVG (docs/lifecycle.svg unless named); with `--markdown` it prints the tables as
Markdown. What is drawn comes from the tables alone. Only where the boxes stand is chosen by hand, and a state without a place is an error: a state
that is new must not be missing from the picture. It must never be imported by the daemon.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import NamedTuple, TypeVar

from sfu_delegate.delegation.lifecycle import EVENTS, PRESENCE
from sfu_delegate.delegation.model import Presence, State

S = TypeVar("S", bound=StrEnum)
G = TypeVar("G", bound=StrEnum)

DEFAULT = Path("docs/lifecycle.svg")

BOX = (180.0, 58.0)
GAP = 17.0  # between the two arrows of a pair of states, from the line that joins their middles
LINE = 15.0  # height of a line of text
NEAR_START = 0.34  # where the label of an arrow stands that has one in the other direction beside it
LETTER = 6.6  # width of a letter of a label, about


class Place(NamedTuple):
    """The middle of a box."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Machine:
    """One table with what a picture of it needs. `places` and `notes` are by the value of a state."""

    title: str
    table: Mapping[tuple[str, str], str]
    start: str
    places: Mapping[str, Place]
    notes: Mapping[str, str]
    at: Mapping[tuple[str, str], float]  # where on an arrow its label stands, from 0 to 1, where that is not the usual place
    width: float
    height: float


def _plain(table: Mapping[tuple[S, G], S]) -> dict[tuple[str, str], str]:
    return {(state.value, given.value): new.value for (state, given), new in table.items()}


PARTICIPANT = Machine(
    title="Is the participant in the call?",
    table=_plain(PRESENCE),
    start=Presence.EXPECTED.value,
    places={
        Presence.EXPECTED.value: Place(130, 110),
        Presence.CONNECTED.value: Place(830, 110),
        Presence.AWAY.value: Place(480, 270),
        Presence.GONE.value: Place(480, 520),
    },
    notes={
        Presence.EXPECTED.value: "delegated, not seen yet",
        Presence.CONNECTED.value: "at least one live session",
        Presence.AWAY.value: "gone, or reconnecting",
        Presence.GONE.value: "its events are ended",
    },
    at={},
    width=960,
    height=590,
)

DELAYED_EVENT = Machine(
    title="What becomes of the delayed event?",
    table=_plain(EVENTS),
    start=State.LIVE.value,
    places={
        State.LIVE.value: Place(120, 370),
        State.VANISHED.value: Place(480, 80),
        State.ADRIFT.value: Place(550, 265),
        State.ENDING.value: Place(430, 480),
        State.SUPERSEDED.value: Place(560, 690),
        State.DONE.value: Place(840, 370),
    },
    notes={
        State.LIVE.value: "restarted in time",
        State.ADRIFT.value: "nobody can tell: let run",
        State.VANISHED.value: "404: wait and see",
        State.ENDING.value: "to be sent or cancelled",
        State.SUPERSEDED.value: "to be cancelled",
        State.DONE.value: "ended, with an outcome",
    },
    at={
        (State.LIVE.value, State.DONE.value): 0.3,
        (State.DONE.value, State.LIVE.value): 0.2,
        (State.LIVE.value, State.SUPERSEDED.value): 0.48,
        (State.VANISHED.value, State.DONE.value): 0.4,
        (State.ADRIFT.value, State.ENDING.value): 0.72,
        (State.ADRIFT.value, State.SUPERSEDED.value): 0.68,
    },
    width=960,
    height=750,
)

MACHINES = (PARTICIPANT, DELAYED_EVENT)

_STYLE = """
  svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
  .paper { fill: #ffffff; }
  .title { fill: #24292f; font-size: 19px; font-weight: 600; }
  .box { fill: #f3f5f8; stroke: #57606a; stroke-width: 1.5; }
  .end { stroke-width: 3; }
  .name { fill: #24292f; font-size: 15px; font-weight: 600; text-anchor: middle; }
  .note { fill: #57606a; font-size: 12px; text-anchor: middle; }
  .stays { fill: #57606a; font-size: 11px; font-style: italic; }
  .arrow { fill: none; stroke: #57606a; stroke-width: 1.4; }
  .tip { fill: #57606a; }
  .behind { fill: #ffffff; opacity: 0.92; }
  .label { fill: #24292f; font-size: 12px; text-anchor: middle; }
  @media (prefers-color-scheme: dark) {
    .paper, .behind { fill: #0d1117; }
    .title, .name, .label { fill: #e6edf3; }
    .box { fill: #161b22; stroke: #8b949e; }
    .arrow { stroke: #8b949e; }
    .tip, .note, .stays { fill: #8b949e; }
    .tip { fill: #8b949e; }
  }
"""


def transitions(machine: Machine) -> dict[tuple[str, str], list[str]]:
    """From (state, next state) to what leads there, in the order of the table. A state and itself: what it stays in."""
    found: dict[tuple[str, str], list[str]] = {}
    for (state, given), new in machine.table.items():
        found.setdefault((state, new), []).append(given.replace("_", " "))
    return found


def _arrow(start: Place, end: Place, label: Iterable[str], at: float, aside: float) -> list[str]:
    """A line from box to box, `aside` of the straight one (to the left of its direction), with its label on it."""
    length = math.dist(start, end)
    away = Place((end.y - start.y) / length * aside, -(end.x - start.x) / length * aside)
    shifted = Place(start.x + away.x, start.y + away.y), Place(end.x + away.x, end.y + away.y)
    first = _clipped(start, shifted[0], shifted[1])
    last = _clipped(end, shifted[1], shifted[0])
    x, y = first.x + (last.x - first.x) * at, first.y + (last.y - first.y) * at
    lines = list(label)
    width = max(len(line) for line in lines) * LETTER + 8
    height = len(lines) * LINE
    out = [
        f'<path class="arrow" marker-end="url(#tip)" d="M {first.x:.1f} {first.y:.1f} L {last.x:.1f} {last.y:.1f}"/>',
        f'<rect class="behind" x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3"/>',
    ]
    for n, line in enumerate(lines):
        out.append(f'<text class="label" x="{x:.1f}" y="{y - height / 2 + LINE * n + 11.5:.1f}">{escape(line)}</text>')
    return out


def _clipped(middle: Place, inside: Place, outside: Place) -> Place:
    """Where the line from `inside` (a point in the box around `middle`) to `outside` leaves that box."""
    dx, dy = outside.x - inside.x, outside.y - inside.y
    right = (middle.x + math.copysign(BOX[0] / 2, dx) - inside.x) / dx if dx else math.inf
    down = (middle.y + math.copysign(BOX[1] / 2, dy) - inside.y) / dy if dy else math.inf
    scale = min(right, down)
    return Place(inside.x + dx * scale, inside.y + dy * scale)


def _wrapped(words: list[str], width: int) -> list[str]:
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 2 <= width:
            lines[-1] += f", {word}"
        else:
            lines[-1] += ","
            lines.append(word)
    return lines


def _drawn(machine: Machine, top: float) -> list[str]:
    found = transitions(machine)
    out = [f'<g transform="translate(0 {top:.0f})">', f'<text class="title" x="24" y="34">{escape(machine.title)}</text>']
    start = machine.places[machine.start]
    corner = Place(start.x - BOX[0] / 2, start.y - BOX[1] / 2)
    out.append(f'<circle class="tip" cx="{corner.x - 6:.1f}" cy="{corner.y - 16:.1f}" r="5"/>')
    out.append(f'<path class="arrow" marker-end="url(#tip)" d="M {corner.x - 6:.1f} {corner.y - 16:.1f} L {corner.x + 12:.1f} {corner.y - 1:.1f}"/>')
    labels: list[str] = []
    for (state, new), given in found.items():
        if state == new:
            continue
        paired = (new, state) in found
        aside, middle = (GAP, NEAR_START) if paired else (0.0, 0.5)  # the labels of a pair must not lie on each other
        drawn = _arrow(machine.places[state], machine.places[new], _wrapped(given, 22), machine.at.get((state, new), middle), aside)
        out.append(drawn[0])
        labels += drawn[1:]
    out += labels
    for state in dict.fromkeys([*(state for state, _ in machine.table), *machine.table.values()]):
        x, y = machine.places[state]
        leaves = any(old == state and new != state for old, new in found)
        out.append(
            f'<rect class="box{"" if leaves else " end"}" x="{x - BOX[0] / 2:.1f}" y="{y - BOX[1] / 2:.1f}" width="{BOX[0]:.0f}" '
            f'height="{BOX[1]:.0f}" rx="9"/>'
        )
        out.append(f'<text class="name" x="{x:.1f}" y="{y - 4:.1f}">{escape(state.upper())}</text>')
        out.append(f'<text class="note" x="{x:.1f}" y="{y + 16:.1f}">{escape(machine.notes[state])}</text>')
    out.append("</g>")
    return out


def _stays(machine: Machine, top: float) -> list[str]:
    """What changes no state, as text below the picture."""
    out, y = [f'<g transform="translate(0 {top:.0f})">'], 0.0
    for (state, new), given in transitions(machine).items():
        if state == new:
            text = f"{state.upper()} stays on: " + ", ".join(given)
            out.append(f'<text class="stays" x="24" y="{y:.0f}">{escape(text)}</text>')
            y += LINE
    return [*out, "</g>"]


def svg() -> str:
    """The picture of both tables."""
    body: list[str] = []
    top = 0.0
    for machine in MACHINES:
        body += _drawn(machine, top)
        top += machine.height
        body += _stays(machine, top)
        top += LINE * sum(state == new for state, new in transitions(machine)) + 24
    width = max(machine.width for machine in MACHINES)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {top:.0f}" width="{width:.0f}" height="{top:.0f}" role="img">',
            "<title>The states of a participant and of a delayed event</title>",
            f"<style>{_STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto-start-reverse">'
            '<path class="tip" d="M 0 0 L 10 5 L 0 10 z"/></marker></defs>',
            f'<rect class="paper" width="{width:.0f}" height="{top:.0f}"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def markdown() -> str:
    """Both tables as Markdown: a row for each state, a column for each next state."""
    out: list[str] = []
    for machine in MACHINES:
        found = transitions(machine)
        states = list(machine.places)
        out += [f"### {machine.title}", "", "| from \\ to | " + " | ".join(f"**{state.upper()}**" for state in states) + " |"]
        out.append("|---" * (len(states) + 1) + "|")
        for state in states:
            cells = [", ".join(found.get((state, new), [])) for new in states]
            out.append(f"| **{state.upper()}**<br>{machine.notes[state]} | " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def main(arguments: list[str]) -> None:
    """Write the picture, or print the tables."""
    if arguments == ["--markdown"]:
        sys.stdout.write(markdown())
        return
    path = Path(arguments[0]) if arguments else DEFAULT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
