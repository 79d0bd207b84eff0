"""The pages in a real browser: Debian's Chromium, driven by playwright. Skipped where there is none.

`make screenshots` (SCREENSHOTS=1) has `test_screenshots` write docs/images/ anew.
"""

import asyncio
import io
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from PIL import Image, ImageChops, ImageStat
from sfu_delegate.api.app import admin_app
from sfu_delegate.api.pages.views import room_path

from tests import page_scene as scene

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--force-color-profile=srgb", "--font-render-hinting=none"),
)
IMAGES = Path(__file__).parents[2] / "docs" / "images"
MOST = 150 * 1024  # bytes of a screenshot
PATIENCE = 20_000.0  # milliseconds until a test gives up

ROOM = "/" + room_path("main", scene.STANDUP_ROOM)
ALL = (
    *("/", "/rooms?room=lobby-03", "/delegations?limit=9", ROOM, "/nothing"),
    *(f"/delegations/{one.delegation}" for one in (scene.ERIN, scene.RADIO_BOT, scene.OSCAR, scene.MALLORY)),
)


@dataclass
class Served:
    """An admin listener in a thread of its own, and what it was asked for."""

    origin: str
    inspected: scene.Inspected
    asked: list[str] = field(default_factory=list)
    fails: bool = False


@contextmanager
def serving(directory: Path, *, bad: bool = False) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def done(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    with scene.scene(directory, bad=bad) as (services, inspected):
        served = Served("", inspected)

        @web.middleware
        async def watched(request: web.Request, handler: Any) -> web.StreamResponse:
            served.asked.append(request.path_qs)
            if served.fails:
                return web.Response(status=502, text="a proxy's page", content_type="text/html")
            answer: web.StreamResponse = await handler(request)
            return answer

        async def start() -> web.AppRunner:
            app = admin_app(services)
            app.middlewares.insert(0, watched)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return runner

        runner = done(start())
        served.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield served
        finally:
            done(runner.cleanup())
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()


@pytest.fixture(scope="module")
def zone() -> Iterator[None]:
    """The server's time zone, so that pictures are the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(scope="module")
def served(zone: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("calm")) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all: to start it takes longer than any of the tests."""
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@dataclass
class Visit:
    """A page in the browser, and whatever went wrong with it."""

    page: Any
    troubles: list[str] = field(default_factory=list)


@contextmanager
def visit(browser: Any, origin: str, *, expected: str = "", **options: Any) -> Iterator[Visit]:
    """At the end, nothing may have gone wrong: no error in the console, no violation of the policy, no request to another origin. `expected`: but
    what has this in it.
    """
    options.setdefault("viewport", {"width": 1100, "height": 900})
    context = browser.new_context(base_url=origin, **options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    found = Visit(page)

    def told(message: Any) -> None:
        if message.type in ("error", "warning") and not (expected and expected in message.text):
            found.troubles.append(f"console: {message.text}")

    def asked(request: Any) -> None:
        if not request.url.startswith(origin + "/"):
            found.troubles.append(f"request to {request.url}")

    page.on("console", told)
    page.on("pageerror", lambda error: found.troubles.append(f"script: {error}"))
    page.on("request", asked)
    try:
        yield found
        assert found.troubles == []
    finally:
        context.close()


def wide(page: Any) -> bool:
    """Is the page wider than its window?"""
    return bool(page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))


def test_every_link_leads_somewhere(browser: Any, served: Served) -> None:
    """Whoever follows the links from the overview finds pages, and none of them has a complaint."""
    seen: set[str] = set()
    waiting = ["/"]
    with visit(browser, served.origin) as there:
        while waiting and len(seen) < 25:
            path = waiting.pop(0)
            if path in seen:
                continue
            seen.add(path)
            if path.startswith(("/metrics", "/health", "/admin")):
                assert there.page.request.get(path).status == 200, path
                continue
            assert there.page.goto(path).status == 200, path
            assert there.page.locator("main h1").count() == 1
            links = [urlsplit(link) for link in there.page.eval_on_selector_all("a[href]", "all => all.map(a => a.href)")]
            assert all(f"{link.scheme}://{link.netloc}" == served.origin for link in links)
            paths = dict.fromkeys(f"{link.path}?{link.query}".removesuffix("?") for link in links)
            # Of what is alike, one: fifty guests have fifty pages.
            kinds = {(urlsplit(known).path.split("/")[1], known.count("/"), "?" in known) for known in [*seen, *waiting]}
            for path in paths:
                kind = (urlsplit(path).path.split("/")[1], path.count("/"), "?" in path)
                if kind not in kinds:
                    kinds.add(kind)
                    waiting.append(path)
    assert {"/", "/rooms", "/delegations", "/metrics", "/health/ready", "/admin/v1/status"} <= seen
    assert any(path.startswith("/rooms/") for path in seen)
    assert any(path.startswith("/delegations/") for path in seen)


def test_everybody_can_use_it(browser: Any, served: Served) -> None:
    """axe-core finds nothing on any page: structure, names, and contrast in both schemes."""
    checker = axe.Axe()
    with visit(browser, served.origin, expected="404 (Not Found)") as there:
        for path in ALL:
            there.page.goto(path)
            for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
                there.page.emulate_media(color_scheme=scheme)
                found = checker.run(there.page, options={"resultTypes": ["violations"], **rules}).response["violations"]
                said = [(each["id"], [node["html"][:120] for node in each["nodes"][:3]]) for each in found]
                assert said == [], (path, scheme)


def test_it_fits_every_screen(browser: Any, served: Served) -> None:
    """From a small phone to 4K, no page scrolls sideways, and no text is cut off in a cell or a card."""
    boxes = "td, th, dd, .figure, .verdict, .story li"
    cut = "all => all.filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML)"
    with visit(browser, served.origin, expected="404 (Not Found)") as there:
        for path in ALL:
            there.page.goto(path)
            for width in (320, 390, 700, 1100, 3840):
                there.page.set_viewport_size({"width": width, "height": 800})
                assert not wide(there.page), (path, width)
                assert there.page.eval_on_selector_all(boxes, cut) == [], (path, width)


def test_letters_may_be_twice_as_large(browser: Any, served: Served) -> None:
    """Who sets larger letters in the browser gets them, and still nothing scrolls sideways on a phone."""
    with visit(browser, served.origin, viewport={"width": 640, "height": 800}) as there:
        there.page.goto("/")
        before = there.page.evaluate("parseFloat(getComputedStyle(document.querySelector('h1')).fontSize)")
        session = there.page.context.new_cdp_session(there.page)
        session.send("Page.setFontSizes", {"fontSizes": {"standard": 32}})
        there.page.reload()
        assert there.page.evaluate("parseFloat(getComputedStyle(document.querySelector('h1')).fontSize)") > 1.8 * before
        assert not wide(there.page)


def test_it_works_without_scripts(browser: Any, served: Served) -> None:
    """Everything is there, links and forms work, and a link stands in for what the script would do."""
    with visit(browser, served.origin, java_script_enabled=False) as there:
        there.page.goto("/delegations")
        assert there.page.get_by_role("link", name="Load this page again").is_visible()
        there.page.get_by_text("Filter", exact=True).click()
        there.page.get_by_label("User, or identity").fill(scene.ERIN.user or "")
        there.page.get_by_role("button", name="Show").click()
        assert there.page.locator("tbody tr").count() == 1
        there.page.get_by_role("link", name=scene.ERIN.user).click()
        assert there.page.get_by_role("heading", level=1).inner_text().endswith("@erin:example.org")
        assert there.page.get_by_role("img", name="The whole story, drawn to scale").is_visible()
        assert there.page.get_by_role("button").count() == 0


def later(page: Any, seconds: float = 11.0) -> None:
    """The browser's clock goes on, and with it what waits for it."""
    page.clock.run_for(int(seconds * 1000))


def until(page: Any, condition: str) -> None:
    """Wait for an effect, whatever the browser's clock says."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition


def test_it_brings_itself_up_to_date(browser: Any, served: Served) -> None:
    """What has changed is exchanged; focus, an open list and what was scrolled stay as they are, and nothing is read aloud."""
    before = served.inspected.now
    with visit(browser, served.origin, viewport={"width": 700, "height": 500}) as there:
        page = there.page
        page.clock.install(time=scene.NOW)
        page.goto("/")
        page.evaluate("document.querySelector('#rates').scrollIntoView()")
        link = page.get_by_role("link", name="frankfurt", exact=True)
        link.focus()
        page.evaluate("window.node = document.activeElement")
        at = link.bounding_box()
        try:
            served.inspected.now = replace(before, now=before.now + 11, promises=before.promises._replace(lost_while_connected=2))
            later(page)
            until(page, "document.querySelector('.figure .number').textContent === '2'")
            assert page.evaluate("document.activeElement === window.node && document.activeElement.textContent === 'frankfurt'")
            assert link.bounding_box()["y"] == pytest.approx(at["y"], abs=2)  # though there is more above it now
            assert page.evaluate("document.querySelector('[role=status]').textContent") == ""
            assert "22:47:41" in page.locator("#live").inner_text()
            served.inspected.now = scene.in_trouble(before)
            later(page)
            until(page, "document.querySelector('h1').textContent === '4 things are wrong'")
            assert page.title().startswith("Trouble")
        finally:
            served.inspected.now = before


def test_rows_that_come_and_go_leave_the_others_alone(browser: Any, served: Served) -> None:
    """Who stands on a row stays there when one before it vanishes, and when a new one comes; who stands on one that vanishes is at the content."""
    with visit(browser, served.origin) as there:
        page = there.page
        page.clock.install(time=scene.NOW)
        page.goto("/delegations?limit=9")
        rows = "[...document.querySelectorAll('tr[data-key]')].map(e => e.dataset.key).join()"
        keys = page.evaluate(rows).split(",")
        gone: set[str] = set()

        def without(route: Any) -> None:
            answer = route.fetch()
            html = answer.text()
            for key in gone:
                html = re.sub(rf'<tr role="row" data-key="{key}">.*?</tr>', "", html, flags=re.DOTALL)
            route.fulfill(response=answer, body=html)

        page.route("**/delegations?*", without)
        page.locator(f"tr[data-key='{keys[4]}'] a").first.focus()
        page.evaluate("window.node = document.activeElement")
        for missing in ({keys[0], keys[3]}, {keys[3], keys[8]}, set()):
            gone.clear()
            gone.update(missing)
            later(page)
            until(page, f"{rows} === '{','.join(key for key in keys if key not in missing)}'")
            assert page.evaluate("document.activeElement === window.node")
        gone.add(keys[4])
        later(page)
        until(page, f"{rows} === '{','.join(key for key in keys if key != keys[4])}'")
        assert page.evaluate("document.activeElement.id") == "main"
        page.unroute_all(behavior="ignoreErrors")


def test_open_lists_and_half_filled_forms_are_kept(browser: Any, served: Served) -> None:
    """Who reads the times of three days' restarts, or types a name, is not disturbed."""
    before = served.inspected.now
    with visit(browser, served.origin) as there:
        page = there.page
        page.clock.install(time=scene.NOW)
        try:
            page.goto(f"/delegations/{scene.RADIO_BOT.delegation}")
            page.locator(".story details summary").click()
            served.inspected.now = replace(before, now=before.now + 3)
            later(page)
            until(page, "document.querySelector('#as-of').textContent.includes('22:47:33')")
            assert page.locator(".story details").get_attribute("open") is not None
            page.goto("/delegations")
            page.get_by_text("Filter", exact=True).click()
            page.get_by_label("User, or identity").type("@al")
            served.inspected.now = replace(before, now=before.now + 6)
            later(page)
            until(page, "document.querySelector('#as-of').textContent.includes('22:47:36')")
            page.keyboard.type("ice")
            assert page.get_by_label("User, or identity").input_value() == "@alice"
        finally:
            served.inspected.now = before


def test_it_says_when_it_is_old_and_can_be_paused(browser: Any, served: Served) -> None:
    """A daemon that does not answer is told of once, with the time of what is shown; paused, nothing is asked for."""
    with visit(browser, served.origin, expected="502 (Bad Gateway)") as there:
        page = there.page
        page.clock.install(time=scene.NOW)
        page.goto("/rooms")
        status = page.get_by_role("status")
        try:
            served.fails = True
            later(page)
            until(page, "document.querySelector('#live').classList.contains('stale')")
            assert "502" in status.inner_text()
            assert "What is shown is of 22:47:30" in page.locator("#live").inner_text()
            assert page.locator("tbody tr").count() > 5
        finally:
            served.fails = False
        later(page)
        until(page, "!document.querySelector('#live').classList.contains('stale')")
        assert status.text_content() == ""
        pause = page.get_by_role("button", name="Pause")
        pause.click()
        assert pause.get_attribute("aria-pressed") == "true"
        asked = len(served.asked)
        later(page, 120.0)
        assert len(served.asked) == asked
        page.goto("/")
        assert page.get_by_role("button", name="Pause").get_attribute("aria-pressed") == "true"
        page.get_by_role("button", name="Pause").click()
        later(page, 1.0)
        until(page, "document.querySelector('[role=status]').textContent === ''")


def test_the_keyboard_is_enough(browser: Any, served: Served) -> None:
    """The first key leads to the content; every link, list and field can be reached, in order, and the focus can be seen on each."""
    with visit(browser, served.origin) as there:
        page = there.page
        page.goto("/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.goto(f"/delegations/{scene.RADIO_BOT.delegation}")
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            what, seen = page.evaluate(
                "(() => { const e = document.activeElement, s = getComputedStyle(e);"
                " return [e === document.body ? '' : e.textContent.trim().slice(0, 40),"
                " s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 1]; })()"
            )
            if not what:
                break
            assert seen, what
            reached.append(what)
        expected = page.eval_on_selector_all("a[href], button, summary", "all => all.map(e => e.textContent.trim().slice(0, 40))")
        assert reached == expected
        page.locator("summary").focus()
        page.keyboard.press("Enter")
        assert page.locator("details").get_attribute("open") is not None


def test_names_of_strangers_do_nothing(browser: Any, served: Served) -> None:
    """No dialogue opens, no element of theirs is there, and the page of the room whose name is the worst is found by its link."""
    with visit(browser, served.origin) as there:
        page = there.page
        opened: list[str] = []

        def told(dialog: Any) -> None:
            opened.append(dialog.message)
            dialog.dismiss()

        page.on("dialog", told)
        page.goto(f"/delegations/{scene.MALLORY.delegation}")
        assert page.locator("img[src=x]").count() == 0
        page.locator("dd a").first.click()
        assert page.get_by_role("heading", level=1).inner_text().endswith("?a=b&c=d#U+200B")
        assert page.locator("tbody tr").count() == 1
        assert opened == []


@pytest.mark.parametrize(
    "asked",
    [{"forced_colors": "active"}, {"reduced_motion": "reduce"}, {"color_scheme": "dark", "contrast": "more"}],
    ids=["forced", "still", "contrast"],
)
def test_what_people_ask_of_their_browser_is_kept(browser: Any, served: Served, asked: dict[str, str]) -> None:
    """Forced colours still tell good from bad by signs, nothing moves where nothing shall, and more contrast is more."""
    with visit(browser, served.origin, **asked) as there:
        page = there.page
        page.goto("/")
        signs = page.eval_on_selector_all(".tone", "all => all.map(e => getComputedStyle(e, '::before').content)")
        assert any("✓" in sign for sign in signs)
        moving = page.eval_on_selector_all("*", "all => all.filter(e => parseFloat(getComputedStyle(e).transitionDuration) > 0).length")
        assert moving == 0
        if "contrast" in asked:
            soft, ink = page.evaluate("['.figure dt', 'body'].map(s => getComputedStyle(document.querySelector(s)).color)")
            assert soft == ink


def test_it_can_be_printed(browser: Any, served: Served) -> None:
    """The story with its drawing on paper, and nothing that only a screen needs."""
    with visit(browser, served.origin) as there:
        page = there.page
        page.goto(f"/delegations/{scene.ERIN.delegation}")
        page.emulate_media(media="print")
        assert page.locator("figure svg").first.is_visible()
        assert not page.locator("#live").is_visible()
        assert not page.get_by_role("navigation").is_visible()
        assert page.pdf()[:4] == b"%PDF"


# ── pictures for the documentation ──


def small(picture: bytes) -> bytes:
    """As few bytes as the same picture needs."""
    out = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def shot(page: Any, path: str, height: int) -> bytes:
    page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
    page.goto(path)
    # Laid out at once: in two steps, before and after the script, letters may be a fraction of a pixel off.
    page.evaluate("(body => { body.hidden = true; body.offsetHeight; body.hidden = false; return body.offsetHeight; })(document.body)")
    return small(page.screenshot())


def like(kept: Path, picture: bytes) -> bool:
    """Is it the picture that is kept? Letters may be a fraction of a pixel off from run to run."""
    if not kept.exists():
        return False
    with Image.open(kept) as before, Image.open(io.BytesIO(picture)) as now:
        if before.size != now.size:
            return False
        shrunk = [image.convert("L").resize((before.width // 4, before.height // 4), Image.Resampling.BOX) for image in (before, now)]
        return max(ImageStat.Stat(ImageChops.difference(*shrunk)).mean) < 1.0


def test_screenshots(browser: Any, served: Served, tmp_path: Path) -> None:
    """Those of the documentation can be taken again, and are small enough to be loaded anywhere."""
    pictures: dict[str, Callable[[Any], bytes]] = {
        "page-overview.png": lambda page: shot(page, "/", 1000),
        "page-delegation.png": lambda page: shot(page, f"/delegations/{scene.ERIN.delegation}", 1000),
        "page-room.png": lambda page: shot(page, ROOM, 900),
    }
    taken = {}
    with visit(browser, served.origin, viewport={"width": 1000, "height": 900}) as there:
        for name, take in pictures.items():
            taken[name] = take(there.page)
    with (
        serving(tmp_path, bad=True) as night,
        visit(browser, night.origin, viewport={"width": 390, "height": 844}, color_scheme="dark", device_scale_factor=2) as there,
    ):
        taken["page-trouble.png"] = shot(there.page, "/", 844)
    for name, picture in taken.items():
        assert 5_000 < len(picture) < MOST, name
        if os.environ.get("SCREENSHOTS") and not like(IMAGES / name, picture):
            IMAGES.mkdir(exist_ok=True)
            (IMAGES / name).write_bytes(picture)
        with Image.open(IMAGES / name) as kept, Image.open(io.BytesIO(picture)) as now:
            assert kept.size == now.size, "take them again: make screenshots"
