"""What both databases are asked, as SQLAlchemy has it; each store compiles it once for its dialect, and its driver runs it."""

from typing import Any

from sqlalchemy import CTE, Select, and_, asc, bindparam, case, column, func, literal_column, not_, or_, select, union_all, values
from sqlalchemy.sql import ClauseElement, ColumnElement
from sqlalchemy.sql.compiler import SQLCompiler

from sfu_delegate.delegation.model import Lane
from sfu_delegate.store import schema

event = schema.delayed_event
room = schema.room
history = schema.history


def compiled(statement: ClauseElement, dialect: Any) -> tuple[str, list[str], dict[str, Any]]:
    """Its text in one line, the names of its parameters in order, and the values of those that have one."""
    result = statement.compile(dialect=dialect)
    assert isinstance(result, SQLCompiler)  # noqa: S101 — for the type checker
    return " ".join(str(result).split()), list(result.positiontup or ()), dict(result.params)


def text_of(statement: ClauseElement, dialect: Any, *names: str) -> str:
    """The text of a statement whose parameters stand in the order of `names`."""
    sql, positions, _ = compiled(statement, dialect)
    if positions != list(names):
        raise AssertionError(f"parameters are {positions}, not {names}: {sql}")
    return sql


def p(name: str) -> Any:
    """A parameter."""
    return bindparam(name)


def all_events() -> Select[Any]:
    """All columns of the delayed events."""
    return select(*event.columns)


def wanted(*names: str) -> CTE:
    """A key that many statements are made for."""
    return values(*(column(name) for name in names), name="wanted").data([tuple(p(name) for name in names)]).cte()


def due_ids(*more: ColumnElement[bool]) -> Select[Any]:
    """The most urgent of the rows that are due: parameters a (homeserver), b (lane), c (now), those of `more`, and the limit d."""
    where = (event.c.homeserver == p("a"), event.c.lane == p("b"), event.c.due <= p("c"), *more)
    return select(event.c.id).where(*where).order_by(asc(event.c.harm)).limit(p("d"))


IN_TIME = event.c.harm > p("c")
HARMED = or_(event.c.harm <= p("c"), event.c.harm.is_(None))

SOON = (
    all_events()
    .where(
        *(event.c.homeserver == p("a"), event.c.lane == literal_column(str(Lane.RESTART.value))),
        *(event.c.due.is_not(None), event.c.claimed == literal_column("0")),
    )
    .order_by(asc(event.c.due))
    .limit(p("b"))
)
OF_DELEGATION = all_events().where(event.c.delegation == p("a")).order_by(event.c.id)
OF_ROOM = all_events().where(event.c.sfu == p("a"), event.c.room == p("b"), event.c.state != p("c"))
OF_USER = OF_ROOM.where(event.c.user == p("d"))
ROOM = select(*room.columns).where(room.c.sfu == p("a"), room.c.name == p("b"))

NEXT_DUE = union_all(
    *(
        select(func.min(event.c.due)).where(event.c.homeserver == p("a"), event.c.lane == literal_column(str(lane.value)), event.c.due.is_not(None))
        for lane in Lane
    )
)

HISTORY = select(history.c.event, history.c.at, history.c.what, history.c.detail).where(history.c.event == p("a")).order_by(asc(history.c.at))

ROOMS_DUE = select(*room.columns).where(room.c.sfu == p("a"), room.c.routine == p("b"), room.c.due <= p("c")).order_by(room.c.due).limit(p("d"))

NEXT_ROOM_DUE = select(func.min(room.c.due)).where(room.c.sfu == p("a"), room.c.routine == p("b"), room.c.due.is_not(None))

COUNTDOWNS = (
    select(event.c.harm, event.c.delay, event.c.id, event.c.verified_at.is_not(None))
    .where(
        *(event.c.homeserver == p("a"), event.c.lane == p("b"), event.c.due.is_not(None)),
        *(event.c.harm.is_not(None), event.c.token.is_(None)),
    )
    .order_by(event.c.harm)
)

OVERDUE = select(func.min(event.c.harm)).where(
    event.c.homeserver == p("a"), event.c.lane == p("b"), event.c.due <= p("c"), event.c.verified_at.is_not(None)
)

WAITING_SINCE = select(func.min(event.c.harm)).where(event.c.homeserver == p("a"), event.c.lane == p("b"), event.c.due.is_not(None))

BACKLOG = select(func.count(), func.min(event.c.due)).where(event.c.homeserver == p("a"), event.c.lane == p("b"), event.c.due <= p("c"))

GROUP = event.columns["homeserver", "state", "presence"]
IN_GROUP = and_(*(column == p(name) for column, name in zip(GROUP, "abc", strict=True)))
NOT_IN_GROUP = not_(IN_GROUP)


def counted(total: Any) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    """How many rows, and the restarts a second that they need at the least; `total` is a SUM that is 0 where there is nothing."""
    return func.count(), total(case((and_(event.c.state != p("s"), event.c.token.is_(None)), 1.0 / event.c.delay)))
