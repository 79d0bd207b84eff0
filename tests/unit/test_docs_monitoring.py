"""What docs/operating.md says about Prometheus is run, as it stands there, with a directory of its own in place of /etc/prometheus."""

import os
import re
import subprocess
from pathlib import Path

import yaml

from tests.monitoring import ALERTS, SITE, needs_promtool
from tests.snippets import ROOT, given


def run(text: str, tmp_path: Path) -> str:
    """The block, run from the checkout; systemd is not there, but is told what it would be."""
    (tmp_path / "bin").mkdir()
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.write_text('#!/bin/sh\necho "systemctl $*"\n')
    systemctl.chmod(0o755)
    environment = os.environ | {"PATH": f"{systemctl.parent}:{os.environ['PATH']}"}
    command = ["bash", "-euc", text.replace("/etc/prometheus/", f"{tmp_path}/")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_prometheus_is_set_up_as_it_is_told(tmp_path: Path) -> None:
    """The files are put beside each other, found valid, and taken over."""
    said = run(given("docs/operating.md", "promtool check config"), tmp_path)
    assert re.search(r"1 rule files found", said)
    assert said.endswith("systemctl reload prometheus\n")
    assert (tmp_path / "alerts.yml").read_text() == ALERTS.read_text()


def test_runbooks_are_moved_to_where_they_are_published(tmp_path: Path) -> None:
    """All links of the alerts, and nothing else."""
    (tmp_path / "alerts.yml").write_text(ALERTS.read_text())
    run(given("docs/operating.md", "sed -i 's#"), tmp_path)
    moved = (tmp_path / "alerts.yml").read_text()
    before, after = (yaml.safe_load(text)["groups"] for text in (ALERTS.read_text(), moved))
    links = [rule["annotations"].pop("runbook_url") for group in after for rule in group["rules"]]
    assert {link.partition("alerts.html#")[0] for link in links} == {"https://docs.example.org/sfu-delegate/"}
    for group in before:
        for rule in group["rules"]:
            assert rule["annotations"].pop("runbook_url").startswith(SITE)
    assert after == before
