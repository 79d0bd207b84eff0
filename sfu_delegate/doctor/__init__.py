"""`sfu-delegate doctor`: looks at everything that the daemon needs, from the operator's seat, and says what is wrong and what to do.

It works before the first start, and is harmless beside a running daemon: it reads its database and never writes to it, asks homeservers for things
that do not exist, and on the SFU makes and deletes one room of nobody. What costs a daemon something, such as measuring a rate limit, is left out
where one may be at work. It must never show a secret.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sfu_delegate.config import Config, ConfigInvalid, load
from sfu_delegate.doctor.findings import Check, Report, Result, Verdict
from sfu_delegate.doctor.plan import grounds, plan
from sfu_delegate.doctor.running import run_all
from sfu_delegate.doctor.showing import as_data, progress, show
from sfu_delegate.doctor.verdicts.here import judge_config

__all__ = ["Report", "Verdict", "as_data", "diagnose", "examine", "progress", "show"]


def diagnose(path: Path, environ: Mapping[str, str], tell: Callable[[Sequence[Check]], object] = lambda _: None) -> Report:
    """Look at everything that this configuration names. A configuration that cannot be used is all that is told then."""
    began = time.monotonic()
    try:
        config = load(path, environ)
    except ConfigInvalid as error:
        finding = judge_config(error.problems, error.warnings)
        return Report(str(path), [Result("config", "", finding, time.monotonic() - began)], time.monotonic() - began)
    return asyncio.run(examine(config, path, tell))


async def examine(config: Config, path: Path, tell: Callable[[Sequence[Check]], object] = lambda _: None) -> Report:
    """The same for a configuration that was read from `path`."""
    began = time.monotonic()
    async with grounds(config, path) as ground:
        results = await run_all(plan(ground), tell)
    return Report(str(path), results, time.monotonic() - began)
