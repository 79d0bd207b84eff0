"""What operators see of a running daemon, and what nobody may see: health, metrics, logs and secrets."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sfu_delegate.config import from_mapping
from sfu_delegate.sandbox import tokens
from sfu_delegate.sandbox.homeserver import HomeserverFaults, HomeserverModel, RateLimit

from tests import stores
from tests.integration.daemon import SERVER, SFU_KEY, SFU_SECRET, Participant, Site, broken_database, open_site, until

pytestmark = pytest.mark.usefixtures("database")

EXPECTED = {
    "sfu_delegate_build_info": "gauge",
    "sfu_delegate_delegated_events": "gauge",
    "sfu_delegate_webhooks": "counter",
    "sfu_delegate_webhook_acknowledge_seconds": "histogram",
    "sfu_delegate_actions": "counter",
    "sfu_delegate_action_seconds": "histogram",
    "sfu_delegate_looks": "counter",
    "sfu_delegate_application_service_works": "gauge",
    "sfu_delegate_membership_checks": "counter",
    "sfu_delegate_participants_removed": "counter",
    "sfu_delegate_look_seconds": "histogram",
    "sfu_delegate_disconnect_to_end_seconds": "histogram",
    "sfu_delegate_delegated_events_accepted": "counter",
    "sfu_delegate_delegated_events_ended": "counter",
    "sfu_delegate_events_lost_while_connected": "counter",
    "sfu_delegate_restart_delay_fraction": "histogram",
    "sfu_delegate_backlog_actions": "gauge",
    "sfu_delegate_backlog_lateness_seconds": "gauge",
    "sfu_delegate_restart_forecast_lateness_seconds": "gauge",
    "sfu_delegate_homeserver_rate_limit": "gauge",
    "sfu_delegate_commit_seconds": "histogram",
    "sfu_delegate_batch_inputs": "histogram",
    "sfu_delegate_instances": "gauge",
    "sfu_delegate_database_works": "gauge",
    "sfu_delegate_config_reloads": "counter",
    "sfu_delegate_matrixrtc_requests": "counter",
    "sfu_delegate_openid_checks": "counter",
    "sfu_delegate_openid_check_seconds": "histogram",
    "sfu_delegate_federation_tls_verified": "gauge",
    "sfu_delegate_unsent_departure_seconds": "gauge",
    "sfu_delegate_departures": "counter",
    "sfu_delegate_webhooks_late": "counter",
    "sfu_delegate_homeservers_failing": "gauge",
    "sfu_delegate_sfu_works": "gauge",
    "sfu_delegate_clock_difference_seconds": "gauge",
    "sfu_delegate_database_bytes": "gauge",
    "sfu_delegate_database_free_bytes": "gauge",
    "sfu_delegate_delegation_requests": "counter",
    "process_cpu_seconds": "counter",
    "process_max_fds": "gauge",
    "process_open_fds": "gauge",
    "process_resident_memory_bytes": "gauge",
    "process_start_time_seconds": "gauge",
    "process_virtual_memory_bytes": "gauge",
}
"""By their families: a counter's samples end in `_total`."""

ON_DISK = {"sfu_delegate_database_bytes", "sfu_delegate_database_free_bytes"}
"""Those of a database whose files are here."""

LABELS = {"reason", "status", "sfu", "event", "result", "homeserver", "action", "outcome", "state", "presence", "lane", "version", "le"}


# ── health ──


async def test_a_daemon_in_good_health(tmp_path: Path) -> None:
    """Alive, ready, and everybody named in the configuration is well; on the admin listener only."""
    async with open_site(tmp_path) as site:
        live, ready = await site.admin("/health/live"), await site.admin("/health/ready")
        assert (live.status, live.body) == (200, {"status": "ok"})
        assert ready.status == 200
        conditions = {"homeservers": {"hs.test": "ok"}, "sfus": {"main": "ok"}, "application_services": {}}
        assert ready.body == {"status": "ok", "phase": "running", "database": "ok", **conditions}
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert (await site.ask("GET", path)).status == 404
        assert (await site.admin("/v1/delegations")).status == 404


async def test_a_homeserver_that_is_down_degrades_the_detail_only(tmp_path: Path) -> None:
    """Ready all the same: taking the daemon out of service would help nobody. When the homeserver is back, the detail says so."""
    async with open_site(tmp_path, delegations={"verify_timeout": "100ms"}) as site:
        site.homeserver.model.faults.status = 502
        await site.delegate(await site.participant())
        await until(lambda: site.lines("homeserver_failed"), "it is noticed")
        ready = await site.admin("/health/ready")
        assert (ready.status, ready.body["status"]) == (200, "degraded")
        assert await site.count("sfu_delegate_homeservers_failing", homeserver="hs.test") == 1
        assert "502" in ready.body["homeservers"]["hs.test"]
        site.homeserver.model.faults.status = None
        await until(lambda: site.lines("homeserver_works_again"), "it is noticed")
        assert (await site.admin("/health/ready")).body["status"] == "ok"
        assert len(site.lines("homeserver_failed")) == 1  # not a line for each try


async def test_an_sfu_that_is_down_degrades_the_detail_only(tmp_path: Path) -> None:
    """The same for looks."""
    async with open_site(tmp_path) as site:
        site.sfu.model.faults.error = 500
        await site.delegated(await site.participant())
        await until(lambda: site.lines("sfu_failed"), "it is noticed")
        ready = await site.admin("/health/ready")
        assert (ready.status, ready.body["status"]) == (200, "degraded")
        assert ready.body["sfus"]["main"] != "ok"
        assert await site.count("sfu_delegate_sfu_works", sfu="main") == 0
        site.sfu.model.faults.error = None
        await until(lambda: site.lines("sfu_works_again"), "it is noticed")
        assert (await site.admin("/health/ready")).body["status"] == "ok"


async def test_a_database_that_does_not_work_means_not_ready(tmp_path: Path) -> None:
    """503 with the reason; the process is alive nevertheless, and ready again as soon as the database is."""
    async with open_site(tmp_path) as site:
        with broken_database(site):
            ready = await site.admin("/health/ready")
            assert (ready.status, ready.body["status"]) == (503, "unavailable")
            assert "full" in ready.body["database"]
            assert (await site.admin("/health/live")).status == 200
            answer = await site.delegate(await site.participant())
            assert (answer.status, answer.body["errcode"]) == (503, "M_UNKNOWN")
            assert "Retry-After" in answer.headers
            assert site.database.place not in answer.text
            assert await site.count("sfu_delegate_database_works") == 0

        async def ready_again() -> bool:
            return (await site.admin("/health/ready")).status == 200

        await until(ready_again, "readiness")
        await site.delegated(await site.participant("bob"))
        assert await site.count("sfu_delegate_database_works") == 1


# ── metrics ──


async def test_every_metric_is_there_with_its_unit(tmp_path: Path, database: str) -> None:
    """All families but those about the process begin with `sfu_delegate_`, have a help text, and are of the type that their name says."""
    async with open_site(tmp_path) as site:
        await site.delegated(await site.participant())
        site.daemon.reload()
        if database == "sqlite":

            async def surveyed() -> bool:
                return "\nsfu_delegate_database_bytes " in (await site.admin("/metrics")).text

            await until(surveyed, "the first look at the disk")
        exposition = (await site.admin("/metrics")).text
        families = {family.name: family for family in text_string_to_metric_families(exposition)}
        expected = {name: type_ for name, type_ in EXPECTED.items() if database == "sqlite" or name not in ON_DISK}
        assert {name: family.type for name, family in families.items()} == expected
        for family in families.values():
            assert family.documentation.endswith("."), family.name
            assert {label for sample in family.samples for label in sample.labels} <= LABELS
        assert not re.search(r"_created\b", exposition)


async def test_the_metrics_tell_of_a_life(tmp_path: Path, database: str) -> None:
    """Each step of a delegation is counted where it belongs."""
    async with open_site(tmp_path) as site:
        # A plan holds for a second, in which there is a step without a reason on PostgreSQL: shorter delays are restarted earlier now and then.
        alice = await site.participant(delay_ms=2000 if database == "sqlite" else 3500)
        given = await site.in_call(alice)
        await site.restarted(alice, 3)
        await site.leave(alice)
        await site.done(given)
        at = {"homeserver": "hs.test"}
        assert await site.count("sfu_delegate_delegated_events_accepted_total", **at) == 1
        assert await site.count("sfu_delegate_delegated_events_ended_total", outcome="sent", **at) == 1
        assert await site.count("sfu_delegate_delegated_events_ended_total", **at) == 1
        assert await site.count("sfu_delegate_delegated_events", state="done", **at) == 1
        assert await site.count("sfu_delegate_delegated_events") == 1
        assert await site.count("sfu_delegate_actions_total", action="send", outcome="done", **at) == 1
        restarts = len(site.event(alice).restarted_at)
        assert await site.count("sfu_delegate_actions_total", action="restart", outcome="done", **at) == restarts
        assert await site.count("sfu_delegate_restart_delay_fraction_count", **at) == restarts - 1
        assert await site.count("sfu_delegate_restart_delay_fraction_bucket", le="0.6", **at) <= 1  # the first one
        assert await site.count("sfu_delegate_disconnect_to_end_seconds_count", **at) == 1
        assert await site.count("sfu_delegate_webhooks_total", event="participant_left", result="stored", sfu="main") == 1
        assert await site.count("sfu_delegate_webhook_acknowledge_seconds_count") == 3
        assert await site.count("sfu_delegate_looks_total", outcome="done", sfu="main") >= 1
        assert await site.count("sfu_delegate_departures_total", sfu="main", reason="CLIENT_INITIATED") == 1
        assert await site.count("sfu_delegate_delegation_requests_total", status="201") == 1
        assert await site.count("sfu_delegate_sfu_works", sfu="main") == 1
        assert await site.count("sfu_delegate_homeservers_failing", **at) == 0

        async def none_waits() -> bool:  # that is looked at now and then, and a look may have come between the departure and its goodbye
            return await site.count("sfu_delegate_unsent_departure_seconds", **at) == 0

        await until(none_waits, "no departure waits any more")
        assert abs(await site.count("sfu_delegate_clock_difference_seconds")) < 60
        assert await site.count("sfu_delegate_events_lost_while_connected_total", **at) == 0


@stores.slow_on_postgresql
async def test_a_backlog_is_seen(tmp_path: Path) -> None:
    """Actions that are due and cannot be begun are counted, by lane."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfu_delegate.daemon.inbox.SURVEY_EVERY", 0.1)
        patch.setattr("sfu_delegate.sandbox.homeserver.HELD_BACK", 0.02)
        async with open_site(tmp_path) as site:
            people = [await site.participant(f"p{n}") for n in range(10)]
            for who in people:
                await site.in_call(who)
            model = site.homeserver.model
            model.limit = RateLimit(0.001, 0.5)
            model.faults.retry_after, model.faults.retry_after_ms = "0.2", ""
            for who in people:
                await site.leave(who, "PARTICIPANT_REMOVED")

            async def seen() -> bool:
                return await site.count("sfu_delegate_backlog_actions", lane="end", homeserver="hs.test") >= 5

            await until(seen, "the backlog is counted")
            assert await site.count("sfu_delegate_backlog_lateness_seconds", lane="end") > 0
            assert await site.count("sfu_delegate_unsent_departure_seconds", homeserver="hs.test") > 0
            model.limit = None
            for who in people:
                await site.ended(who)

            async def gone() -> bool:
                await site.delegate(await site.participant("one-more"))
                return await site.count("sfu_delegate_backlog_actions", lane="end", homeserver="hs.test") == 0

            await until(gone, "the backlog is gone")


async def test_no_label_is_a_name_that_a_client_chose(tmp_path: Path) -> None:
    """A homeserver under a pattern shows the pattern; rooms, identities and users never occur."""
    async with open_site(tmp_path, started=False) as site:
        site.changes = {"homeservers": [{"name": "*.example.org", "url": site.homeserver.url}], "delegations": {"verify_timeout": "5s"}}
        await site.start()
        people = [await site.participant(f"chosen-identity-{n}", f"chosen-room-{n}") for n in range(3)]
        for n, who in enumerate(people):
            given = (await site.delegate(who, homeserver=f"chosen{n}.example.org")).body
            await site.join(who)
            await site.present(given, "connected")
            await site.leave(who)
            await site.ended(who)
        await site.delegate(people[0], homeserver="chosen.elsewhere.net")
        webhook = b'{"event": "chosen_event", "room": {"name": "chosen-room"}}'
        signed = {"Authorization": tokens.sign(webhook, SFU_KEY, SFU_SECRET, time.time())}
        assert (await site.ask("POST", "/webhooks/livekit", data=webhook, headers=signed)).status == 200
        exposition = (await site.admin("/metrics")).text
        assert 'homeserver="*.example.org"' in exposition
        assert "chosen" not in exposition
        assert {sample.labels["homeserver"] for sample in _samples(exposition) if "homeserver" in sample.labels} == {"*.example.org"}


def _samples(exposition: str) -> list[Any]:
    return [sample for family in text_string_to_metric_families(exposition) for sample in family.samples]


async def test_a_homeserver_that_was_removed_from_the_configuration_is_not_named_either(tmp_path: Path) -> None:
    """Its delegations live on in the database, and their name must not become a label."""
    async with open_site(tmp_path, started=False) as site:
        site.changes = {"homeservers": [{"name": "*.example.org", "url": site.homeserver.url}]}
        await site.start()
        given = (await site.delegate(await site.participant(), homeserver="chosen.example.org")).body
        assert given["verified"] is True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(site.daemon, "_reread", lambda: _without_pattern(site))
            site.daemon.reload()
        labels = {sample.labels.get("homeserver") for sample in _samples((await site.admin("/metrics")).text)}
        assert "chosen.example.org" not in labels


def _without_pattern(site: Site) -> Any:
    mapping = site.mapping()
    mapping["homeservers"] = [{"name": "other.test", "url": site.homeserver.url}]
    return from_mapping(mapping)


# ── secrets ──


async def test_secrets_are_told_to_nobody(tmp_path: Path) -> None:
    """A busy run with everything that can go wrong, logged at debug level: no token, no delay_id, no key and no JWT in any line, error or metric."""
    model = HomeserverModel("hs.test", seed=3, limit=RateLimit(50.0, 5.0))
    async with open_site(tmp_path, started=False, homeserver=model) as site:
        as_token = model.application_service(rate_limited=True)
        site.changes = {
            "homeservers": [{"name": "hs.test", "url": site.homeserver.url, "as_token": as_token}],
            "delegations": {"verify_timeout": "200ms"},
            "timeouts": {"connect": "500ms", "request": "500ms"},
        }
        site.secrets.add(as_token)
        await site.start()
        people = [await site.participant(f"@p{n}:hs.test:DEVICE", f"call{n % 3}", user=f"@p{n}:hs.test") for n in range(12)]
        scoped = {who: model.scoped_token(f"@p{n}:hs.test", who.delay_id) for n, who in enumerate(people[:4])}
        full = model.register("@p11:hs.test")
        site.secrets |= {*scoped.values(), full}
        answers = await asyncio.gather(*(site.delegate(who, token=scoped.get(who)) for who in people[:11]))
        assert {answer.status for answer in answers} == {201}
        assert (await site.delegate(people[11], token=full)).status == 400
        for who in people:
            await site.join(who)
        await _wrong_requests(site, people[0])
        site.sfu.model.faults.error = 500
        faults: list[dict[str, Any]] = [
            {"status": 500},
            {"html": 502},
            {"garbage": True},
            {"close": True},
            {"hang": True},
            {"redirect": "http://127.0.0.1:9/x"},
        ]
        for n, fault in enumerate(faults):
            model.faults = HomeserverFaults(**fault)
            tried = model.answers.total()
            await site.leave(people[n])
            await site.delegate(await site.participant(f"@p{n}:hs.test:DEVICE", people[n].room, user=f"@p{n}:hs.test"))
            await _asked(model, tried + 2)
        with broken_database(site):
            await site.delegate(people[7])
        site.sfu.model.faults.error = None
        model.faults = HomeserverFaults()
        for who, answer in zip(people[7:10], answers[7:10], strict=True):
            await site.leave(who)
            await site.done(answer.body)
        site.daemon.reload()
        await site.admin("/health/ready")
        await site.admin("/metrics")
        await site.stop()
        log = site.log.getvalue()
        assert log
        assert site.said
        assert not re.search(r"eyJ[A-Za-z0-9_-]{8,}\.", log + "".join(site.said))
        assert not re.search(r"syd_[A-Za-z]{6,}", log + "".join(site.said))
        assert not re.search(r"turnPassword|turn_password", log)
        # That they are checked at all: see `Site.check_secrets`.
        assert {SFU_SECRET, as_token, full, people[0].delay_id, people[0].token} <= site.secrets


async def _asked(model: HomeserverModel, times: int) -> None:
    """Wait until the homeserver has been asked so often."""
    await until(lambda: model.answers.total() >= times, "requests to the homeserver")


async def _wrong_requests(site: Site, who: Participant) -> None:
    """What clients get wrong, with secrets in every place where they do not belong."""
    secret = "a-secret-in-the-wrong-place-0123456789"
    site.secrets.add(secret)
    good = {"delay_id": who.delay_id, "delay_ms": who.delay_ms}
    bodies: list[Any] = [
        {"homeserver": secret + "/", "delayed_events": [good]},
        {"homeserver": "hs.test", "delayed_events": [{"delay_id": secret, "delay_ms": 40_000}]},
        {"homeserver": "hs.test", "delayed_events": [{"delay_id": [secret], "delay_ms": secret}]},
        {"homeserver": "hs.test", "delayed_events": [{**good, "on_disconnect": secret}]},
        {"homeserver": "hs.test", "delayed_events": [good], "token": secret + " with a space"},
        {"homeserver": "hs.test", "delayed_events": [good], secret + " in a name": 1},
        [secret],
    ]
    for wrong in bodies:
        answer = await site.ask("POST", "/v1/delegations", token=who.token, json=wrong)
        assert 400 <= answer.status < 500 or answer.status == 503, answer.text
    for data in (f'{{"{secret}": '.encode(), b'"' + secret.encode(), b"\xff" + secret.encode()):
        assert (await site.ask("POST", "/v1/delegations", token=who.token, data=data)).status == 400
    for token in (secret, f"eyJhbGciOiJub25lIn0.{secret}.x", who.token[:-2] + "xx"):
        assert (await site.ask("POST", "/v1/delegations", token=token, json={})).status == 401
        assert (await site.ask("GET", f"/v1/delegations/{secret}", token=token)).status in (401, 404)
        headers = {"Authorization": token}
        assert (await site.ask("POST", "/webhooks/livekit", data=secret.encode(), headers=headers)).status == 401
    assert (await site.ask("GET", f"/{secret}/delayed_events/{secret}?access_token={secret}")).status == 404
    assert (await site.ask("PATCH", "/v1/delegations", data=secret.encode())).status == 405


async def test_an_unexpected_error_tells_no_secret_either(tmp_path: Path) -> None:
    """A defect of ours: 500 without detail for the client, the place without any value in the log."""
    async with open_site(tmp_path, delegations={"verify_timeout": "300ms"}) as site:
        alice = await site.participant()

        def defect(*_: object, **__: object) -> None:
            raise RuntimeError(f"this text holds {alice.delay_id} and {alice.token}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(site.daemon.homeservers, "resolve", defect)
            answer = await site.delegate(alice)
        assert (answer.status, answer.body["errcode"]) == (500, "M_UNKNOWN")
        (line,) = site.lines("request_failed")
        assert (line["path"], line["error"]) == ("/v1/delegations", "RuntimeError")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(site.daemon.client, "act", defect)
            patch.setattr("sfu_delegate.livekit.room_service.RoomService.look", defect)
            assert (await site.delegate(await site.participant("bob"), homeserver="hs.test")).status in (201, 500)
            await until(lambda: site.lines("action_failed") and site.lines("look_failed"), "both fail")
        assert (await site.delegate(alice)).status == 201


async def test_each_line_about_a_delegation_names_it(tmp_path: Path) -> None:
    """Structured lines: one for each step of a delegation's life, with its id."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        await site.leave(alice)
        await site.done(given)
        lines = site.lines("delegation")
        assert [line["what"] for line in lines] == ["delegated", "verified", "connected", "away", "gone", "ending", "sent"]
        assert {line["delegation"] for line in lines} == {given["id"]}
        assert all({"time", "level", "logger"} <= line.keys() for line in site.lines())


async def test_what_is_configured_is_asked_at_the_start(tmp_path: Path) -> None:
    """A mistake shows before the first call does; delayed events that are switched off are one."""
    model = HomeserverModel(SERVER, seed=1, limit=None)
    model.unstable_features = {}
    async with open_site(tmp_path, homeserver=model) as site:

        async def condition() -> str:
            return str((await site.admin("/health/ready")).body["homeservers"][SERVER])

        async def told() -> bool:
            return "switched off" in await condition()

        await until(told, "the homeserver's condition")
        assert site.sfu.model.calls["ListParticipants"] >= 1
