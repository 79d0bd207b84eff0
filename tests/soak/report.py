"""What a soak found, as JSON and as text. Whatever is in `failures` makes it fail."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from sfu_delegate.sandbox.homeserver import End

from tests.soak.disturbances import Disturbances
from tests.soak.faults import Keeper
from tests.soak.people import World
from tests.soak.settings import Settings
from tests.soak.truth import Harm, Truth
from tests.soak.watch import Database, Log, Memory, Sample, percentiles, total, unfinished

Json = dict[str, Any]
LISTED = 20  # of each kind of harm
COURSE = 120  # points of the memory's course
ACTIONS = ("restart", "send", "cancel")


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything that a report is made of."""

    settings: Settings
    begun: float
    seconds: float
    seconds_to_end: float
    exit_codes: Sequence[int]
    world: World
    truth: Truth
    disturbances: Disturbances
    keepers: Mapping[str, Keeper]
    log: Log
    memory: Sequence[Memory]
    metrics: Mapping[str, dict[Sample, float]]  # by process, as the keepers
    database: Database


def report(seen: Seen) -> Json:
    """The report."""
    truth = seen.truth
    events = [event for server in seen.world.homeservers.values() for event in server.model.events.values()]
    restarts = sum(len(event.restarted_at) for event in events)
    found: Json = {
        "settings": asdict(seen.settings) | {"scaled": seen.settings.scaled()},
        "seconds": round(seen.seconds),
        "people": dict(sorted(seen.world.did.items())),
        "delegated": {
            "memberships": truth.memberships,
            "answers": dict(sorted(seen.world.answers.items())),
            "rows": seen.database.states.total(),
        },
        "restarted": {"by_the_daemon": restarts - seen.world.restarts, "by_clients": seen.world.restarts},
        "ended": dict(sorted(truth.endings.items())),
        "seconds_from_departure_to_end": _lateness(truth),
        "seconds_until_all_had_ended": round(seen.seconds_to_end, 1),
        "homeservers": {name: _answers(server.model.answers) for name, server in seen.world.homeservers.items()},
        "webhooks_lost_on_the_way": dict(seen.world.sfu.model.lost),
        "looks": dict(seen.world.sfu.model.calls),
        "daemon": dict(sum((keeper.did for keeper in seen.keepers.values()), Counter[str]())),
        "disturbances": seen.disturbances.counts(),
        "memory": _memory(seen.memory),
        "log": {"levels": dict(seen.log.levels), "events": dict(seen.log.events), "errors": list(seen.log.errors)},
        "metrics": _metric_checks(seen),
        "database": {
            "states": dict(seen.database.states),
            "sound": seen.database.sound,
            "outcomes": [
                {"says": says, "true": true, "times": times, "such_as": seen.database.examples[says, true]}
                for (says, true), times in sorted(seen.database.outcomes.items())
            ],
        },
        "lost": _listed(truth.lost),
        "excused": _listed(truth.excused),
        "ghosts": _listed(truth.ghosts),
        "stale": _listed(truth.stale),
        "left_over": {
            "events": [membership.described() for membership in truth.open if membership.event.end is End.PENDING][:LISTED],
            "rows": seen.database.unfinished[:LISTED],
        },
    }
    found["failures"] = _failures(seen, found)
    return found


def _failures(seen: Seen, found: Json) -> list[str]:
    truth, failures = seen.truth, []
    for name, what in (("lost", truth.lost), ("ghosts", truth.ghosts), ("stale leaves", truth.stale)):
        if what:
            failures.append(f"{len(what)} {name}")
    if truth.open:
        failures.append(f"{len(truth.open)} delayed events have not ended")
    if seen.database.unfinished:
        failures.append(f"{len(seen.database.unfinished)} unfinished rows in the database")
    if seen.database.sound != "ok":
        failures.append(f"the database is not sound: {seen.database.sound}")
    if seen.log.errors:
        failures.append(f"{seen.log.unexpected} errors in the log")
    failures += [f"the daemon ended with {code} after SIGTERM" for code in seen.exit_codes if code != 0]
    failures += [f"metrics: {check['what']}: {check['metric']:g}, but {check['true']}" for check in found["metrics"] if not check["agrees"]]
    return failures


def _lateness(truth: Truth) -> Json:
    """By homeserver, and apart those departures around which nothing was disturbed."""
    by_home = {
        name: percentiles(late for home, _, late in truth.lateness if home == name) for name in sorted({home for home, _, _ in truth.lateness})
    }
    calm = percentiles(late for _, calm, late in truth.lateness if calm)
    return {"all": percentiles(late for _, _, late in truth.lateness), "undisturbed": calm, **by_home}


def _answers(answers: Counter[tuple[str, int]]) -> Json:
    """How the homeserver answered the daemon's requests; 0 stands for no answer."""
    return {action: {str(status): times for (kind, status), times in sorted(answers.items()) if kind == action} for action in ACTIONS}


def _memory(course: Sequence[Memory]) -> Json:
    """By life of a process: from when to when (seconds), resident MB, open files; and all of it, thinned."""
    lives = []
    for pid, points in groupby(sorted(course, key=lambda point: (point.pid, point.at)), key=lambda point: point.pid):
        of = list(points)
        lives.append(
            {
                "pid": pid,
                "from": of[0].at,
                "to": of[-1].at,
                "first_mb": of[0].rss_mb,
                "last_mb": of[-1].rss_mb,
                "greatest_mb": max(point.rss_mb for point in of),
                "files": [min(point.files for point in of), max(point.files for point in of)],
            }
        )
    lives.sort(key=lambda life: life["from"])
    step = max(1, len(course) // COURSE)
    return {"lives": lives, "course": [point._asdict() for point in course[::step]]}


def _metric_checks(seen: Seen) -> list[Json]:
    """What the last life of each process counted, held against what the models saw since it began. All is at rest when this is asked."""
    return [one for process in seen.keepers for one in _metric_checks_of(seen, process)]


def _metric_checks_of(seen: Seen, process: str) -> list[Json]:
    keeper, metrics = seen.keepers[process], seen.metrics[process]
    checks: list[Json] = []
    of = f"{process}: " if len(seen.keepers) > 1 else ""

    def check(what: str, metric: float, least: float, most: float) -> None:
        checks.append({"what": of + what, "metric": metric, "true": f"{least:g} to {most:g}", "agrees": least <= metric <= most})

    for name in seen.world.homeservers:
        since = keeper.answers(name)
        for action in ACTIONS:
            asked = sum(times for (kind, _), times in since.items() if kind == action)
            counted = {
                outcome: total(metrics, "sfu_delegate_actions_total", homeserver=name, action=action, outcome=outcome)
                for outcome in ("done", "not_found", "limited", "uncertain")
            }
            told = since[action, 200]
            # An answer that came after the daemon had lost its patience counts as uncertain there.
            check(f"{action} done at {name}", counted["done"], told - counted["uncertain"], told)
            check(f"{action} limited at {name}", counted["limited"], since[action, 429] - counted["uncertain"], since[action, 429])
            check(f"{action} asked of {name}", sum(counted.values()), 0, asked + counted["uncertain"])
    check("delayed events that have not ended", unfinished(metrics), len(seen.database.unfinished), len(seen.database.unfinished))
    check("backlog", total(metrics, "sfu_delegate_backlog_actions"), 0, len(seen.database.unfinished))
    lost = [harm for harm in (*seen.truth.lost, *seen.truth.excused) if (harm.membership.event.ended_at or 0.0) >= keeper.born_at]
    check("lost while connected", total(metrics, "sfu_delegate_events_lost_while_connected_total"), 0, len(lost))
    return checks


def _listed(harms: Sequence[Harm]) -> Json:
    why = Counter(re.sub(r"\d+(\.\d+)?", "N", harm.why) for harm in harms)
    return {
        "times": len(harms),
        "why": dict(why),
        "which": [{"why": harm.why, **harm.membership.described(), **harm.story} for harm in harms[:LISTED]],
    }


def as_text(found: Json) -> str:
    """The report for people."""
    lives = found["memory"]["lives"]
    longest = max(lives, key=lambda life: life["to"] - life["from"], default=None)
    instances = found["settings"]["instances"]
    daemon = f"{instances} instances" if instances else "daemon"
    lines = [
        f"seed {found['settings']['seed']}, {found['settings']['people']} people, {found['seconds']} s; {daemon}: {_counted(found['daemon'])}",
        f"delegated   {found['delegated']['memberships']} memberships; answers: {_counted(found['delegated']['answers'])}",
        f"people      {_counted(found['people'])}",
        f"restarted   {found['restarted']['by_the_daemon']} times by the daemon, {found['restarted']['by_clients']} by clients",
        f"ended       {_counted(found['ended'])}",
    ]
    for who, late in found["seconds_from_departure_to_end"].items():
        lines.append(f"late        {who}: {_counted(late)}")
    lines.append(f"            all had ended {found['seconds_until_all_had_ended']} s after everybody was told to leave")
    for name, answers in found["homeservers"].items():
        lines.append(f"{name:20}" + "; ".join(f"{action} {_counted(by)}" for action, by in answers.items() if by))
    lines.append(f"webhooks    lost on the way: {_counted(found['webhooks_lost_on_the_way'])}; looks: {_counted(found['looks'])}")
    for target, what in found["disturbances"].items():
        lines.append(f"disturbed   {target}: {_counted(what)}")
    if longest is not None:
        lines.append(
            f"memory      longest life {longest['to'] - longest['from']:.0f} s: {longest['first_mb']:.0f} → {longest['last_mb']:.0f} MB "
            f"(at most {longest['greatest_mb']:.0f}), {longest['files'][0]}–{longest['files'][1]} files; "
            f"all lives: at most {max(life['greatest_mb'] for life in lives):.0f} MB"
        )
    lines.append(f"log         {_counted(found['log']['levels'])}; {_counted(found['log']['events'])}")
    says = ", ".join(f"{row['says'] or 'open'}/{row['true'] or 'pending'} {row['times']}" for row in found["database"]["outcomes"])
    lines.append(f"database    {found['database']['sound']}; {_counted(found['database']['states'])}; says/is: {says}")
    lines.append(f"metrics     {sum(check['agrees'] for check in found['metrics'])} of {len(found['metrics'])} agree with what happened")
    for kind in ("lost", "ghosts", "stale", "excused"):
        lines.append(f"{kind:12}{found[kind]['times']}")
        lines += [f"            {times} × {why}" for why, times in found[kind]["why"].items()]
        for harm in found[kind]["which"] if kind != "excused" else ():
            lines.append(f"            {harm['delegation']} {harm['identity']} at {harm['homeserver']}: {harm['why']}")
    left = found["left_over"]
    lines.append(f"left over   {len(left['events'])} events, {len(left['rows'])} rows")
    lines += [f"FAILED      {failure}" for failure in found["failures"]] or ["passed      nobody was dropped, nobody was forgotten"]
    return "\n".join(lines)


def _counted(what: Json) -> str:
    return ", ".join(f"{name} {times}" for name, times in what.items()) or "nothing"
