"""What the daemon answers its operator, as lines and tables for people: pure functions from the API's JSON.

Names of rooms and participants are what strangers chose, and errors what their homeservers answered. So no text leaves this module but through
`plain`, which takes away what could move a cursor, colour a line or turn a text around; and none may be taken for markup by whoever shows it.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Any, Final, NamedTuple

from sfu_delegate.observe.story import Tone, span

Json = Mapping[str, Any]

NEAR: Final = 300.0
"""Seconds before and after a time that an operator asks about: what happened then is marked."""

FEW: Final = 10
"""Goodbyes, up to which the slowest one says more than any part of them."""


class Line(NamedTuple):
    """One line."""

    text: str
    tone: Tone = Tone.PLAIN
    heading: bool = False


class Table(NamedTuple):
    """Rows of cells under headings, with a tone for each; `fields` are what programs get of each row, which need more, and the same each time."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    tones: Sequence[Tone]
    fields: Sequence[Sequence[str]]


def plain(text: object) -> str:
    """A text in which everything can be seen: control characters, those that change a text's direction, and other invisible ones as escapes."""
    return "".join(_shown(character) for character in str(text))


def _shown(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def as_json(text: str) -> str:
    """JSON that somebody else has made, without anything in it that a terminal could obey: such characters stand in strings only, as escapes."""
    return re.sub(r"[^\n\x20-\x7e]", lambda match: match[0] if match[0].isprintable() else _units(match[0]), text)


def _units(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def count(number: int, one: str, several: str = "") -> str:
    """`1 event`, `2 events`."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def seconds(value: float) -> str:
    """A time that may be short: `0.12 s`, `8 min 15 s`."""
    return f"{value:.2g} s" if value < 9.95 else span(value)


# ── times ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Times:
    """Times as their reader has them. `now`: the daemon's, in Unix milliseconds; `zone` is that of this machine, if it is not given."""

    now: int
    zone: tzinfo | None = None

    def local(self, at: int) -> datetime:
        """A time of the daemon's here."""
        return datetime.fromtimestamp(at / 1000, self.zone).astimezone(self.zone)

    def when(self, at: int | None) -> str:
        """The time of day, with the date if that is not today, and the zone if it is another one than now."""
        if at is None:
            return "-"
        here, now = self.local(at), self.local(self.now)
        day = "" if here.date() == now.date() else f"{here:%Y-%m-%d} "
        return f"{day}{here:%H:%M:%S}{'' if here.utcoffset() == now.utcoffset() else f' {_offset(here)}'}"

    def exact(self, at: int | None) -> str:
        """For programs."""
        return "-" if at is None else self.local(at).isoformat(timespec="seconds")

    def age(self, at: int | None) -> str:
        """For how long."""
        return "-" if at is None else span((self.now - at) / 1000)

    def both(self, at: int) -> str:
        """When, and how long ago, or in how long, that is."""
        return f"{self.when(at)} ({f'{self.age(at)} ago' if at <= self.now else f'in {span((at - self.now) / 1000)}'})"

    def said(self) -> str:
        """Which zone it is: to be said once."""
        here = self.local(self.now)
        name = here.tzname() or ""
        return f"Times are in {_offset(here) if not name or name[0] in '+-' or name == 'UTC' else f'{name} ({_offset(here)})'}."


def _offset(here: datetime) -> str:
    minutes = round((here.utcoffset() or timedelta()).total_seconds() / 60)
    return f"UTC{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}" if minutes else "UTC"


_DAY: Final = re.compile(r"(?:(\d{4}-\d\d-\d\d)[T ])?(\d{1,2}:\d\d(?::\d\d)?)", re.ASCII)


def moment(text: str, now: float, zone: tzinfo | None = None) -> float:
    """A time of day, of today or else of yesterday, or one with its date; in Unix seconds. `now`, too. Raises ValueError."""
    match = _DAY.fullmatch(text.strip())
    if match is None:
        raise ValueError("must be a time of day such as 10:42 or 10:42:07, or a date with it: 2026-03-01 10:42")
    here = datetime.fromtimestamp(now, zone).astimezone(zone)
    try:
        clock = datetime.strptime(match[2], "%H:%M:%S" if match[2].count(":") == 2 else "%H:%M").time()  # noqa: DTZ007
        date = here.date() if match[1] is None else datetime.fromisoformat(match[1]).date()
        at = datetime.combine(date, clock, zone).astimezone(zone)
        if match[1] is None and at > here:
            at = datetime.combine(date - timedelta(days=1), clock, zone).astimezone(zone)
        return at.timestamp()
    except (ValueError, OverflowError):  # the first and the last day of all in another zone
        raise ValueError("is no time that there is") from None


# ── the overview ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_well(status: Json) -> bool:
    """Is nothing wrong?"""
    return bool(status["status"] == "ok") and not status["causes"]


def status_lines(status: Json, times: Times, before: Json | None = None) -> Iterator[Line]:
    """The overview. `before`: an earlier one, by which rates are those of the time between the two, and not since the start."""
    well, causes = is_well(status), status["causes"]
    word = plain(status["status"]) if status["status"] != "ok" or well else "degraded"
    since = f"sfu-delegate {plain(status['version'])}, started {times.both(status['started_ts'])}"
    more = f", instance {plain(status['instance'])}, one of {status['instances']}" if status["instance"] and status["instances"] > 1 else ""
    live = sum(number for state, number in status["events"]["states"].items() if state != "done")
    rest = f"{count(live, 'delegated event')} open" if well else count(len(causes), "thing is wrong", "things are wrong")
    yield Line(f"{word}: {since}{more}; {rest}", Tone.GOOD if well else Tone.BAD, heading=True)
    yield from (Line(f"  ! {plain(cause)}", Tone.BAD) for cause in causes)
    yield Line("")
    yield Line("The two promises, since the start", heading=True)
    yield from _promises(status["promises"])
    yield Line("")
    yield Line("Delegated events", heading=True)
    yield from _events(status["events"])
    yield Line("")
    yield Line(f"Rates, {'since the last look' if before else 'since the start, on average'}", heading=True)
    yield from _rates(status, before)
    yield Line("")
    yield Line("Homeservers", heading=True)
    names = [plain(server["name"]) for server in status["homeservers"]]
    for name, server in zip(names, status["homeservers"], strict=True):
        yield from _homeserver(name.ljust(_width(names)), server)
    if not names:
        yield Line("  none yet: the configuration has patterns only, and nobody has delegated")
    yield Line("")
    yield Line("SFUs", heading=True)
    names = [plain(sfu["name"]) for sfu in status["sfus"]]
    for name, sfu in zip(names, status["sfus"], strict=True):
        yield _sfu(name.ljust(_width(names)), sfu, times)
    yield Line("")
    yield from _database(status["database"], times)
    yield Line(times.said())


def _width(names: Sequence[str]) -> int:
    return min(40, max(map(len, names), default=0))


def _promises(promises: Json) -> Iterator[Line]:
    lost = promises["lost_while_connected"]
    if lost:
        yield Line(f"  {'nobody is dropped':<22}BROKEN: {count(lost, 'event')} ran out while connected: sfu-delegate list --outcome lost", Tone.BAD)
    else:
        yield Line(f"  {'nobody is dropped':<22}kept: no event ran out while its participant was connected", Tone.GOOD)
    late = promises["restart_lateness_s"]
    if late > 0:
        yield Line(f"  {'':<22}restarts will be {span(late)} late", Tone.BAD)
    p50, told = promises["disconnect_to_end_p50_s"], promises["disconnect_to_end_of"]
    if p50 is None:
        said = "nobody has left yet"
    else:
        longest = f"the slowest goodbye was through after {seconds(promises['disconnect_to_end_longest_s'])}"
        if told < FEW:
            said = f"{count(promises['departures'], 'departure')}: {longest}"
        else:
            which = "of the goodbyes" if told == promises["departures"] else f"of the last {told} goodbyes"
            p99 = promises["disconnect_to_end_p99_s"]
            parts = f"half {which} were through within {seconds(p50)}, 99 % within {seconds(p99)}"
            said = f"{count(promises['departures'], 'departure')}: {parts}; {longest}"
    yield Line(f"  {'nobody stays a ghost':<22}{said}", Tone.PLAIN if p50 is None else Tone.GOOD)
    if promises["ending"]:
        oldest = promises["oldest_ending_s"]
        waits = "" if oldest is None else f", the oldest for {span(oldest)}"
        yield Line(f"  {'':<22}{count(promises['ending'], 'goodbye waits', 'goodbyes wait')}{waits}", Tone.NOTICE)
    ended = ", ".join(f"{plain(outcome)} {number:,}" for outcome, number in sorted(promises["ended"].items(), key=lambda item: -item[1]))
    if ended:
        yield Line(f"  {'how events ended':<22}{ended}")


def _events(events: Json) -> Iterator[Line]:
    live = [f"{number:,} {plain(presence)}" for presence, number in events["live_by_presence"].items() if number]
    yield Line(f"  {'kept alive':<22}{events['states'].get('live', 0):,}{': ' if live else ''}{', '.join(live)}")
    others = [f"{number:,} {plain(state)}" for state, number in events["states"].items() if number and state not in ("live", "done")]
    if others:
        yield Line(f"  {'otherwise open':<22}{', '.join(others)}", Tone.NOTICE)


_TAKEN: Final = ("stored", "ignored")  # results of webhooks
_DONE: Final = ("done", "not_found", "conflict")  # outcomes of actions: definite answers


def _rates(status: Json, before: Json | None) -> Iterator[Line]:
    time = (status["now_ts"] - (before["now_ts"] if before else status["started_ts"])) / 1000

    def rate(kind: str, wanted: Mapping[str, str], good: Sequence[str], key: str) -> tuple[int, float, int]:
        def total(of: Json, only_good: bool | None = None) -> int:
            return sum(
                each["count"]
                for each in of[kind]
                if all(each[name] == value for name, value in wanted.items()) and (only_good is None or (each[key] in good) is only_good)
            )

        here, bad = total(status), total(status, False)
        there, bad_there = (total(before), total(before, False)) if before else (0, 0)
        return here, max(0, here - there) / time if time > 0 else 0.0, bad - bad_there

    rows: list[tuple[str, str, dict[str, str], Sequence[str], str, str]] = [("webhooks", "webhooks", {}, _TAKEN, "result", "refused or not taken")]
    for action in sorted({each["action"] for each in status["actions"]}):
        rows.append((f"{plain(action)}s" if action != "cancel" else "cancels", "actions", {"action": action}, _DONE, "outcome", "not done at once"))
    for name, kind, wanted, good, key, otherwise in rows:
        number, each, bad = rate(kind, wanted, good, key)
        trouble = f", {bad:,} {otherwise}" if bad > 0 else ""
        yield Line(f"  {name:<22}{each:.3g} a second, {number:,} since the start{trouble}", Tone.NOTICE if trouble else Tone.PLAIN)


def _homeserver(name: str, server: Json) -> Iterator[Line]:
    problem, service = server["problem"], server["application_service"]
    works = f"DOES NOT WORK: {plain(problem)}" if problem else "works" if server["asked"] else "not asked yet"
    own = {"none": "", "ok": ", with its application service"}.get(service, f", APPLICATION SERVICE DOES NOT WORK: {plain(service)}")
    tone = Tone.BAD if problem or service not in ("none", "ok") else Tone.GOOD if server["asked"] else Tone.PLAIN
    yield Line(f"  {name}  {works}{own}; {count(server['events'], 'open event')}", tone)
    indent = " " * (len(name) + 4)
    yield Line(f"{indent}{limit_words(server)}", Tone.PLAIN)
    for lane, what in (("endings_waiting", "goodbyes"), ("restarts_waiting", "restarts")):
        waiting = server[lane]
        if waiting["count"]:
            yield Line(f"{indent}{waiting['count']:,} {what} are due, the oldest for {span(waiting['oldest_s'] or 0.0)}", Tone.NOTICE)
    if server["restart_lateness_s"] > 0:
        yield Line(f"{indent}at this rate, restarts will be {span(server['restart_lateness_s'])} late", Tone.BAD)


def limit_words(server: Json) -> str:
    """What the limit of a homeserver means for those who have delegated there."""
    match server["limit"]:
        case "exempt":
            return "no limit: exempt, by the configuration or its application service"
        case "none":
            return "no limit was found"
        case "some":
            rate, burst, events = server["rate"], server["burst"], server["events"]
            wait = math.ceil(max(0.0, events - burst) / rate) if rate else 0
            each = f"{rate:.3g} action{'' if rate == 1 else 's'} a second, burst {burst:.3g}"
            if not events:
                return f"limit: {each}"
            all_of_them = "if all leave at once" if events > 1 else "if the one who is there leaves"
            return f"limit: {each}: {all_of_them}, {f'the last is gone after {span(wait)}' if wait else 'nobody has to wait for it'}"
        case _:
            return "limit: not known yet, it has refused nothing so far"


def _sfu(name: str, sfu: Json, times: Times) -> Line:
    problem, heard = sfu["problem"], sfu["webhook_ts"]
    failing = "" if sfu["failing_since_ts"] is None else f", for {times.age(sfu['failing_since_ts'])}"
    works = f"DOES NOT ANSWER{failing}: {plain(problem)}" if problem else "answers" if sfu["asked"] else "not asked yet"
    told = "no webhook yet" if heard is None else f"last webhook {times.age(heard)} ago"
    nodes = "; several nodes" if sfu["several_nodes"] else ""
    tone = Tone.BAD if problem else Tone.NOTICE if heard is None else Tone.GOOD
    return Line(f"  {name}  {works}; {told}{nodes}; {plain(sfu['url'])}", tone)


def _database(database: Json, times: Times) -> Iterator[Line]:
    yield Line("Database", heading=True)
    problem = database["problem"] or database["reading_problem"]
    if problem:
        yield Line(f"  {plain(database['name'])}: {plain(problem)}", Tone.BAD)
    if database["events"] is not None:
        oldest = database["oldest_open_ts"]
        since = "" if oldest is None else f"; the oldest open one has been there for {times.age(oldest)}"
        held = f"{count(database['events'], 'event')}, {database['finished']:,} of them finished, in {count(database['rooms'], 'room')}{since}"
        yield Line(f"  {plain(database['name'])}: {held}", Tone.PLAIN if problem else Tone.GOOD)


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def who(event: Json) -> str:
    """Whose it is: the user, or the identity."""
    return plain(event["user"] or event["identity"])


def events_table(events: Sequence[Json], times: Times) -> Table:
    """Delayed events. The number of the row does in place of the delegation's id, which is too long for people."""
    rows = [
        (
            str(event["row"]),
            who(event),
            plain(event["room"]),
            plain(event["homeserver"]),
            plain(event["outcome"] or event["state"]),
            plain(event["presence"]),
            times.age(event["accepted_ts"]),
            times.when(event["accepted_ts"]),
        )
        for event in events
    ]
    fields = [
        (
            plain(event["id"]),
            str(event["row"]),
            plain(event["state"]),
            plain(event["outcome"] or "-"),
            plain(event["presence"]),
            times.exact(event["accepted_ts"]),
            plain(event["sfu"]),
            plain(event["room"]),
            who(event),
            plain(event["homeserver"]),
        )
        for event in events
    ]
    headings = ("Row", "Who", "Room", "Homeserver", "State", "Presence", "Age", "Delegated")
    return Table(headings, rows, [Tone(event["tone"]) for event in events], fields)


def rooms_table(rooms: Sequence[Json], times: Times) -> Table:
    """Rooms."""
    shown, fields, tones = [], [], []
    for room in rooms:
        present = room["participants"]
        doubt = room["doubt_until_ts"] is not None and room["doubt_until_ts"] > times.now
        look = f"failed {room['failures']}×" if room["failures"] else "in doubt" if doubt else times.age(room["looked_ts"])
        numbers = [str(present.get(presence, 0)) for presence in ("connected", "expected", "away", "gone")]
        shown.append((plain(room["room"]), plain(room["sfu"]), *numbers, str(room["events"]), look))
        fields.append((plain(room["sfu"]), plain(room["room"]), *numbers, str(room["events"]), times.exact(room["looked_ts"]), str(room["failures"])))
        tones.append(Tone.NOTICE if room["failures"] or doubt else Tone.PLAIN)
    return Table(("Room", "SFU", "Connected", "Expected", "Away", "Gone", "Events", "Looked at"), shown, tones, fields)


# ── one delegation ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def delegation_lines(shown: Json, times: Times) -> Iterator[Line]:
    """One delegation: the facts, and the story."""
    events = shown["events"]
    first = events[0]
    what = count(len(events), "delayed event")
    yield Line(f"{plain(shown['id'])}: {what} of {who(first)}", heading=True)
    facts = [("identity", plain(first["identity"])), ("room", f"{plain(first['room'])} (SFU {plain(first['sfu'])})")]
    facts += [("homeserver", plain(first["homeserver"])), ("accepted", times.both(first["accepted_ts"]))]
    yield from (Line(f"  {name:<12}{fact}") for name, fact in facts)
    for event in events:
        yield Line("")
        hint = f" ({plain(event['delay_id_hint'])})" if event["delay_id_hint"] else ""
        yield Line(f"Event {event['row']}{hint}", heading=True)
        yield Line(f"  {'now':<12}{plain(event['sentence'])}", Tone(event["tone"]))
        yield from (Line(f"  {name:<12}{fact}") for name, fact in _facts(event, times))
    yield Line("")
    yield Line("Story", heading=True)
    yield from story_lines(shown, times)
    yield Line(times.said())


def _facts(event: Json, times: Times) -> Iterator[tuple[str, str]]:
    presence, since = plain(event["presence"]), times.both(event["presence_since_ts"])
    if event["state"] == "done":
        yield "state", f"done: {plain(event['outcome'])}; the participant was {presence} then, since {since}"
    else:
        yield "state", f"{plain(event['state'])}; the participant is {presence}, since {since}"
    end = "sent" if event["on_disconnect"] == "send" else "cancelled"
    yield "delay", f"{span(event['delay_ms'] / 1000)}; to be {end} when the participant is gone"
    tries = f"; {count(event['attempts'], 'failed try', 'failed tries')} of what is due" if event["attempts"] else ""
    yield "restarts", f"{event['restarts']:,}{tries}"
    for name, key in (("running", "running_since_ts"), ("restart by", "restart_due_ts"), ("runs out", "deadline_ts"), ("SFU asked", "look_ts")):
        if event[key] is not None and (key != "running_since_ts" or event["state"] != "done"):
            yield name, times.both(event[key])
    for name, key in (("departed", "departed_ts"), ("finished", "finished_ts")):
        if event[key] is not None:
            yield name, times.both(event[key])


@dataclass(frozen=True, slots=True)
class Around:
    """The time that an operator asks about, in Unix milliseconds."""

    at: int

    def near(self, at: int) -> bool:
        """Is it then?"""
        return abs(at - self.at) <= NEAR * 1000


def story_lines(told: Json, times: Times, *, around: Around | None = None, since: int | None = None, limit: int = 0) -> Iterator[Line]:
    """What happened, line by line; `since`: in Unix milliseconds; `limit`: so many lines at the most, the newest, or those nearest to the time.

    With `around`, lines near to it are marked, and the time itself stands between the lines.
    """
    story: list[Json] = [line for line in told["story"] if since is None or line["at_ts"] >= since]
    earlier = len(told["story"]) - len(story)
    before = after = 0
    if limit and len(story) > limit:
        first = len(story) - limit
        if around is not None:
            nearest = min(range(len(story)), key=lambda index: abs(story[index]["at_ts"] - around.at))
            first = min(first, max(0, nearest - limit // 2))
        before, after = first, len(story) - first - limit
        story = story[first : first + limit]
    if earlier:
        yield Line(f"  … {count(earlier, 'earlier line')}")
    if before:
        yield Line(f"  … {count(before, 'line')} before: --limit shows more")
    several = len({line["row"] for line in told["story"]}) > 1
    width = max((len(times.when(line["at_ts"])) for line in story), default=8)
    ruled = around is None
    for line in story:
        if around is not None and not ruled and line["at_ts"] > around.at:
            yield _rule(times, around)
            ruled = True
        mark = "> " if around is not None and around.near(line["at_ts"]) else "  "
        row = f"[{line['row']}] " if several else ""
        yield Line(f"{mark}{times.when(line['at_ts']):<{width}}  {row}{plain(line['sentence'])}", Tone(line["tone"]))
    if not story:
        yield Line("  nothing happened since then" if since is not None else "  nothing is told")
    if around is not None and not ruled and not after:
        yield _rule(times, around)
    if after:
        yield Line(f"  … {count(after, 'line')} after: --limit shows more")


def _rule(times: Times, around: Around) -> Line:
    return Line(f"  {times.when(around.at)}  ── the time that you ask about ──", heading=True)


# ── explanations ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def explanation_lines(
    explained: Json, times: Times, *, asked: str, around: Around | None = None, since: int | None = None, limit: int = 0
) -> Iterator[Line]:
    """For each participant how it is now, and what happened. `asked` says what was asked for, for the case that nothing is found."""
    people = explained["participants"]
    if not people:
        yield from _nobody(explained, times, asked, around, since)
        return
    rooms = {(person["sfu"], person["room"]) for person in people}
    yield Line(f"{count(len(people), 'participant')} in {count(len(rooms), 'room')}: {asked}. {times.said()}", heading=True)
    if explained["causes"]:
        yield Line("Wrong right now:", Tone.BAD, heading=True)
        yield from (Line(f"  ! {plain(cause['sentence'])}", Tone.BAD) for cause in explained["causes"])
    if not explained["complete"]:
        yield Line("Only the newest delegations are shown: narrow it by --user, --since or --at.", Tone.NOTICE)
    if around is not None:
        near = sum(around.near(line["at_ts"]) for person in people for line in person["story"])
        told = f"{count(near, 'line is', 'lines are')} marked with >" if near else "nothing happened"
        yield Line(f"Within {span(NEAR)} of {times.when(around.at)} {told}.", heading=True)
    for person in people:
        yield Line("")
        yield from _person(person, times, around, since, limit)


def _person(person: Json, times: Times, around: Around | None, since: int | None, limit: int) -> Iterator[Line]:
    events = person["events"]
    identities = list(dict.fromkeys(event["identity"] for event in events))
    name = plain(person["user"] or person["identity"])
    yield Line(f"{name} in {plain(person['room'])} (SFU {plain(person['sfu'])})", heading=True)
    several = len(events) > 1
    if person["user"] or len(identities) > 1:
        for identity in identities:
            rows = ", ".join(str(event["row"]) for event in events if event["identity"] == identity)
            yield Line(f"  identity {plain(identity)}{f' (events {rows})' if len(identities) > 1 else ''}")
    open_ones = [event for event in events if event["state"] != "done"]
    for event in open_ones or events[-1:]:
        row = f" [{event['row']}]" if several else ""
        yield Line(f"  Now{row}: {plain(event['sentence'])}", Tone(event["tone"]))
    yield from story_lines(person, times, around=around, since=since, limit=limit)


def _nobody(explained: Json, times: Times, asked: str, around: Around | None, since: int | None) -> Iterator[Line]:
    kept = explained["kept_s"]
    then = "" if around is None else f" within {span(NEAR)} of {times.when(around.at)}"
    then = then if since is None else f" since {times.when(since)}"
    yield Line(f"Nothing is known of {asked}{then}.", Tone.NOTICE, heading=True)
    for name in explained["searched"][1:]:
        yield Line(f"  Searched, too: {plain(name)}, which is the room of its call at LiveKit.")
    if around is not None and around.at < times.now - kept * 1000:
        yield Line(f"  That was {times.age(around.at)} ago, and delegations are kept for {span(kept)} after their end (history.keep).")
        return
    if then:
        yield Line("  No delegation that is known was open then: the same without the time shows those of other times, if there are any.")
        return
    start = times.when(int(times.now - kept * 1000))
    yield Line(f"  Delegations are kept for {span(kept)} after their end (history.keep), so nobody has delegated there since {start}.")
    yield Line("  Clients that do not delegate restart and end their events themselves; where one crashes, the homeserver's timer ends it.")
    yield Line("  If somebody must have delegated, room or user have another name here: see `sfu-delegate rooms` and `sfu-delegate list`.")


# ── changes ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def intention(shown: Json, verb: str, times: Times) -> Iterator[Line]:
    """What will happen when a delegation is ended, or released."""
    first = shown["events"][0]
    yield Line(f"{plain(shown['id'])}: {who(first)} in {plain(first['room'])} (SFU {plain(first['sfu'])})", heading=True)
    for event in shown["events"]:
        here = plain(event["homeserver"])
        there = {"connected": "though it is in the call now", "gone": "as it has left"}.get(event["presence"], "whether it comes back or not")
        if event["state"] == "done":
            yield Line(f"  Event {event['row']} is over already: {plain(event['sentence'])}", Tone.NOTICE)
        elif verb == "end" and event["on_disconnect"] == "send":
            yield Line(f"  Event {event['row']}: {here} is told to send the leave event now. The participant will be shown as gone, {there}.")
        elif verb == "end":
            yield Line(f"  Event {event['row']}: {here} is told to cancel the delayed event now, as its client wants it at the end, {there}.")
        else:
            out = "as its timer says" if event["deadline_ts"] is None else f"at {times.both(event['deadline_ts'])}"
            then = "The participant is shown as gone then" if event["on_disconnect"] == "send" else "It takes effect then"
            rest = f"It stays at {here}, where it runs out {out}, unless the client restarts it. {then}, whether it is in the call or not."
            yield Line(f"  Event {event['row']}: the daemon forgets it, and neither restarts nor ends it. {rest}")


def result(shown: Json, verb: str, changed: int) -> Line:
    """What has become of it."""
    events, name = shown["events"], plain(shown["id"])
    waiting = [event for event in events if event["state"] != "done"]
    if waiting:
        return Line(f"{name}: not yet: {plain(waiting[0]['sentence'])} The daemon goes on trying.", Tone.NOTICE)
    outcomes = ", ".join(dict.fromkeys(plain(event["outcome"] or event["state"]) for event in events))
    if not changed:
        return Line(f"{name}: nothing to do, it was over already ({outcomes})", Tone.NOTICE)
    if verb == "release":
        said = dict.fromkeys(plain(event["sentence"]) for event in events if event["outcome"] == "withdrawn")
        return Line(f"{name}: released. {' '.join(said)}".rstrip(), Tone.GOOD)
    bad = any(Tone(event["tone"]) is Tone.BAD for event in events)
    return Line(f"{name}: {outcomes}. {plain(events[-1]['sentence'])}", Tone.BAD if bad else Tone.GOOD)


def done(events: Iterable[Json]) -> bool:
    """Is it over with all of them?"""
    return all(event["state"] == "done" for event in events)
