"""What the manual shows as answers of the operator's commands is what they print."""

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from sfu_delegate.api.admin import event_json, story_json
from sfu_delegate.delegation.model import DelayedEvent, Note, Outcome, Presence, State
from sfu_delegate.operate import shown
from sfu_delegate.operate.shown import Around, Line, Times

from tests.rows import row
from tests.snippets import given

ZONE = ZoneInfo("Europe/Berlin")
ROOM = "h7VPzR4wwjhCTp5BQCLqueAK7M8l8iedA0P5Pw9sd+c"


def at(hour: int, minute: int, second: int) -> float:
    return datetime(2026, 11, 30, hour, minute, second, tzinfo=ZONE).timestamp()


NOW = at(14, 47, 14)
TIMES = Times(int(NOW * 1000), ZONE)


def delegated(name: str, id: int, delegation: str, accepted: float, presence: Presence = Presence.CONNECTED, **more: Any) -> DelayedEvent:
    device = f"@{name}:example.org:{name[0].upper()}DEVICE"
    fields: dict[str, Any] = {
        "room": ROOM,
        "homeserver": "example.org",
        "user": f"@{name}:example.org",
        "accepted_at": accepted,
        "running_since": accepted,
    }
    return row(presence, id=id, delegation=delegation, identity=device, presence_since=accepted, **fields, **more)


ALICE = delegated(
    "alice",
    1,
    "dlg_01a22cb54e3769d0287eda59241570f8",
    at(14, 46, 49),
    Presence.GONE,
    state=State.DONE,
    outcome=Outcome.SENT,
    reason="CONNECTION_TIMEOUT",
)
BOB = delegated("bob", 2, "dlg_01a22cb581609cc6e6fa41e75020ec6b", at(14, 47, 2))
NOTES = [
    Note(1, at(14, 46, 49), "delegated", ALICE.delegation),
    Note(1, at(14, 46, 49), "verified", ""),
    Note(1, at(14, 46, 50), "connected", ""),
    Note(1, at(14, 47, 0) + 0.3, "away", "CONNECTION_TIMEOUT"),
    Note(1, at(14, 47, 5), "gone", "CONNECTION_TIMEOUT"),
    Note(1, at(14, 47, 5), "ending", ""),
    Note(1, at(14, 47, 5), "sent", "200"),
]


def text(*lines: Line) -> str:
    return "".join(f"{line.text}\n" for line in lines)


def test_the_explanation_is_the_one_that_is_shown() -> None:
    """Of a participant whose network was gone, around a time."""
    person = {"sfu": ALICE.sfu, "room": ROOM, "user": ALICE.user, "identity": ALICE.identity, **story_json([ALICE], NOTES, NOW)}
    answer = {"participants": [person], "causes": [], "complete": True, "searched": [], "kept_s": 604_800.0}
    around = Around(int(at(14, 47, 0) * 1000))
    lines = shown.explanation_lines(answer, TIMES, asked=f"user {ALICE.user}", around=around)
    assert text(*lines) == given("docs/operating.md", "── the time that you ask about ──")


def test_the_list_is_the_one_that_is_shown() -> None:
    """As lines for programs."""
    table = shown.events_table([event_json(event, NOW) for event in (BOB, ALICE)], TIMES)
    assert "".join("\t".join(fields) + "\n" for fields in table.fields) == given("docs/operating.md", "\tdone\tsent\tgone\t")


def test_what_is_said_of_an_end_is_what_is_shown() -> None:
    """Before, and after."""
    third = BOB._replace(id=3, delegation="dlg_01a22cb5e0ae447ae38d4df003ea4b3f")
    over = third._replace(state=State.DONE, outcome=Outcome.SENT, presence=Presence.GONE)
    before, after = ({"id": third.delegation, "events": [event_json(event, NOW)]} for event in (third, over))
    said = text(*shown.intention(before, "end", TIMES), shown.result(after, "end", 1))
    assert said == given("docs/operating.md", "Event 3: example.org is told")
