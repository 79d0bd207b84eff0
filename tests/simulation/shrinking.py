"""A failing history made small: as few operations and people as still fail in the same way, at round times."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.simulation.histories import History, play
from tests.simulation.watching import Violation


def failure(history: History, run: Callable[[History], object] = play) -> str | None:
    """How a history fails: the promise that is broken, or the exception's type; None when it does not."""
    try:
        run(history)
    except Violation as violation:
        return violation.rule
    except Exception as error:
        return type(error).__name__
    return None


def shrink(history: History, run: Callable[[History], object] = play, most: int = 600) -> History:
    """The smallest history found in `most` plays that fails like this one."""
    how = failure(history, run)
    if how is None:
        return history
    plays = 0
    again = True
    while again:
        again = False
        for smaller in _smaller(history):
            plays += 1
            if plays > most:
                return history
            if failure(smaller, run) == how:
                history, again = smaller, True
                break
    return history


def _smaller(history: History) -> Iterator[History]:
    """Histories with less in them, those with much less first."""
    ops = history.ops
    size = len(ops) // 2
    while size >= 1:
        for start in range(0, len(ops), size):
            yield replace(history, ops=ops[:start] + ops[start + size :])
        size //= 2
    for someone in history.people:
        if not any(op.who == someone.name for op in ops):
            yield replace(history, people=tuple(other for other in history.people if other != someone))
    last = max((op.at for op in ops), default=0.0) + 1.0
    if last < history.quiet_at - 1.0:
        yield replace(history, quiet_at=round(last, 1))
    if history.limited:
        yield replace(history, limited=False)
    if history.instances > 1:
        yield replace(history, instances=history.instances - 1)
    for number, op in enumerate(ops):
        for rounded in (op._replace(value=float(round(op.value))), op._replace(at=float(round(op.at)))):
            if rounded != op:
                yield replace(history, ops=tuple(sorted((*ops[:number], rounded, *ops[number + 1 :]))))
