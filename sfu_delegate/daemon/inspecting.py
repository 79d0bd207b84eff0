"""What operators ask of a running daemon is put together here: from the engine's counts, the metrics, and the database beside the engine.

It must never make anybody's call wait: it does not use the engine's thread or connection, and asks the database one question at a time.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any, TypeVar

from sfu_delegate import __version__
from sfu_delegate.api.overview import HomeserverState, Overview, Promises, SfuState
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.config import Config
from sfu_delegate.delegation.model import Lane
from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.engine import Engine
from sfu_delegate.observe.metrics import Metrics
from sfu_delegate.store.base import Store, StoreUnavailable
from sfu_delegate.store.reading import Reader

T = TypeVar("T")

SHOWN_MOST = 200  # homeservers: with patterns there may be any number
WAITING_MOST = 16  # questions: what is asked by more at a time is asked by nobody who reads the answers
RETRY_AFTER = 2.0  # seconds
ANSWERED_WITHIN = 10.0  # seconds: who asks for the status of a daemon whose database hangs is to be told that, and gives up after 30

REST_MOST = 1.0  # seconds between two questions


class Rests:
    """Leaves the database alone between two questions, for as long as the last one took.

    SQLite's log can begin anew only at a moment when nobody reads. Where one question followed the other, there never was one, and the log grew by
    some megabytes a second until the disk was full.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._clock = clock
        self._sleep = sleep
        self._over_at = -inf

    def __call__(self, question: Callable[[], T]) -> T:
        """Its answer, after a rest."""
        if (left := self._over_at - self._clock()) > 0:
            self._sleep(left)
        begun = self._clock()
        try:
            return question()
        finally:
            done = self._clock()
            self._over_at = done + min(done - begun, REST_MOST)


class Survey:
    """What was found out when the backlog was last counted."""

    def __init__(self) -> None:
        self.backlog: Mapping[tuple[str, Lane], tuple[int, float]] = {}
        self.lateness: Mapping[str, float] = {}


class Inspecting:
    """See `api.overview.Inspection`."""

    def __init__(
        self,
        config: Callable[[], Config],
        engine: Engine,
        store: Store,
        metrics: Metrics,
        survey: Survey,
        conditions: Mapping[tuple[str, str], str],
        clock: Callable[[], float],
        *,
        instance: str,
        label: Callable[[str], str],
        limited: Callable[[str], bool | None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._survey = survey
        self._conditions = conditions
        self._clock = clock
        self._instance = instance
        self._label = label
        self._limited = limited
        self._started_at = clock()
        self._reader: Reader | None = None
        self._thread = ThreadPoolExecutor(1, "reader")
        self._rests = Rests()
        self._waiting = 0

    async def read(self, work: Callable[[Reader], T]) -> T:
        """See `api.overview.Inspection`."""
        if self._waiting >= WAITING_MOST:
            raise Overloaded("Too many questions wait for the database already.", RETRY_AFTER)
        self._waiting += 1
        try:
            async with asyncio.timeout(ANSWERED_WITHIN):  # whoever waits for his turn by then has none any more
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, work)
        except StoreUnavailable as error:
            raise Unavailable(str(error), RETRY_AFTER) from None
        except TimeoutError:
            sentence = f"It did not answer the question within {ANSWERED_WITHIN:g} s: it hangs, or there is too much to read. Ask for less."
            raise Unavailable(sentence, RETRY_AFTER) from None
        finally:
            self._waiting -= 1

    def _read(self, work: Callable[[Reader], T]) -> T:
        reader = self._reader = self._reader or self._store.reader()
        return self._rests(lambda: work(reader))

    def overview(self) -> Overview:
        """See `api.overview.Inspection`."""
        config, metrics = self._config(), self._metrics
        states: Counter[tuple[str, str]] = Counter()
        for (_, state, presence), count in dict(self._engine.states).items():
            states[state, presence] += count
        return Overview(
            version=__version__,
            instance=self._instance,
            instances=1 + len(self._engine.instances),
            started_at=self._started_at,
            now=self._clock(),
            database=self._store.name,
            keep=config.history.keep,
            promises=self._promises(),
            states={key: count for key, count in states.items() if count},
            webhooks={(sfu, event, result): n for (sfu, event, result), n in metrics.counted(metrics.webhooks).items()},
            actions=_by_action(metrics.counted(metrics.actions)),
            homeservers=self._homeservers(config),
            sfus=tuple(self._sfu(name, sfu.url) for name, sfu in config.sfus.items()),
        )

    def _promises(self) -> Promises:
        metrics = self._metrics
        ended: Counter[str] = Counter()
        for (_, outcome), count in metrics.counted(metrics.ended).items():
            ended[outcome] += count
        lost, goodbyes = sum(metrics.counted(metrics.lost).values()), metrics.goodbyes()
        return Promises(lost, ended, 0, 0, None, None, None) if goodbyes is None else Promises(lost, ended, *goodbyes)

    def _homeservers(self, config: Config) -> tuple[HomeserverState, ...]:
        paces = self._engine.paces()
        named = [homeserver.name.lower() for homeserver in config.homeservers if "*" not in homeserver.name]
        given = frozenset(named)
        others = sorted((name for name in paces if name not in given), key=lambda name: -paces[name].events)
        found, backlog = [], self._survey.backlog
        for name in [*named, *others][:SHOWN_MOST]:
            pace = paces.get(name)
            found.append(
                HomeserverState(
                    name=name,
                    entry=self._label(name),
                    problem=self._conditions.get(("homeserver", name)),
                    service=self._conditions.get(("application_service", name)),
                    events=pace.events if pace else 0,
                    limit=(pace.limit if pace else Limit.UNKNOWN).value,
                    rate=pace.rate if pace else 0.0,
                    burst=pace.burst if pace else 0.0,
                    exempt=self._limited(name) is False,
                    lateness=self._survey.lateness.get(name, 0.0),
                    waiting={lane: backlog[name, lane] for lane in Lane if (name, lane) in backlog},
                )
            )
        return tuple(found)

    def _sfu(self, name: str, url: str) -> SfuState:
        reach = self._engine.reaches().get(name)
        problem = self._conditions.get(("sfu", name))
        if reach is None:
            return SfuState(name, url, problem, 0.0, 0.0, None, several_nodes=False)
        return SfuState(
            name, url, problem, reach.heard_at, max(reach.answered_at, reach.others_at), reach.failing_since, reach.several_nodes_at is not None
        )

    def close(self) -> None:
        """No more questions."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _by_action(counted: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, str], int]:
    actions: Counter[tuple[str, str]] = Counter()
    for (_, action, outcome), count in counted.items():
        actions[action, outcome] += count
    return actions
