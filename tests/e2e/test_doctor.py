"""The doctor and the real Synapse, with each defect made on purpose: before the first start of a daemon, and beside a running one."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from sfu_delegate.config import from_mapping
from sfu_delegate.demo.processes import HOST as LOOPBACK
from sfu_delegate.demo.processes import free_ports
from sfu_delegate.demo.sfu import KEY, SECRET
from sfu_delegate.demo.synapse import Federation, Synapse
from sfu_delegate.doctor import as_data, examine
from sfu_delegate.doctor.findings import Finding, Report, Verdict
from sfu_delegate.sandbox.server import SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel

from tests.e2e.daemon_process import config_for, running_daemon
from tests.e2e.federation import HOST
from tests.e2e.service import ON, register
from tests.integration.certificates import Certificates

pytestmark = [pytest.mark.synapse, pytest.mark.asyncio(loop_scope="session")]

OK, WARNING, PROBLEM, SKIPPED = Verdict.OK, Verdict.WARNING, Verdict.PROBLEM, Verdict.SKIPPED
LIMIT = ("takes 8 min", "1 action a second", "measured")


def of(report: Report, what: str) -> Finding:
    """What came of one check of the homeserver."""
    [found] = [result.finding for result in report.results if result.id == f"homeserver.{what}"]
    return found


def says(finding: Finding, verdict: Verdict, *words: str) -> None:
    """It has this verdict, and these words in its evidence or remedy."""
    assert finding.verdict is verdict, finding
    for word in words:
        assert word in f"{finding.evidence} → {finding.remedy}", finding


def trusted(synapse: Synapse, authority: Certificates) -> dict[str, Any]:
    """The entry of a Synapse that answers on this machine, with a certificate of the tests' authority."""
    assert synapse.federation is not None
    entry = {"name": synapse.server_name, "url": synapse.url, "federation_url": synapse.federation.url}
    return {**entry, "ca_file": str(authority.ca_file), "allow_private_addresses": True}


@asynccontextmanager
async def an_sfu() -> AsyncIterator[tuple[SandboxSfu, int, int]]:
    """An SFU whose webhooks go to the first of two ports."""
    listen, admin = free_ports(2)
    async with SandboxSfu(SfuModel({KEY: SECRET}, [f"http://{LOOPBACK}:{listen}/webhooks/livekit"])) as sfu:
        yield sfu, listen, admin


async def examined(directory: Path, entry: Mapping[str, Any], **sections: Any) -> Report:
    """What the doctor says where no daemon runs."""
    async with an_sfu() as (sfu, listen, admin):
        config = config_for(sfu.url, [], listen={"port": listen}, admin={"port": admin}, **sections)
        config |= {"homeservers": [dict(entry)], "database": f"sqlite:///{directory}/delegate.db"}
        return await examine(from_mapping(config), directory / "sfu-delegate.yaml")


# ── one Synapse as it comes, shared with other tests ──


async def test_a_synapse_without_an_application_service(synapse: Synapse, authority: Certificates, tmp_path: Path) -> None:
    """Its default limit is measured and told in minutes; all else is as it should be, but for what clients are told."""
    report = await examined(tmp_path, trusted(synapse, authority))
    says(of(report, "reachable"), OK, synapse.url)
    says(of(report, "clock"), OK)
    says(of(report, "delayed_events"), OK, "generation C", "restart, send and cancel are served")
    says(of(report, "rate_limit"), WARNING, *LIMIT, "`sfu-delegate appservice`")
    says(of(report, "application_service"), SKIPPED)
    says(of(report, "largest_delay"), SKIPPED, "application service")
    says(of(report, "federation"), OK)
    says(of(report, "well_known"), WARNING, "no livekit_service_url", "org.matrix.msc4143.rtc_foci")
    assert report.exit_code == 0


async def test_a_wrong_as_token_and_a_federation_that_is_not_there(synapse: Synapse, authority: Certificates, tmp_path: Path) -> None:
    """Synapse does not know the token, and nobody answers where its federation API should be."""
    [nobody] = free_ports(1)
    token = "a-token-that-synapse-does-not-know-0123456789"
    entry = trusted(synapse, authority) | {"as_token": token, "federation_url": f"https://{HOST}:{nobody}"}
    report = await examined(tmp_path, entry)
    says(of(report, "application_service"), PROBLEM, "does not know the as_token", "app_service_config_files")
    says(of(report, "rate_limit"), SKIPPED, "401 M_UNKNOWN_TOKEN")
    says(of(report, "largest_delay"), SKIPPED, "401 M_UNKNOWN_TOKEN")
    says(of(report, "federation"), PROBLEM, "no connection", "8448")
    assert token not in json.dumps(as_data(report))


async def test_a_certificate_that_is_not_trusted(synapse: Synapse, authority: Certificates, tmp_path: Path) -> None:
    """The federation API is there, and nobody can know that it is the homeserver's."""
    entry = {key: value for key, value in trusted(synapse, authority).items() if key != "ca_file"}
    report = await examined(tmp_path, entry)
    says(of(report, "federation"), PROBLEM, "TLS certificate is not accepted")
    says(of(report, "well_known"), WARNING, "TLS certificate is not accepted")


# ── Synapses with defects, one for each configuration ──

slow = pytest.mark.slow

Edit = Callable[[dict[str, Any]], object]


@asynccontextmanager
async def registered(
    directory: Path, authority: Certificates, port: int, settings: Mapping[str, Any], edit: Edit = lambda _: None
) -> AsyncIterator[tuple[Synapse, dict[str, Any]]]:
    """A Synapse that has the daemon at `port` as its application service, by a registration that was edited, and the entry for it."""
    directory.mkdir()
    [federated] = free_ports(1)
    name = f"{HOST}:{federated}"
    file = register(directory, name, "http://127.0.0.1:8008", port)
    registration = yaml.safe_load(file.read_text())
    edit(registration)
    file.write_text(yaml.safe_dump(registration))
    federation = Federation(HOST, federated, authority.file(HOST))
    settings = {"app_service_config_files": [str(file)], **settings}
    async with Synapse(directory / "synapse", server_name=name, settings=settings, federation=federation) as synapse:
        yield synapse, trusted(synapse, authority) | {"registration_file": str(file)}


@slow
async def test_delayed_events_are_off(authority: Certificates, tmp_path: Path) -> None:
    """As Synapse comes: its endpoints are there, and it does not announce them."""
    async with registered(tmp_path / "hs", authority, 1, {"max_event_delay_duration": None, "experimental_features": ON}) as (_, entry):
        report = await examined(tmp_path, entry)
    says(of(report, "delayed_events"), PROBLEM, "are off", "max_event_delay_duration: 24h")
    says(of(report, "largest_delay"), PROBLEM, "no delay at all")
    says(of(report, "rate_limit"), SKIPPED, "delayed events are off")
    says(of(report, "application_service"), OK)


@slow
async def test_a_small_delay_no_features_and_a_limited_service(authority: Certificates, tmp_path: Path) -> None:
    """Three defects at once: each is told by itself."""

    def limit(registration: dict[str, Any]) -> None:
        registration["rate_limited"] = True

    settings = {"max_event_delay_duration": "10m", "experimental_features": {}}
    async with registered(tmp_path / "hs", authority, 1, settings, limit) as (synapse, entry):
        report = await examined(tmp_path, entry)
        says(of(report, "largest_delay"), WARNING, "10m is the longest", "an hour", "max_event_delay_duration: 24h")
        says(of(report, "rate_limit"), WARNING, *LIMIT, "rate_limited: false")
        says(of(report, "application_service"), PROBLEM, "msc4512_enabled", "msc4502_enabled")
        says(of(report, "delayed_events"), OK)
        report = await examined(tmp_path, entry, delegations={"min_delay": "1h"})
        says(of(report, "largest_delay"), PROBLEM, "nothing can be delegated")
        await synapse.stop()
        report = await examined(tmp_path, entry)
        says(of(report, "reachable"), PROBLEM, "it cannot be reached: no connection")
        says(of(report, "application_service"), SKIPPED, "no connection")
        says(of(report, "federation"), PROBLEM)


@slow
@pytest.mark.parametrize("edited", ["hs_token", "io.element.msc4512.proxy_url"])
async def test_the_way_back_is_broken(authority: Certificates, tmp_path: Path, edited: str) -> None:
    """Synapse passes requests on with another token than the daemon has, or to nobody; beside a running daemon that is seen."""
    listen, nobody = free_ports(2)
    values = {"hs_token": "another-token-than-that-of-the-daemon-0123", "io.element.msc4512.proxy_url": f"http://{LOOPBACK}:{nobody}"}
    async with registered(
        tmp_path / "hs", authority, listen, {"experimental_features": ON}, lambda registration: registration.update({edited: values[edited]})
    ) as (_, entry):
        registration = yaml.safe_load(Path(entry.pop("registration_file")).read_text())
        entry |= {"as_token": registration["as_token"], "hs_token": "the-token-that-the-daemon-has-0123456789"}
        if edited != "hs_token":
            entry["hs_token"] = registration["hs_token"]
        async with SandboxSfu(SfuModel({KEY: SECRET}, [f"http://{LOOPBACK}:{listen}/webhooks/livekit"])) as sfu:
            config = config_for(sfu.url, [], listen={"host": LOOPBACK, "port": listen}) | {"homeservers": [entry]}
            async with running_daemon(config, tmp_path / "daemon") as daemon:
                report = await examine(from_mapping(daemon.config), tmp_path / "daemon" / "sfu-delegate.yaml")
    expected = "hs_token that is not the configured one" if edited == "hs_token" else "cannot reach this service"
    says(of(report, "application_service"), PROBLEM, "proxy: ", expected)
    says(of(report, "rate_limit"), OK, "has met no limit")


@pytest_asyncio.fixture(loop_scope="session")
async def daemon_of_a_homeserver(authority: Certificates, tmp_path: Path) -> AsyncIterator[Path]:
    """The configuration file of a running daemon whose homeserver tells clients of it, beside an SFU with webhooks to it."""
    [listen] = free_ports(1)
    foci = {"org.matrix.msc4143.rtc_foci": [{"type": "livekit", "livekit_service_url": f"http://{LOOPBACK}:{listen}"}]}
    settings = {"experimental_features": ON, "extra_well_known_client_content": foci}
    async with registered(tmp_path / "hs", authority, listen, settings) as (_, entry), SandboxSfu(SfuModel({KEY: SECRET})) as sfu:
        sfu.model.urls = [f"http://{LOOPBACK}:{listen}/webhooks/livekit"]
        config = config_for(sfu.url, [], listen={"host": LOOPBACK, "port": listen}, delegations={}) | {"homeservers": [entry]}
        async with running_daemon(config, tmp_path / "daemon"):
            yield tmp_path / "daemon" / "sfu-delegate.yaml"


@slow
async def test_the_command_finds_nothing_wrong(daemon_of_a_homeserver: Path) -> None:
    """All that there is, set up as the manual says, and looked at by the command: every check is ok, but for plain ws:// in this test."""
    done = await _command(daemon_of_a_homeserver, "--json")
    report = json.loads(done.stdout)
    verdicts = {f"{check['id']} {check['subject']}".rstrip(): check["verdict"] for check in report["checks"]}
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "ok"} == {}, done.stdout
    assert (done.returncode, report["ok"], report["verdict"], done.stderr) == (0, True, "ok", "")
    done = await _command(daemon_of_a_homeserver)
    assert done.returncode == 0
    assert "a sfu-delegate answers" in done.stdout


async def _command(config: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """`sfu-delegate doctor`, in a process of its own, while this one plays the SFU."""
    command = [sys.executable, "-m", "sfu_delegate.cli", "doctor", "--config", str(config), *options]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False, timeout=60)
