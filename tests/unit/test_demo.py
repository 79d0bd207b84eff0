"""The demonstration's beginning, its lines, and what it says where Synapse is missing."""

from dataclasses import replace

import pytest
from rich.console import Console
from rich.live import Live
from sfu_delegate import demo
from sfu_delegate.demo.screen import Column, Screen
from sfu_delegate.demo.story import CAST, Outcome


def outcome(number: int, *, in_call: bool) -> Outcome:
    person = CAST[number]
    return Outcome(
        person, True, True, 100.0, None if in_call else 110.0, "" if in_call else "SIGNAL_CLOSE", None, in_call, in_call, 2, True, "", in_call
    )


def test_without_synapse_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A clear sentence, the remedy, exit code 1, and no traceback."""
    monkeypatch.setattr("sfu_delegate.demo.synapse.installed", lambda: False)
    assert demo.run(synapse=True, seconds=None, plain=True) == 1
    said = capsys.readouterr().err
    assert "matrix-synapse is not installed" in said
    assert "sfu-delegate demo --no-synapse" in said


def test_plain_lines_name_who_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal, every line begins with its time and its speaker, and brackets in it mean themselves."""
    with Screen(plain=True) as screen:
        screen.begin(50)
        screen.say(Column.SFU, "anna [joined]")
    assert capsys.readouterr().out.split() == ["0.0", "s", "SFU", "anna", "[joined]"]


@pytest.mark.parametrize(("width", "rows"), [(160, 1), (90, 3)])
def test_a_narrow_terminal_has_its_panels_below_each_other(width: int, rows: int) -> None:
    """At 90 columns a line that fits is not cut, the newest lines are there, and so is everybody; wide ones have the panels side by side."""
    screen = Screen(plain=True)
    screen.console = Console(width=width, height=30, highlight=False)
    screen.begin(50)
    screen._live = Live(console=screen.console)  # never started: the picture is only drawn
    screen.members({f"person{number}": (True, "") for number in range(6)})
    for number in range(40):
        screen.say(Column.DAEMON, f"line {number} of a delegation that is told about")
    with screen.console.capture() as captured:
        screen.console.print(screen._picture(), height=30)
    drawn = captured.get()
    assert "line 39 of a delegation that is told about" in drawn
    assert "person5" in drawn
    assert len({line for line, text in enumerate(drawn.splitlines()) if any(title in text for title in screen.titles.values())}) == rows


def test_only_changes_of_the_room_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody who is still in the call makes no new line; somebody who has left makes one."""
    with Screen(plain=True) as screen:
        screen.members({"anna": (None, "")})
        screen.members({"anna": (True, "")})
        screen.members({"anna": (True, "restarted once")})
        screen.members({"anna": (False, "2.0 s after the SFU's word")})
    lines = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["anna is in the call", "anna has left the call (2.0 s after the SFU's word)"]


def test_nothing_is_said_after_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict is the last line: what the SFU tells while it is stopped is of no interest."""
    with Screen(plain=True) as screen:
        screen.begin(50)
        screen.summary([outcome(0, in_call=True)], 130.0, [], 0)
        screen.say(Column.SFU, "room finished")
    assert capsys.readouterr().out.splitlines()[-1].startswith("Everything is as it must be")


def test_a_run_that_was_cut_short_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Who had no time to join has a row without marks, and the verdict is of what was seen."""
    with Screen(plain=True) as screen:
        screen.begin(1.5)
        late = replace(outcome(1, in_call=False), came=False, acted=False, joined_at=None, left_at=None, restarts=0)
        screen.summary([outcome(0, in_call=True), late], 130.0, [], 0, complete=False)
    out = capsys.readouterr().out
    assert "has not joined before the end" in out
    assert "NO" not in out
    assert out.splitlines()[-1] == "Ended early after 1.5 s. Everything so far is as it must be."


def test_the_summary_shows_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """Everybody has a row, every fault a line, and the verdict is plain."""
    with Screen(plain=True) as screen:
        screen.summary([outcome(0, in_call=True), outcome(2, in_call=False)], 130.0, ["ben: the leave event is not in the room"], 0)
    out = capsys.readouterr().out
    rows = {cells[1]: cells for line in out.splitlines() if line.startswith("│") and (cells := [cell.strip() for cell in line.split("│")])}
    assert (rows["anna"][6], rows["anna"][7]) == ("yes", "1 (at least 1)")
    assert (rows["ben"][4], rows["ben"][5]) == ("NO", "–")
    assert "missing: ben: the leave event is not in the room" in out
    assert "Not everything is as it must be." in out
