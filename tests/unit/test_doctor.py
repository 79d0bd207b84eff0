"""How the doctor runs its checks and shows what came of them: bounded in time, one failure beside the others, and nothing secret."""

import asyncio
import io
import json
import re
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sfu_delegate import __version__
from sfu_delegate.cli import app
from sfu_delegate.doctor import showing
from sfu_delegate.doctor.findings import CannotLook, Check, Finding, Report, Result, Verdict, ok, problem, skipped, warning
from sfu_delegate.doctor.running import Shared, in_thread, run_all
from sfu_delegate.doctor.showing import as_data, lines, show
from sfu_delegate.operate.screen import show_json
from typer.testing import CliRunner

SECRET = "hunter2-hunter2-hunter2-hunter2-hunter2"


def check(id: str, look: Callable[[], Awaitable[Finding]], within: float = 10.0) -> Check:
    return Check(id, "", within, look)


async def good() -> Finding:
    return ok("it is so")


async def never() -> Finding:
    await asyncio.Event().wait()
    raise AssertionError


# ── running ──


async def test_what_hangs_is_given_up_and_the_others_are_not_held_up() -> None:
    """Each check has its own time, and the results come in the order of the checks."""
    results = await run_all([check("slow", never, 0.01), check("good", good)])
    assert [(result.id, result.finding.verdict) for result in results] == [("slow", Verdict.PROBLEM), ("good", Verdict.OK)]
    assert "no answer within 10 ms" in results[0].finding.evidence


async def test_all_of_them_have_one_time() -> None:
    """However long each of them may take."""
    results = await run_all([check("slow", never, 1000.0)], within=0.01)
    assert results[0].finding.verdict is Verdict.PROBLEM


async def test_a_check_that_fails_does_not_take_the_others_with_it() -> None:
    """It is a defect of the doctor, and its text, which may be anything, is not shown."""

    async def fails() -> Finding:
        raise ValueError(SECRET)

    async def cannot() -> Finding:
        raise CannotLook("there is none", "make one")

    failed, skipped_one, fine = await run_all([check("fails", fails), check("cannot", cannot), check("good", good)])
    assert (failed.finding.verdict, fine.finding.verdict) == (Verdict.WARNING, Verdict.OK)
    assert "ValueError" in failed.finding.evidence
    assert SECRET not in str(failed)
    assert skipped_one.finding == skipped("there is none", "make one")


async def test_it_is_told_what_is_still_under_way() -> None:
    """For a terminal."""
    told: list[list[str]] = []
    await run_all([check("one", good), check("two", good)], lambda left: told.append([one.id for one in left]))
    assert told[0] == ["one", "two"]
    assert told[-1] == []


async def test_a_thread_that_hangs_is_left_alone() -> None:
    """As with a disk that is gone: the check is given up, and what comes later comes too late."""
    back = threading.Event()

    async def looks() -> Finding:
        await in_thread(back.wait)
        return ok("it is back")

    async def fails() -> Finding:
        def work(what: str) -> Finding:
            raise CannotLook(what)

        return await in_thread(work, "there is none")

    hung, failed = await run_all([check("hangs", looks, 0.05), check("fails", fails)])
    assert (hung.finding.verdict, failed.finding) == (Verdict.PROBLEM, skipped("there is none"))
    [thread] = [one for one in threading.enumerate() if one.daemon and "in_thread" in one.name]
    back.set()
    thread.join()


async def test_what_several_need_is_looked_at_once() -> None:
    """Whoever gives up does not stop it for the others; what fails, fails for each who asks."""
    begun, go = 0, asyncio.Event()

    async def look() -> int:
        nonlocal begun
        begun += 1
        await go.wait()
        return 7

    shared = Shared(look)
    impatient = asyncio.create_task(shared())
    patient = asyncio.create_task(shared())
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    go.set()
    assert (await patient, await shared(), begun) == (7, 7, 1)
    assert await shared.end() == 7

    async def fails() -> int:
        raise CannotLook("no")

    failing = Shared(fails)
    for _ in range(2):
        with pytest.raises(CannotLook):
            await failing()
    assert await failing.end() is None


async def test_what_nobody_waits_for_is_ended() -> None:
    """A look that hangs, and one that was never begun."""
    hanging = Shared(never)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(hanging(), 0.01)
    assert await hanging.end() is None
    assert await Shared(never).end() is None


# ── showing ──

REPORT = Report(
    "x.yaml",
    [
        Result("config", "", ok("it can be used"), 0.001),
        Result("sfu.webhooks", "main", problem("they [do not] come", "livekit.yaml needs\nwebhook:\n  urls: [x]"), 1.0),
        Result("homeserver.rate_limit", "example.org", warning("a call of 500 takes 8 min 15 s", "register"), 2.0),
        Result("daemon", "", skipped("no daemon runs"), 0.0),
    ],
    2.5,
)


def test_lines_for_pipes() -> None:
    """The verdict comes first, and what to do is below, with its lines as they are."""
    assert list(lines(REPORT)) == [
        "ok       config                             it can be used",
        "problem  sfu.webhooks main                  they [do not] come",
        "                                            → livekit.yaml needs",
        "                                              webhook:",
        "                                                urls: [x]",
        "warning  homeserver.rate_limit example.org  a call of 500 takes 8 min 15 s",
        "                                            → register",
        "skipped  daemon                             no daemon runs",
        "x.yaml: 1 problem, 1 warning, 1 ok and 1 skipped, in 2.5 s",
    ]


def test_data_for_programs() -> None:
    """All of it, with the counts."""
    data = as_data(REPORT)
    assert (data["ok"], data["verdict"], data["version"], data["config"]) == (False, "problem", __version__, "x.yaml")
    assert data["counts"] == {"ok": 1, "warning": 1, "problem": 1, "skipped": 1}
    assert data["checks"][1] == {
        "id": "sfu.webhooks",
        "subject": "main",
        "verdict": "problem",
        "evidence": "they [do not] come",
        "remedy": "livekit.yaml needs\nwebhook:\n  urls: [x]",
        "seconds": 1.0,
    }
    json.dumps(data)


class Terminal(io.StringIO):
    """A terminal that can be read afterwards."""

    def isatty(self) -> bool:
        return True


def test_people_see_what_is_wrong_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems, warnings, then the rest in a line each, with what to do where there is something; and square brackets are no markup."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    show(REPORT)
    assert re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines() == [
        "problem: sfu.webhooks main",
        "  they [do not] come",
        "  → livekit.yaml needs",
        "    webhook:",
        "      urls: [x]",
        "",
        "warning: homeserver.rate_limit example.org",
        "  a call of 500 takes 8 min 15 s",
        "  → register",
        "",
        "skipped  daemon  no daemon runs",
        "ok       config  it can be used",
        "x.yaml: 1 problem, 1 warning, 1 ok and 1 skipped, in 2.5 s",
    ]


def test_what_others_have_answered_is_not_obeyed_by_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """In lines, in the table, and in JSON: a homeserver's newest version may be an escape sequence, or half a character."""
    report = Report("x.yaml", [Result("a", "b", warning("newest \x1b]0;owned\x07\u202e\udc80", "url\x9b2J"), 0.0)], 0.1)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    show(report)
    show_json(as_data(report))
    for text in ("\n".join(lines(report)), terminal.getvalue()):
        assert not {"\x07", "\u202e", "\udc80", "\x9b"} & set(text)
        assert "\x1b]" not in text
        assert r"newest \x1b]0;owned\x07\u202e\udc80" in text
    assert json.loads(terminal.getvalue().partition("\n{")[2].join(("{", "")))["checks"][0]["remedy"] == "url\x9b2J"


def test_a_terminal_without_our_characters_gets_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the arrow, where the locale is not UTF-8."""
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        show(REPORT)
    assert r"\u2192 register" in (tmp_path / "out").read_text(encoding="ascii")


def test_progress_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is still under way, and nothing where nobody looks."""
    monkeypatch.setattr(sys, "stderr", silent := io.StringIO())
    with showing.progress() as tell:
        tell([check("one", good)])
    assert silent.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with showing.progress() as tell:
        tell([check(f"number-{n}[bold]", good) for n in range(5)])


# ── the command ──


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments], env={"SFU_DELEGATE_CONFIG": None})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_configuration_that_cannot_be_used_is_all_that_is_told(tmp_path: Path) -> None:
    """Each problem with what to do, and 1."""
    file = tmp_path / "x.yaml"
    file.write_text(f"sfus: {{main: {{url: 'wss://sfu.example.org', keys: {{APIone: {SECRET}}}}}}}\nlisten: {{port: x}}\n")
    code, said = run("--config", str(file))
    assert code == 1
    assert "problem  config  listen.port" in said
    assert "homeservers" in said
    assert SECRET not in said
    code, said = run("--config", str(file), "--json")
    data = json.loads(said)
    assert (code, data["ok"], [check["id"] for check in data["checks"]]) == (1, False, ["config"])


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    """The same."""
    code, said = run("--config", str(tmp_path / "none.yaml"))
    assert code == 1
    assert "No such file" in said


def test_wrong_usage() -> None:
    """An option that there is not."""
    assert run("--cofig", "x")[0] == 2
