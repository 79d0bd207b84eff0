"""The tables of `docs/scaling.md`, made of the report of `benchmarks.scaling` as JSON has it; and what puts them into that page."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sfu_delegate.delegation.policy import Policy

from benchmarks.machine import NOISY
from benchmarks.report import machine_table, number, table
from benchmarks.rows import CYCLE, IN_A_ROOM

FORMAT = 1
SMALL = "**Small numbers (`--quick`): this tries the benchmarks. The figures mean nothing.**"
TBD = "TBD"
TABLE_NAMES = ("delayed_event", "room", "history")
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)

Part = Mapping[str, Any]
Parts = Mapping[str, Part]


def _counts(parts: Parts, name: str) -> list[tuple[int, Part]]:
    """The parts of one name, by the number behind it."""
    return sorted((int(key.partition(".")[2]), part) for key, part in parts.items() if key.startswith(f"{name}."))


KINDS = {
    "delegated": "a delegation, with the claim of its first restart and the answer",
    "joined": "a `participant_joined`",
    "left": "a `participant_left` that is believed at once, with the claim of its send and the answer",
    "restarted": "a restart: its claim and its answer",
    "backlog": "the same while all rows are due",
}


def steps(parts: Parts) -> str:
    """What a step costs, by the number of rows."""
    lines = []
    for kind, title in KINDS.items():
        for count, part in _counts(parts, "rows"):
            alone, together = part["steps"].get(f"{kind}.alone"), part["steps"].get(f"{kind}.together")
            if together is None:
                continue
            lines.append(
                (
                    title,
                    f"{count:,}",
                    "" if alone is None else f"{alone['step_ms']:.1f} / {alone['step_p99_ms']:.1f}",
                    f"{together['step_ms']:.1f} / {together['step_p99_ms']:.1f}",
                    *(f"{together[name]:.0f}" for name in ("daemon", "backends")),
                    f"{together['wal'] / 1000:.1f}",
                    f"{together['full_pages']:.1f}",
                    f"{together['hot'] * 100:.0f} %",
                )
            )
    head = ("", "rows", "one: ms", "32 in a step: ms", "engine, µs each", "PostgreSQL, µs each", "WAL, kB each", "whole pages", "HOT")
    return table(head, lines)


def start(parts: Parts) -> str:
    """Start, memory, and what goes on while nothing happens."""
    lines = []
    for count, part in _counts(parts, "rows"):
        idle, beside = part["idle"], part["beside"]
        lines.append(
            (
                f"{count:,}",
                f"{idle['took']:.1f}",
                f"{idle['cpu']:.1f}",
                f"{idle['postgresql']:.1f}",
                f"{idle['rss'] / 2**20:.0f}",
                f"{idle['rss_later'] / 2**20:.0f}",
                f"{idle['daemon'] * 100:.2f} %",
                f"{(idle['backends'] + idle['rest']) * 100:.2f} %",
                f"{idle['wal'] / 1000:.2f}",
                f"{beside['census_ms']:.0f}",
                f"{beside['census'] / 1e3:.0f}",
            )
        )
    head = (
        *("rows", "start, s", "… CPU, s", "… of PostgreSQL", "memory, MiB", "… later", "idle: of a core", "… PostgreSQL's"),
        *("… WAL, kB/s", "census, ms", "… PostgreSQL's CPU, ms"),
    )
    return table(head, lines)


def news(parts: Parts) -> str:
    """What is asked about once a second, by the number of homeservers."""
    rows = [("1", f"{count:,}", part["beside"]) for count, part in _counts(parts, "rows")]
    rows += [(f"{count:,}", f"{part['rows']:,}", part["beside"]) for count, part in _counts(parts, "homeservers")]
    lines = [
        (homeservers, count, f"{told['news_ms']:.2f}", f"{told['news_daemon']:.0f}", f"{told['news_backends']:.0f}", f"{told['news_wal']:.0f}")
        for homeservers, count, told in rows
    ]
    return table(("homeservers", "rows", "ms", "daemon's CPU, µs", "PostgreSQL's, µs", "WAL, bytes"), lines)


LOADS = {
    "ignored": "a webhook that is no news",
    "delegated": "delegations, confirmed by the homeserver",
    "joined": "`participant_joined`",
    "left": "`participant_left`, with its send",
    "left_by_turns": "… a room's webhooks to all instances by turns",
    "looked": "looks at rooms of ten",
    "restarted": "restarts, as they become due",
    "late": "restarts, all due at once",
}


def instances(parts: Parts) -> str:
    """Throughput by the number of instances."""
    lines = []
    for kind, title in LOADS.items():
        for count, part in _counts(parts, "instances"):
            load = part["loads"][kind]
            shares = load["shares"]
            done = load["done_ms"] if load["done_ms"][1] else load["answered_ms"]
            lines.append(
                (
                    title,
                    str(count),
                    number(load["count"] / load["seconds"], 0),
                    f"{done[0]:.0f} / {done[1]:.0f}" if done[1] else "",
                    f"{load['inputs']:.0f}",
                    *(f"{shares[who]:.2f}" for who in ("daemons", "PostgreSQL", "driver", "others")),
                    load["limit"],
                )
            )
    head = (
        "",
        "instances",
        "a second",
        "p50 / p99, ms",
        "in a transaction",
        "cores: daemons",
        "… PostgreSQL",
        "… driver",
        "… others",
        "what was used up",
    )
    return table(head, lines)


def load(parts: Parts) -> str:
    """What each thing costs, apart."""
    lines = []
    for kind, title in LOADS.items():
        for count, part in _counts(parts, "instances"):
            told = part["loads"][kind]
            lines.append(
                (
                    title,
                    str(count),
                    *(f"{told[name]:.0f}" for name in ("daemons", "backends", "rest", "driver")),
                    f"{told['wal'] / 1000:.1f}",
                    f"{told['full_pages']:.2f}",
                    f"{told['fsyncs']:.3f}",
                )
            )
    head = (
        *("", "instances", "daemons, µs each", "PostgreSQL's backends", "… other processes", "driver", "WAL, kB"),
        *("… whole pages", "fsyncs"),
    )
    return table(head, lines)


def _load_of(parts: Parts, kind: str) -> Part | None:
    """What each thing took with the most instances."""
    counts = _counts(parts, "instances")
    return counts[-1][1]["loads"][kind] if counts else None


def capacity(parts: Parts) -> str:
    """What one core does, when it does nothing else; and what a thousand a second write."""
    lines = []
    for kind, title in LOADS.items():
        told = _load_of(parts, kind)
        if told is None:
            continue
        postgresql = told["backends"] + told["rest"]
        lines.append(
            (
                title,
                number(1e6 / told["daemons"], 0),
                number(1e6 / postgresql, 0) if postgresql > 1 else "–",
                f"{told['wal'] / 1000:.1f}",
                f"{told['fsyncs'] * 1000:.0f}",
            )
        )
    head = ("", "a second, on one core of daemons", "… on one core of PostgreSQL", "1,000 a second: WAL, MB/s", "… fsyncs a second")
    return table(head, lines)


STAY, DELAY, IGNORED = 1800.0, 3600.0, 8
"""Seconds that people stay, the delay of their events, and webhooks of each that are no news (tracks and rooms)."""
PARTICIPANTS = (3000, 30_000, 300_000)
WEEK = 7 * 86400.0


def nodes(parts: Parts) -> str:
    """What so many participants need, as one LiveKit node has, ten, and a hundred."""
    loads = {kind: _load_of(parts, kind) for kind in ("delegated", "joined", "ignored", "left", "restarted", "looked")}
    rows = _counts(parts, "rows")
    lives = _counts(parts, "instances")
    if not rows or None in loads.values():
        return ""
    times = {"delegated": 1.0, "joined": 1.0, "ignored": float(IGNORED), "left": 1.0}
    times |= {"restarted": STAY / (CYCLE * DELAY), "looked": STAY / Policy().interval / IN_A_ROOM}
    daemons, postgresql, wal = (
        sum(sum(told[name] for name in names) * times[kind] for kind, told in loads.items() if told is not None)
        for names in (("daemons",), ("backends", "rest"), ("wal",))
    )
    count, most = rows[-1]
    live = sum(size for name, size in most["sizes"].items() if _of(name) < len(TABLE_NAMES)) / count
    over = sum(size for name, size in lives[0][1]["lives"]["sizes"].items() if _of(name) < len(TABLE_NAMES))
    lines = []
    for people in PARTICIPANTS:
        joins = people / STAY
        lines.append(
            (
                f"{people:,}",
                f"{joins:,.1f}",
                f"{people / (CYCLE * DELAY):,.1f}",
                f"{people / IN_A_ROOM / Policy().interval:,.0f}",
                f"{joins * daemons / 1e6:.3f}",
                f"{joins * postgresql / 1e6:.3f}",
                f"{joins * wal / 1e6:.2f}",
                f"{people * live / 1e9:.3f}",
                f"{joins * WEEK * over / 1e9:,.1f}",
            )
        )
    head = (
        *("participants", "joins a second, and leaves", "restarts a second", "looks a second", "cores of daemons", "… of PostgreSQL", "WAL, MB/s"),
        *("database, GB: connected", "… over, a week"),
    )
    return table(head, lines)


def sizes(parts: Parts) -> str:
    """Bytes of a delegation, by table and index."""
    columns: list[tuple[str, Mapping[str, float]]] = []
    for count, part in _counts(parts, "rows"):
        columns.append((f"connected, {count:,} rows", {name: size / count for name, size in part["sizes"].items()}))
    for _, part in _counts(parts, "instances")[:1]:
        columns.append(("over, kept for its history", part["lives"]["sizes"]))
    if not columns:
        return ""
    names = {name for _, held in columns for name, size in held.items() if size >= 1 and _of(name) < len(TABLE_NAMES)}
    ordered = sorted(names, key=lambda name: (_of(name), name not in TABLE_NAMES, name))
    lines = [(f"`{name}`", *(f"{held.get(name, 0):,.0f}" for _, held in columns)) for name in ordered]
    lines.append(("**together**", *(f"**{sum(held.get(name, 0) for name in ordered):,.0f}**" for _, held in columns)))
    return table(("bytes for each delegation", *(title for title, _ in columns)), lines)


def _of(name: str) -> int:
    """Which table an index is of, by its name."""
    return next((place for place, told in enumerate(TABLE_NAMES) if told in name), len(TABLE_NAMES))


def wear(parts: Parts) -> str:
    """Restarts again and again, by fillfactor and by when a vacuum comes."""
    lines = [
        (
            str(one["fillfactor"]),
            f"{one['scale_factor']:g}",
            f"{one['heap_before']:.0f} → {one['heap']:.0f}",
            f"{one['indexes_before']:.0f} → {one['indexes']:.0f}",
            f"{one['hot'] * 100:.0f} %",
            f"{one['wal'] / 1000:.2f}",
            f"{one['backend']:.0f}",
            f"{one['vacuum']:.1f}",
            str(one["vacuums"]),
        )
        for one in parts.get("storage", {}).get("wear", ())
    ]
    head = (
        *("fillfactor", "vacuum at", "table, bytes a row", "indexes", "webhooks HOT", "WAL, kB a restart", "backend, µs", "vacuum, µs"),
        "vacuums",
    )
    return table(head, lines)


def lives(parts: Parts) -> str:
    """Whole lives of delegations, by fillfactor."""
    lines = [
        (
            str(one["fillfactor"]),
            f"{one['joined_hot'] * 100:.0f} %",
            f"{one['heap']:.0f}",
            f"{one['indexes']:.0f}",
            f"{one['wal'] / 1000:.2f}",
            f"{one['backend']:.0f}",
        )
        for one in parts.get("storage", {}).get("lives", ())
    ]
    return table(("fillfactor", "joins HOT", "table, bytes a row", "indexes", "WAL, kB a life", "backend, µs a life"), lines)


def dead(parts: Parts) -> str:
    """What dead rows cost until a vacuum comes."""
    lines = []
    for count, part in _counts(parts, "rows"):
        told = part.get("unvacuumed")
        if told is None:
            continue
        for title, steps_ in (("", told["steps"]), ("somebody reads in one transaction", told["reader"])):
            lines += [
                (f"{count:,}", f"{one['dead']:,}", title, f"{one['step_ms']:.1f}", f"{one['daemon']:.0f}", f"{one['backends']:.0f}") for one in steps_
            ]
    return table(("rows", "dead since the last vacuum", "", "step of 32 restarts, ms", "engine, µs a restart", "PostgreSQL, µs a restart"), lines)


def vacuums(parts: Parts) -> str:
    """What a vacuum takes."""
    lines = []
    for count, part in _counts(parts, "rows"):
        for one in part.get("unvacuumed", {}).get("vacuums", ()):
            lines.append((f"{count:,}", f"{one['dead']:,}", f"{one['seconds']:.2f}", f"{one['wal'] / 1e6:.1f}", f"{one['analyze']:.2f}"))
    return table(("rows", "dead", "CPU, s", "WAL, MB", "ANALYZE: CPU, s"), lines)


def compression(parts: Parts) -> str:
    """Restarts right after a checkpoint."""
    lines = []
    for count, part in _counts(parts, "rows"):
        for name, cost in part.get("compressed", {}).items():
            lines.append((f"{count:,}", name, f"{cost['wal'] / 1000:.1f}", f"{cost['full_pages']:.2f}", f"{cost['backends']:.0f}"))
    return table(("rows", "wal_compression", "WAL, kB a restart", "whole pages", "PostgreSQL, µs a restart"), lines)


def machine(parts: Parts) -> str:
    """The machine, as the first part has it."""
    return machine_table(parts.get("machine", {}))


TABLES: Mapping[str, Callable[[Parts], str]] = {
    "machine": machine,
    "steps": steps,
    "start": start,
    "news": news,
    "instances": instances,
    "load": load,
    "capacity": capacity,
    "nodes": nodes,
    "sizes": sizes,
    "wear": wear,
    "lives": lives,
    "dead": dead,
    "vacuums": vacuums,
    "compression": compression,
}
"""By the names that they have in `docs/scaling.md`."""


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """All of them, as far as their parts were measured: one without rows is left out."""
    parts = {"machine": report["machine"], **report["parts"]}
    made = {name: make(parts) for name, make in TABLES.items()}
    return {name: text for name, text in made.items() if text.count("\n") > 1}


def noise(report: Mapping[str, Any]) -> list[str]:
    """Which parts were disturbed."""
    disturbed = {name: part.get("others", 0.0) for name, part in report["parts"].items() if part.get("others", 0.0) > NOISY}
    return [f"Others used {cores:.2f} cores meanwhile: {name}." for name, cores in disturbed.items()]


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    parts = ["# Scaling", *([SMALL] if report["options"].get("quick") else []), f"Options: {options}.", *noise(report)]
    parts += [f"**{name} failed**: {why}" for name, why in report["failures"].items()]
    for name, text in tables(report).items():
        parts += [f"## {name}", text]
    return "\n\n".join(parts) + "\n"


def filled(page: str, report: Mapping[str, Any]) -> str:
    """A page with the tables of a report between its marks `<!-- table: name -->` and `<!-- end -->`. A table that was not measured stays."""
    made = tables(report)
    return _TABLE.sub(lambda found: f"{found[1]}{made[found[2]]}{found[3]}" if found[2] in made else found[0], page)


def names_in(page: str) -> Sequence[str]:
    """The tables for which a page has a place."""
    return [name for _, name, _ in _TABLE.findall(page)]
