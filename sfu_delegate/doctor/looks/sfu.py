"""Looking at an SFU: with each of its keys, and by a room of nobody that is made and deleted at once, whose webhooks are awaited."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Final

from sfu_delegate.api.services import PROBE_ROOMS
from sfu_delegate.api.webhooks import PATH
from sfu_delegate.config import Config
from sfu_delegate.daemon.actions import Sfu
from sfu_delegate.doctor.findings import CannotLook
from sfu_delegate.doctor.looks.ear import Ear
from sfu_delegate.doctor.looks.here import Running
from sfu_delegate.doctor.running import in_thread
from sfu_delegate.doctor.verdicts.clock import Offset, offset
from sfu_delegate.doctor.verdicts.sfu import AWAITED, Came, Heard, KeyTried, Wanted
from sfu_delegate.livekit import webhook
from sfu_delegate.livekit.room_service import RoomService, SfuAddress, SfuUnavailable
from sfu_delegate.matrix.answers import read_date
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.http import HttpFailed
from sfu_delegate.operate.admin import CannotAsk, Refused, part

EMPTY_TIMEOUT: Final = 20  # seconds that the room would stay if it could not be deleted
AWAITED_FOR: Final = 9.0  # seconds: with LiveKit's repetitions after 1, 3 and 7 s
LOOK_EVERY: Final = 0.2  # seconds between two questions to the daemon
ASKED_WITHIN: Final = 8.0


def timeout_of(sfu: Sfu) -> float:
    """Seconds for a request to it."""
    return min(sfu.timeout, ASKED_WITHIN)


async def keys(config: Config, sfu: Sfu, rooms: RoomService) -> tuple[list[KeyTried], float]:
    """Each of its API keys, tried by asking about a room that is not there; first the one that the daemon asks with, and how long that took."""
    given = config.sfus[sfu.address.name].keys
    names = [sfu.address.key, *(key for key in given if key != sfu.address.key)]

    async def tried(key: str) -> KeyTried:
        try:
            address = SfuAddress(sfu.address.name, sfu.address.url, key, given[key].get_secret_value())
            await rooms.look(address, PROBE_ROOMS + secrets.token_hex(8), timeout_of(sfu))
        except SfuUnavailable as error:
            return KeyTried(key, error.trouble, error.sentence)
        return KeyTried(key)

    began = time.monotonic()
    first = await tried(names[0])
    took = time.monotonic() - began
    return [first, *(await asyncio.gather(*map(tried, names[1:])))], took


async def clock(sfu: Sfu, egress: Egress, now: Callable[[], float]) -> Offset | None:
    """By how much its clock is off. Raises CannotLook."""
    sent_at = now()
    try:
        answer = await egress.configured.get(f"{sfu.address.http_url}/", {}, asyncio.get_running_loop().time() + timeout_of(sfu))
    except HttpFailed as failed:
        raise CannotLook(f"it does not answer: {failed.reason}") from None
    return offset(read_date(answer.headers.get("date")), sent_at, now())


def wanted(config: Config, name: str) -> Wanted:
    """What LiveKit's configuration has to say."""
    sfu, listen = config.sfus[name], config.listen
    host = "ADDRESS-OF-THIS-MACHINE" if listen.host in ("0.0.0.0", "::") else f"[{listen.host}]" if ":" in listen.host else listen.host  # noqa: S104
    return Wanted(sfu.api_key or next(iter(sfu.keys)), f"http://{host}:{listen.port}{PATH}")


class _Lost(Exception):
    """Whether webhooks come cannot be told; the text says why."""


async def webhooks(sfu: Sfu, rooms: RoomService, *, running: Running | None, ear: Ear | None, now: Callable[[], float], others: int) -> Heard:
    """What comes of a room that is made and deleted: to the running daemon, or to our ear. Raises CannotLook where the room cannot be made."""
    room, name = PROBE_ROOMS + secrets.token_hex(8), sfu.address.name
    by_daemon = running is not None
    try:
        if running is not None:
            await _known_by(running, room)
            refused_before = await _refused_by(running)
    except _Lost as lost:
        return Heard(name, AWAITED_FOR, by_daemon, untold=str(lost), others=others)
    heard = None if ear is None else ear.await_room(room)
    done_at = {AWAITED[0]: now()}
    try:
        await rooms.create_room(sfu.address, room, timeout_of(sfu), empty_timeout=EMPTY_TIMEOUT, departure_timeout=EMPTY_TIMEOUT)
        try:
            done_at[AWAITED[1]] = now()
            await rooms.delete_room(sfu.address, room, timeout_of(sfu))
        except BaseException:
            with contextlib.suppress(SfuUnavailable):
                await asyncio.shield(rooms.delete_room(sfu.address, room, timeout_of(sfu)))
            raise
    except SfuUnavailable as error:
        raise CannotLook(f"no room could be made and deleted to see whether its webhooks come: {error.sentence.rstrip('.')}") from None

    def since(event: str, at: float) -> float:
        return max(0.0, at - done_at[event])

    async def look() -> Mapping[str, tuple[float, str]]:
        if running is not None:
            return await _known_by(running, room)
        return heard.came if heard is not None else {}

    came: Mapping[str, tuple[float, str]] = {}
    until = asyncio.get_running_loop().time() + AWAITED_FOR
    try:
        while not set(AWAITED) <= (came := await look()).keys():
            left = until - asyncio.get_running_loop().time()
            if left <= 0 or (heard is not None and (heard.misdirected or sum(heard.refused.values()) >= len(AWAITED))):
                break
            if heard is None:
                await asyncio.sleep(min(LOOK_EVERY, left))
            else:
                heard.news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(heard.news.wait(), left)
        refused = dict(heard.refused) if heard is not None else {}
        if running is not None:
            after = await _refused_by(running)
            refused = {reason: count - refused_before.get(reason, 0) for reason, count in after.items() if count > refused_before.get(reason, 0)}
    except _Lost as lost:
        return Heard(name, AWAITED_FOR, by_daemon, untold=str(lost), others=others)
    return Heard(
        name,
        AWAITED_FOR,
        by_daemon,
        {event: Came(since(event, at), whose) for event, (at, whose) in came.items() if event in AWAITED},
        refused,
        heard.misdirected if heard is not None else "",
        others=others,
    )


async def _known_by(running: Running, room: str) -> dict[str, tuple[float, str]]:
    """The webhooks of a room that the daemon has had: by event, when and of which SFU."""
    try:
        answer = await in_thread(running.listener.get, f"/webhooks/{part(room)}", timeout=ASKED_WITHIN)
        return {one["event"]: (one["at_ts"] / 1000, str(one["sfu"])) for one in reversed(answer["webhooks"])}
    except (CannotAsk, Refused) as error:
        raise _Lost(str(error).rstrip(".")) from None
    except (KeyError, TypeError, ValueError):
        raise _Lost("the daemon's answer about webhooks is not understood: is it of another version?") from None


async def _refused_by(running: Running) -> dict[str, int]:
    """How many webhooks the daemon has refused, by the reason."""
    try:
        found = await running.metric("sfu_delegate_webhooks_total")
    except CannotAsk as error:
        raise _Lost(str(error).rstrip(".")) from None
    reasons = {reason.value for reason in webhook.Refusal}
    counts: dict[str, int] = {}
    for labels, value in found.items():
        for reason in reasons.intersection(labels):
            counts[reason] = counts.get(reason, 0) + int(value)
    return counts
