"""A small Debian in a directory, made by debootstrap, in which an installation can be tried without changing this machine.

It takes root, the packages debootstrap and (for a boot) systemd-container, and the way to Debian's archive and to a Python package index. Where
something of it is missing, the tests that need it are skipped, and say what.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"
ARCHIVE = os.environ.get("DEBIAN_ARCHIVE")  # None: where debootstrap gets it by itself
MINUTES = 60.0
RESOLVER = Path("/etc/resolv.conf")
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
FROM_CHECKOUT = ("LICENSE", "README.md", "pyproject.toml", "requirements/run.txt", "sfu_delegate")


def needed(*programs: str) -> None:
    """Skip the test where it cannot be run."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"needs {', '.join(missing)}")


def run(*command: str, timeout: float = 10 * MINUTES, **more: str) -> str:
    """What a command prints on standard output; it has to succeed."""
    done = subprocess.run(command, env=os.environ | more, timeout=timeout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def within(root: Path, *command: str, timeout: float = 10 * MINUTES) -> str:
    """The same in the other root."""
    return run("chroot", str(root), *command, timeout=timeout)


def debian(root: Path) -> None:
    """Make one with Python in `root`. DEBIAN_BASE may name a directory with one that is there, which saves a minute or two."""
    needed("debootstrap", "chroot")
    if base := os.environ.get("DEBIAN_BASE"):
        run("cp", "--archive", "--no-target-directory", base, str(root))
    else:
        done = subprocess.run(
            ("debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", SUITE, str(root), *([ARCHIVE] if ARCHIVE else [])),
            capture_output=True,
            text=True,
            timeout=20 * MINUTES,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"debootstrap does not get through: {(done.stderr or done.stdout)[-300:]}")
    # As containers do it; and the way to the package index may lead through a proxy with an authority of its own.
    shutil.copyfile(RESOLVER, root / "etc/resolv.conf")
    if AUTHORITIES.exists():
        shutil.copyfile(AUTHORITIES, root / str(AUTHORITIES).lstrip("/"))


def checkout(target: Path) -> None:
    """What the program is installed from, without what lies around in a working directory."""
    for name in FROM_CHECKOUT:
        source, there = ROOT / name, target / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, there, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, there)
