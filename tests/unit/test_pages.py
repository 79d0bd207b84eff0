"""The pages of the admin listener, without a browser: what they show, to whom, and how a browser is told to treat them."""

import asyncio
import re
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from sfu_delegate.api.admin import Sizes
from sfu_delegate.api.app import admin_app
from sfu_delegate.api.pages import answers, wording
from sfu_delegate.api.pages.timeline import Drawing, drawings, presence_of
from sfu_delegate.api.pages.views import Rates, room_path
from sfu_delegate.api.services import AdminServices
from sfu_delegate.delegation.model import Lane, Note, Outcome, Presence, State
from sfu_delegate.store.reading import Selection, Size
from yarl import URL

from tests import page_scene as scene
from tests.engine_port import Uninspected, until
from tests.rows import HOMESERVER, NOW, row

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
Site = tuple[AdminServices, scene.Inspected]
VOID = frozenset({"meta", "link", "input", "rect", "line", "circle", "path", "polygon"})


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with scene.scene(tmp_path_factory.mktemp("calm")) as made:
        yield made


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with scene.scene(tmp_path_factory.mktemp("bad"), bad=True) as made:
        yield made


@asynccontextmanager
async def served(services: AdminServices) -> AsyncIterator["TestClient[Any, Any]"]:
    async with TestClient(TestServer(admin_app(services))) as client:
        yield client


async def page(client: "TestClient[Any, Any]", path: str, status: int = 200) -> str:
    answer = await client.get(URL(path, encoded=True), headers=BROWSER)
    assert (answer.status, answer.content_type) == (status, "text/html"), path
    return await answer.text()


class Markup(HTMLParser):
    """Reads a page as strictly as is worth it: every element that is opened is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """What is read."""
        return " ".join("".join(self.texts).split())

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def paths(*people: scene.Person) -> list[str]:
    return [
        "/",
        "/rooms",
        "/delegations",
        *(f"/delegations/{one.delegation}" for one in people),
        *(f"/{room_path(one.sfu, one.room)}" for one in people),
    ]


CALM = paths(scene.ERIN, scene.RADIO_BOT, scene.SHORT, scene.DAVE, scene.OSCAR, scene.MALLORY, scene.CAROL)
BAD = paths(scene.GRACE, scene.HEIDI, scene.PEGGY)


# ── what they show ──


async def test_the_overview_begins_with_how_it_is(calm: Site) -> None:
    """The two promises in numbers, who is in calls, and what homeservers and SFUs are like in words."""
    async with served(calm[0]) as client:
        text = Markup(await page(client, "/")).text
    assert text.index("All is well") < text.index("The two promises") < text.index("Homeservers") < text.index("How often")
    for said in (
        "nobody, since the start",
        "in time",
        "214 ms",
        "p99 1.9 s",
        "none waits",
        "Allows 1.2 actions a second, 10 at once.",
        "3 × unknown key",
    ):
        assert said in text
    assert re.search(r"\d+ delayed events are kept alive: \d+ in a call, ", text)


async def test_what_is_wrong_comes_first(bad: Site) -> None:
    """In a bad night the causes are at the very top, each with what it does; and who was dropped is one step away."""
    async with served(bad[0]) as client:
        html = await page(client, "/")
    text = Markup(html).text
    assert text.index("4 things are wrong") < text.index("slow.example cannot be asked (no connection: connection refused).") < text.index("promises")
    for said in (
        "A goodbye waits for slow.example",
        "1 min 35 s late",
        "The SFU main cannot be asked",
        "1 person, since the start",
        "the oldest for 5 min",
    ):
        assert said in text
    assert 'href="./delegations?outcome=lost"' in html
    assert "<title>Trouble" in html


async def test_a_goodbye_that_waits_for_its_next_try_is_a_trouble(bad: Site) -> None:
    """Nobody has it waiting while its homeserver is left alone for a while, and its participant is a ghost nevertheless."""
    services, inspected = bad
    calmer = replace(
        inspected.now,
        homeservers=tuple(server._replace(problem="", lateness=0.0, waiting={Lane.END: (0, scene.NOW)}) for server in inspected.now.homeservers),
        sfus=tuple(sfu._replace(problem="") for sfu in inspected.now.sfus),
    )
    unwell = replace(services, inspection=scene.Inspected(calmer, inspected._reader))
    async with served(unwell) as client:
        text = Markup(await page(client, "/")).text
        status = await (await client.get("/admin/v1/status")).json()
    assert status["causes"] == ["A goodbye has not got through; the oldest waits for 5 min: ghosts in calls."]
    assert "Something is wrong" in text
    assert status["causes"][0] in text


async def test_rooms_lead_to_their_people_and_these_to_their_stories(calm: Site) -> None:
    """From the list to the room, from there to a delegation, and what the story says is what the API says."""
    async with served(calm[0]) as client:
        rooms = await page(client, f"/rooms?room={scene.STANDUP.replace('!', '%21')}")
        assert f'href="./{room_path("main", scene.STANDUP_ROOM)}"' in rooms
        assert "lobby-03" not in rooms
        room = await page(client, f"/{room_path('main', scene.STANDUP_ROOM)}")
        assert f'href="../../delegations/{scene.ERIN.delegation}"' in room
        text = Markup(room).text
        assert "3 in the call" in text
        assert "1 away, perhaps to reconnect" in text
        story = Markup(await page(client, f"/delegations/{scene.ERIN.delegation}")).text
        told = await (await client.get(f"/admin/v1/delegations/{scene.ERIN.delegation}")).json()
    for line in told["story"]:
        assert line["sentence"] in story


async def test_delegations_are_filtered_as_in_the_api(calm: Site) -> None:
    """What the form leaves empty does not matter; the same parameters mean the same; and page by page all are shown once."""
    async with served(calm[0]) as client:
        empty = "room=&user=&homeserver=&sfu=&presence=&state=&outcome=&newer_than_s="
        only = await page(client, f"/delegations?{empty}&open=false")
        assert "guest-03" in only
        assert "guest-04" not in only
        seen: list[str] = []
        at = "/delegations"
        while True:
            html = await page(client, at)
            seen += re.findall(r'data-key="(\d+)"', html)
            following = re.search(r'href="\./(delegations\?[^"]*)" rel="next"', html)
            if following is None:
                break
            at = "/" + following[1].replace("&amp;", "&")
        everything = await (await client.get("/admin/v1/delegations?limit=1000")).json()
    assert [int(number) for number in seen] == [event["row"] for event in everything["events"]]
    assert len(seen) > 50


async def test_rooms_are_shown_page_by_page(calm: Site) -> None:
    """The second page begins where the first one ends."""
    async with served(calm[0]) as client:
        first = await page(client, "/rooms")
        following = re.search(r'href="\./(rooms\?after_sfu[^"]*)" rel="next"', first)
        assert following is not None
        second = await page(client, "/" + following[1].replace("&amp;", "&"))
    keys = [re.findall(r'data-key="(rooms/[^"]*)"', html) for html in (first, second)]
    assert len(keys[0]) == 50
    assert len(keys[1]) > 5
    assert not set(keys[0]) & set(keys[1])


@pytest.mark.parametrize(
    "query",
    [
        "/delegations?rooom=x",
        "/delegations?state=happy",
        "/rooms?limit=5",
        "/rooms?sfu=a&sfu=b",
        "/?x=1",
        f"/delegations/{scene.ERIN.delegation}?zoom=2",
    ],
)
async def test_what_nobody_understands_is_refused(calm: Site, query: str) -> None:
    """A filter that is not understood would show too much: the page says which parameter it is."""
    async with served(calm[0]) as client:
        assert "This cannot be understood" in await page(client, query, 400)


async def test_pages_keep_no_secret_and_no_list_of_a_million(calm: Site, bad: Site) -> None:
    """No page has a delay_id, of which a hint is enough; and each has so much that a browser can carry it."""
    for (services, _), them in ((calm, CALM), (bad, BAD)):
        async with served(services) as client:
            for path in them:
                html = await page(client, path)
                assert "that_nobody_may_see" not in html
                assert len(html) < 150_000, path


# ── what strangers have chosen ──


async def test_names_of_strangers_are_only_text(calm: Site) -> None:
    """Markup, templates, control characters and those that turn the text around stand there as what they are, on every page that has them."""
    async with served(calm[0]) as client:
        room = f"/{room_path(scene.MALLORY.sfu, scene.MALLORY.room)}"
        for path in ("/rooms", "/delegations?newer_than_s=3600&limit=1000", f"/delegations/{scene.MALLORY.delegation}", room):
            html = await page(client, path)
            read = Markup(html)
            assert {tag for tag, _, _ in read.attributes if tag in ("script", "img")} <= {"script"}
            assert not [value for tag, name, value in read.attributes if name.startswith("on") or (tag == "script" and name not in ("src", "defer"))]
            assert not set("\u202e\u2066\x00\x07\u200b") & set(html), path
            if path != room:
                assert "49" not in re.findall(r"\{\{.*?\}\}|alert\(1\)[^<]*49", html)
        assert "U+202E" in read.text
        assert "<script>alert(1)</script>" in read.text


def test_a_name_is_apart_from_the_text_around_it() -> None:
    """Its direction is its own, and what cannot be seen is shown by its number; a space can be seen between words only."""
    assert wording.name("alice") == '<bdi class="name">alice</bdi>'
    assert wording.name("a b") == '<bdi class="name">a b</bdi>'
    for text, unseen in [
        ("a\u202eb", "U+202E"),
        (" a", "U+0020"),
        ("a  b", "U+0020"),
        ("a\u00a0b", "U+00A0"),
        ("a\ud800b", "U+D800"),
        ("\n", "U+000A"),
    ]:
        assert f'<span class="unseen">{unseen}</span>' in wording.name(text)
        assert f"[{unseen}]" in wording.plain(text)
    assert "empty" in wording.name("")
    assert "&lt;b&gt;&#34;" in wording.name('<b>"')


def test_what_stands_between_backticks_is_code() -> None:
    """In sentences of ours, which name keys and headers so; and whatever is in them is escaped all the same."""
    assert wording.prose("Set `admin.token`, not <b>.") == "Set <code>admin.token</code>, not &lt;b&gt;."


def test_a_long_name_is_shortened_where_it_is_one_of_many() -> None:
    """The whole of it is shown where a pointer rests, and on its own page."""
    short = wording.name("x" * 200 + '"', 100)
    assert short.count("x") == 300
    assert f'title="{"x" * 200}&#34;"' in short
    assert wording.name("x" * 100, 100) == wording.name("x" * 100)


@pytest.mark.parametrize("name", ["..", ".", "%2e%2e", "a/../b", "?", "#", "a b", "é"])
def test_every_name_of_a_room_leads_to_a_page(name: str) -> None:
    """Also where browsers would take a name in a path for a step."""
    there = URL("http://127.0.0.1/").join(URL(room_path("main", name), encoded=True))
    if name in (".", ".."):
        assert (there.path, there.query["room"]) == ("/delegations", name)
    else:
        assert there.raw_parts[1:3] == ("rooms", "main")
        assert len(there.raw_parts) == 4


# ── how a browser is told to treat them ──


async def test_a_browser_keeps_to_this_origin(calm: Site) -> None:
    """Nothing runs or loads but the package's own files, no page is shown inside of another one, and nobody keeps a page."""
    async with served(calm[0]) as client:
        for path in [*CALM, "/nothing"]:
            answer = await client.get(URL(path, encoded=True), headers=BROWSER)
            for name, value in answers.HEADERS.items():
                assert answer.headers[name] == value
            assert answer.headers["Cache-Control"] == "no-store"
            read = Markup(await answer.text())
            assert not read.values("style")
            assert "unsafe" not in answer.headers["Content-Security-Policy"]
            # Relative: a reverse proxy may have put the listener below a path of its own.
            for link in [*read.values("href"), *read.values("src"), *read.values("action")]:
                assert not link.startswith(("/", "http:", "https:", "//", "javascript:")), link
            assert read.values("method") in ([], ["get"])


async def test_files_are_kept_for_ever_under_the_name_of_their_content(calm: Site) -> None:
    """Another content has another name; and who asks whether it is still the same is told so in a few bytes."""
    async with served(calm[0]) as client:
        for file, kind in (("page.css", "text/css"), ("page.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
            path = f"/static/{answers.FILES[file].name}"
            answer = await client.get(path)
            assert (answer.status, answer.content_type) == (200, kind)
            assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            again = await client.get(path, headers={"If-None-Match": answer.headers["ETag"]})
            assert (again.status, await again.read()) == (304, b"")
        for unknown in ("/static/page.css", "/static/..%2fpage.css", "/static/page.0000000000000000.css"):
            assert (await client.get(URL(unknown, encoded=True))).status == 404


async def test_the_pages_only_read(calm: Site) -> None:
    """Every other method is refused, on each of them, also to who may change things; HEAD is answered as GET."""
    allowed = {"Authorization": "Bearer the-admin-token"}
    async with served(replace(calm[0], token="the-admin-token")) as client:
        for path in CALM:
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                assert (await client.request(method, URL(path, encoded=True), headers=allowed)).status == 405
            assert (await client.head(URL(path, encoded=True), headers=allowed)).status == 200


# ── errors, and who may see ──


async def test_errors_are_pages_for_browsers_and_json_for_programs(calm: Site) -> None:
    """By what is asked for; the API's are JSON in any case, as its description says."""
    async with served(calm[0]) as client:
        for path, status in (("/nothing", 404), ("/delegations/nobody", 404), ("/rooms/main/nowhere", 404), ("/delegations?open=maybe", 400)):
            html = await page(client, path, status)
            assert "To the overview" in html
            assert ("There is no such page here." in html) is (path == "/nothing")
            for asked in ({}, {"Accept": "application/json"}, {"Accept": "*/*"}):
                answer = await client.get(path, headers=asked)
                assert (answer.status, answer.content_type) == (status, "application/json")
                assert {"errcode", "error"} <= set(await answer.json())
        answer = await client.get("/admin/v1/delegations/nobody", headers=BROWSER)
        assert (answer.status, answer.content_type) == (404, "application/json")


async def test_a_database_that_cannot_be_read_is_told() -> None:
    """503 and when to try again, on all pages but the overview, which shows what is known without it."""
    async with served(scene.services_of(Uninspected())) as client:
        assert "The database cannot be read for this page: It is in memory." in Markup(await page(client, "/")).text
        for path in ("/rooms", "/delegations", "/delegations/x", "/rooms/main/x"):
            answer = await client.get(path, headers=BROWSER)
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert "Try again" in await answer.text()


async def test_with_a_token_it_is_asked_for_as_browsers_do(calm: Site) -> None:
    """Its dialogue is asked for, with a page for who closes it, and the files that this page is made with; nothing is shown before."""
    services = replace(calm[0], token="the-admin-token")
    async with served(services) as client:
        for path in CALM:
            answer = await client.get(URL(path, encoded=True), headers=BROWSER)
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Basic realm="sfu-delegate", charset="UTF-8"')
            html = await answer.text()
            assert "Who are you?" in html
            assert "example.org" not in html
        assert (await client.get(f"/static/{answers.FILES['page.css'].name}")).status == 200
        assert (await client.get(URL("/static/..%2fdelegations", encoded=True))).status == 404
        shown = await client.get("/", headers={"Authorization": aiohttp.encode_basic_auth("anybody", "the-admin-token")})
        assert shown.status == 200
        assert "the-admin-token" not in await shown.text()
        another = {**BROWSER, "Authorization": aiohttp.encode_basic_auth("anybody", "another")}
        assert (await client.get("/", headers=another)).status == 401


async def test_another_name_for_this_machine_is_shown_nothing(calm: Site) -> None:
    """A page of a stranger may give its own name our address: 403, on every page."""
    async with served(calm[0]) as client:
        for path in CALM:
            answer = await client.get(URL(path, encoded=True), headers={**BROWSER, "Host": "evil.example"})
            assert answer.status == 403
            assert scene.STANDUP_ROOM not in await answer.text()


# ── what it costs ──


async def test_the_size_is_remembered_in_proportion_to_what_it_took() -> None:
    """A table that takes a second to be read is read once in 50 s, whoever asks; what failed is not remembered."""
    now = [100.0]

    class Slow:
        reads = 0

        def size(self) -> Size:
            Slow.reads += 1
            now[0] += 1.0
            return Size(Slow.reads, 0, 0, None, None)

    async def read(work: Callable[[Any], Size]) -> Size:
        return work(Slow())

    async def fail(work: Callable[[Any], Size]) -> Size:
        raise LookupError

    sizes = Sizes(lambda: now[0])
    with pytest.raises(LookupError):
        await sizes.read(fail)
    assert [(await sizes.read(read)).events for _ in range(3)] == [1, 1, 1]
    now[0] += 49.0
    assert (await sizes.read(read)).events == 1
    now[0] += 1.5
    assert (await sizes.read(read)).events == 2


async def test_whoever_asks_for_the_size_meanwhile_waits_for_the_same_reading() -> None:
    """Where the database hangs, all are told at the same time, and not one after the other; the next one asks anew."""
    begun: list[asyncio.Event] = []

    async def hang(_: Callable[[Any], Size]) -> Size:
        begun.append(asyncio.Event())
        await begun[-1].wait()
        raise LookupError

    sizes = Sizes()
    asking = [asyncio.ensure_future(sizes.read(hang)) for _ in range(3)]
    await until(lambda: begun)
    asking.pop().cancel()
    begun[0].set()
    assert [type(error) for error in await asyncio.gather(*asking, return_exceptions=True)] == [LookupError] * 2
    again = asyncio.ensure_future(sizes.read(hang))
    await until(lambda: len(begun) == 2)
    begun[1].set()
    with pytest.raises(LookupError):
        await again


def test_rates_are_of_the_last_minutes() -> None:
    """The first look knows the average since the start; later ones the difference to a look some minutes ago."""
    rates = Rates()
    assert rates.lately(1000.0, 400.0, {"webhooks": 50}) == (600.0, {"webhooks": 50 / 600})
    assert rates.lately(1001.0, 400.0, {"webhooks": 60})[0] == 601.0
    assert rates.lately(1060.0, 400.0, {"webhooks": 170}) == (60.0, {"webhooks": 2.0})
    for at in range(1070, 1700, 10):
        over, found = rates.lately(float(at), 400.0, {"webhooks": 170 + at - 1060})
    assert 290.0 <= over <= 310.0
    assert found == {"webhooks": pytest.approx(1.0)}
    assert rates.lately(9000.0, 400.0, {"webhooks": 860})[0] == 8600.0  # nobody has looked for long


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "0 s"), (0.0123, "12 ms"), (0.214, "214 ms"), (0.9999, "1.0 s"), (1.87, "1.9 s"), (9.99, "10 s"), (95.0, "1 min 35 s")]
)
def test_short_times_have_the_digits_that_count(value: float, said: str) -> None:
    """Milliseconds below a second, a tenth below ten, and then as stories have it."""
    assert wording.seconds(value) == said


# ── to scale ──


def drawn(inspected: scene.Inspected, person: scene.Person) -> list[Drawing]:
    rows = inspected._reader.delegation(person.delegation)
    return drawings(rows, inspected._reader.history([event.id for event in rows]), scene.NOW)


def test_every_drawing_is_within_its_frame(calm: Site, bad: Site) -> None:
    """Whatever happened: all is between 0 and 100, presence has no gap, countdowns do not overlap, and nothing is drawn by the thousand."""
    for _, inspected in (calm, bad):
        for event in inspected._reader.events(Selection(), 1000):
            rows = inspected._reader.delegation(event.delegation)
            for picture in drawings(rows, inspected._reader.history([one.id for one in rows]), scene.NOW):
                assert 2 <= len(picture.ticks) <= 8
                for bar, following in zip(picture.presence, picture.presence[1:], strict=False):
                    assert bar.x + bar.width == pytest.approx(following.x, abs=0.002)
                for lane in picture.lanes:
                    assert len(lane.countdowns) <= 130
                    for piece in lane.countdowns:
                        assert 0 <= piece.low <= piece.high <= 100
                    for piece, after in zip(lane.countdowns, lane.countdowns[1:], strict=False):
                        assert piece.x + piece.width <= after.x + 0.002
                xs = [bar.x for bar in picture.presence] + [bar.x + bar.width for bar in picture.presence]
                xs += [at for lane in picture.lanes for mark in lane.marks for at in (mark.x,)]
                assert all(0 <= x <= 100.002 for x in xs)


def test_times_are_where_they_belong() -> None:
    """A restart in the middle of the time is in the middle of the drawing, and what was left of the countdown is as high as it was."""
    event = row(
        delay=100.0,
        accepted_at=NOW - 100.0,
        verified_at=NOW - 100.0,
        running_since=NOW - 50.0,
        restarts=1,
        presence_since=NOW - 75.0,
        state=State.DONE,
        outcome=Outcome.ALREADY_ENDED,
        finished_at=NOW,
    )
    notes = [
        Note(event.id, NOW - 100.0, "delegated", ""),
        Note(event.id, NOW - 75.0, Presence.CONNECTED.value, ""),
        Note(event.id, NOW, "already_ended", ""),
    ]
    whole = drawings([event], notes, NOW)[0]
    x = whole.window.x
    assert x(NOW - 50.0) == pytest.approx(50.0)
    assert [bar.presence for bar in whole.presence] == ["expected", "connected"]
    assert [bar.x for bar in whole.presence] == [x(NOW - 100.0), x(NOW - 75.0)]
    assert [bar.x + bar.width for bar in whole.presence] == pytest.approx([x(NOW - 75.0), x(NOW)])
    first, second = whole.lanes[0].countdowns
    assert (first.x, first.high, first.low) == (x(NOW - 100.0), 100.0, 50.0)
    assert (second.x, second.high, second.low) == (x(NOW - 50.0), 100.0, 50.0)
    assert whole.lanes[0].marks[-1].x == x(NOW)
    assert whole.now is None


def test_what_is_to_come_is_drawn_as_such() -> None:
    """The countdown of an open event goes on beyond now, until it would run out."""
    (picture,) = drawings([row(delay=120.0, accepted_at=NOW - 60.0, verified_at=NOW - 60.0, running_since=NOW - 60.0)], [], NOW)
    ran, coming = picture.lanes[0].countdowns
    assert (ran.kind, coming.kind) == ("ran", "coming")
    assert (ran.high, ran.low, coming.high, coming.low) == (100.0, 50.0, 50.0, 0.0)
    assert picture.now == coming.x
    assert "would run out in 1 min" in picture.text


def test_restarts_that_nobody_noted_are_not_made_up() -> None:
    """Of a short countdown it is known that it was kept alive, and when it began anew last."""
    event = row(delay=30.0, accepted_at=NOW - 600.0, verified_at=NOW - 600.0, running_since=NOW - 10.0, restarts=30)
    picture = drawings([event], [], NOW)[0]
    assert [piece.kind for piece in picture.lanes[0].countdowns] == ["many", "ran", "coming"]
    assert "30 times" in picture.text


def test_nothing_counts_down_that_is_not_there(bad: Site) -> None:
    """Neither before the homeserver has confirmed it, nor after it has told that it does not know it any more."""
    (whole, *_) = drawn(bad[1], scene.PEGGY)
    assert whole.lanes[0].countdowns == []
    near = drawn(bad[1], scene.GRACE)[-1]
    vanished = next(mark for mark in near.lanes[0].marks if mark.kind == "failed")
    last = near.lanes[0].countdowns[-1]
    assert last.x + last.width == pytest.approx(vanished.x, abs=0.01)
    assert near.lanes[0].marks[-1].tone == "bad"


def test_a_departure_of_seconds_is_drawn_from_near(calm: Site) -> None:
    """In a call of an hour it would be a hair; from near, away and gone are apart."""
    whole, near = drawn(calm[1], scene.ERIN)
    assert near.heading == "The departure, from near"
    away = next(bar for bar in near.presence if bar.presence == "away")
    assert away.width > 25
    assert max(bar.width for bar in whole.presence if bar.presence == "away") < 1
    assert near.window.until - near.window.since < 10


def test_three_days_can_be_read(calm: Site) -> None:
    """Each restart of three days is drawn, days are named at the axis, and the present countdown is drawn from near."""
    whole, near = drawn(calm[1], scene.RADIO_BOT)
    assert len(whole.ticks) >= 3
    assert all(re.fullmatch(r"\d+ Mar", tick.label) for tick in whole.ticks)
    assert len([piece for piece in whole.lanes[0].countdowns if piece.kind == "ran"]) > 90
    assert near.heading == "The countdown, from near"
    assert len(near.lanes[0].countdowns) <= 5


def test_countdowns_that_are_too_narrow_are_one() -> None:
    """A month with a restart in every half hour is not drawn by the thousand."""
    begun = NOW - 30 * 86400
    notes = [Note(1, begun + 1800.0 * number, "restarted", "") for number in range(1, 1440)]
    event = row(delay=3600.0, accepted_at=begun, verified_at=begun, running_since=NOW - 1800.0, restarts=1439)
    whole = drawings([event], notes, NOW)[0]
    assert len(whole.lanes[0].countdowns) <= 4
    assert any("times" in piece.title for piece in whole.lanes[0].countdowns)


def test_the_course_is_of_the_event_that_tells_the_most() -> None:
    """One event of a delegation may be over before its participant is."""
    early = row(id=1, state=State.DONE, finished_at=NOW - 30.0, outcome=Outcome.REJECTED)
    late = row(id=2, accepted_at=NOW - 60.0, homeserver=HOMESERVER)
    (span,) = presence_of([early, late], [])
    assert span.until is None


def test_the_package_has_what_pages_are_made_of() -> None:
    """Templates and files are data of the package."""
    root = Path(__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["sfu_delegate"]
    package = root / "sfu_delegate"
    packaged = {path for pattern in data for path in package.glob(pattern)}
    there = {path for folder in ("templates", "static") for path in (package / "api" / "pages" / folder).iterdir()}
    assert there <= packaged
