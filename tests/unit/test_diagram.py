"""The picture in the documentation: it is the tables', all of them, and not older than they are."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from sfu_delegate.delegation import diagram
from sfu_delegate.delegation.lifecycle import EVENTS, PRESENCE
from sfu_delegate.delegation.model import Presence, State

PICTURE = Path(__file__).parents[2] / "docs" / "lifecycle.svg"


def test_the_picture_is_not_stale() -> None:
    """Whoever changes a table draws it anew."""
    remedy = "docs/lifecycle.svg is older than the tables: run python -m sfu_delegate.delegation.diagram"
    assert PICTURE.read_text(encoding="utf-8") == diagram.svg(), remedy


def test_the_picture_shows_every_state_and_every_transition() -> None:
    """It is well-formed XML, and no word of the tables is missing in it."""
    texts = [element.text or "" for element in ElementTree.fromstring(diagram.svg()).iter("{http://www.w3.org/2000/svg}text")]
    for state in (*Presence, *State):
        assert state.value.upper() in texts
    shown = " ".join(texts)
    for _, given in (*PRESENCE, *EVENTS):
        assert given.value.replace("_", " ") in shown


def test_every_entry_of_the_tables_is_in_the_transitions() -> None:
    """Each once."""
    for machine, table in ((diagram.PARTICIPANT, PRESENCE), (diagram.DELAYED_EVENT, EVENTS)):
        found = diagram.transitions(machine)
        assert sum(len(given) for given in found.values()) == len(table)
        for (state, given), new in table.items():
            assert given.value.replace("_", " ") in found[state.value, new.value]


def test_the_markdown_has_a_row_and_a_column_for_every_state() -> None:
    """With the same words."""
    text = diagram.markdown()
    for state in (*Presence, *State):
        assert text.count(f"**{state.value.upper()}**") == 2


def test_the_command_writes_the_file_that_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And prints the tables when asked for Markdown."""
    path = tmp_path / "docs" / "picture.svg"
    diagram.main([str(path)])
    assert path.read_text(encoding="utf-8") == diagram.svg()
    diagram.main(["--markdown"])
    assert capsys.readouterr().out == diagram.markdown()
