"""The container image is built from the Dockerfile, and what is in it runs as it is meant to: as nobody in particular, on a read-only root.

It is built by buildah, without a container engine, on a Debian that debootstrap has made; so it takes root, both of them, and minutes.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sfu_delegate import __version__
from sfu_delegate.demo.processes import free_ports

from tests.install import debian

pytestmark = pytest.mark.slow

USER = 10001
CONFIG = """\
sfus: {main: {url: 'ws://127.0.0.1:1', keys: {APIexample: a-secret-of-livekit-that-nobody-else-may-see}}}
homeservers: [{name: example.org, url: 'http://127.0.0.1:1'}]
"""
# A mount namespace of its own, in which the image's root is read-only but for what is mounted on it, as with `docker run --read-only`.
RUN = """
set -e
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs -o mode=1777 tmp "$ROOT/tmp"
mount --bind "$DATA" "$ROOT/var/lib/sfu-delegate"
mount --bind "$CONFIG" "$ROOT/etc/sfu-delegate"
mount -o remount,bind,ro "$ROOT"
exec chroot --userspec="$WHO" "$ROOT" /usr/bin/env --chdir=/var/lib/sfu-delegate "$@"
"""


class Image(NamedTuple):
    """One that was built."""

    root: Path
    config: Mapping[str, Any]
    directory: Path  # for what is mounted

    def command(self, *command: str, **environ: str) -> tuple[list[str], dict[str, str]]:
        """How to run something in it, as its user and with its environment; `environ` is laid over that."""
        given = dict(one.split("=", 1) for one in self.config["Env"]) | environ
        places = {"ROOT": str(self.root), "DATA": str(self.directory / "data"), "CONFIG": str(self.directory / "etc"), "WHO": self.config["User"]}
        inside = ["-i", *(f"{name}={value}" for name, value in given.items()), *command]
        return ["unshare", "--mount", "sh", "-c", RUN, "sh", *inside], os.environ | places

    def run(self, *command: str, **environ: str) -> tuple[int, str]:
        """Run it to its end; its exit code, and what it said."""
        arguments, environment = self.command(*command, **environ)
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """It, with a configuration and an empty volume."""
    debian.needed("buildah", "debootstrap", "unshare")
    directory = tmp_path_factory.mktemp("image")
    (directory / "storage.conf").write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{directory}/graph"\nrunroot = "{directory}/run"\n')
    environ = {"CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"), "BUILDAH_ISOLATION": "chroot"}

    def buildah(*arguments: str) -> str:
        return debian.run("buildah", *arguments, timeout=20 * debian.MINUTES, **environ).strip()

    base = directory / "base"
    base.mkdir()
    debian.debian(base)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(base), "/")
    buildah("commit", "--quiet", "--rm", container, "localhost/base")
    arguments = {"BASE_IMAGE": "localhost/base", "VERSION": __version__, "REVISION": "0123456"}
    given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    buildah("build", "--quiet", "--format=docker", *given, "--tag=localhost/sfu-delegate", str(debian.ROOT))
    config = json.loads(buildah("inspect", "--type=image", "localhost/sfu-delegate"))["Docker"]["config"]
    root = Path(buildah("mount", buildah("from", "localhost/sfu-delegate")))
    for name, owner in (("data", USER), ("etc", 0)):
        (directory / name).mkdir(mode=0o700 if owner else 0o755)
        os.chown(directory / name, owner, owner)
    (directory / "etc" / "sfu-delegate.yaml").write_text(CONFIG)
    (directory / "etc" / "sfu-delegate.yaml").chmod(0o640)
    os.chown(directory / "etc" / "sfu-delegate.yaml", 0, USER)
    directory.chmod(0o755)
    yield Image(root, config, directory)
    buildah("umount", "--all")
    buildah("rm", "--all")
    buildah("rmi", "--all", "--force")


def test_what_it_says_of_itself(image: Image) -> None:
    """Its user, its labels, its check, and what it runs."""
    config = image.config
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["sfu-delegate"]
    assert config["Healthcheck"]["Test"] == ["CMD", "sfu-delegate", "healthcheck"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert (labels["title"], labels["licenses"], labels["version"], labels["revision"]) == ("sfu-delegate", "Apache-2.0", __version__, "0123456")
    assert config["Volumes"] == {"/var/lib/sfu-delegate": {}}


def test_it_has_the_program_and_not_what_installs_it(image: Image) -> None:
    """It runs as its user, on a read-only root; its Python can install nothing, and nothing in /opt is its user's."""
    assert image.run("sfu-delegate", "version") == (0, f"sfu-delegate {__version__}\n")
    assert image.run("python3", "-c", "import sfu_delegate.store.postgresql") == (0, "")
    assert image.run("id", "--user")[1].strip() == str(USER)
    assert image.run("touch", "/opt/x")[0] != 0
    assert image.run("python3", "-c", "import pip")[0] == 1
    assert not list((image.root / "opt/sfu-delegate/bin").glob("pip*"))
    assert not [path for path in (image.root / "opt").rglob("*") if path.lstat().st_uid == USER]
    code, said = image.run("sfu-delegate", "check-config")
    assert (code, said.splitlines()[-1]) == (0, "/etc/sfu-delegate/sfu-delegate.yaml: 1 warning; it can be used")


@contextmanager
def serving(image: Image, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """The image's own command; `listening` was logged."""
    arguments, environment = image.command(*image.config["Entrypoint"], *image.config["Cmd"], **environ)
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if '"listening"' in line:
                    break
            else:
                raise AssertionError("".join(lines))
            yield process
        finally:
            process.kill()


def test_it_serves_and_its_check_tells(image: Image) -> None:
    """By the command and the check that the image names: well while it runs, ready with its database in the volume, ended by SIGTERM."""
    listen, admin = map(str, free_ports(2))
    ports = {"SFU_DELEGATE_LISTEN__HOST": "127.0.0.1", "SFU_DELEGATE_LISTEN__PORT": listen, "SFU_DELEGATE_ADMIN__PORT": admin}
    check = image.config["Healthcheck"]["Test"][1:]
    assert image.run(*check, **ports)[0] == 1
    with serving(image, **ports) as process:
        assert image.run(*check, **ports) == (0, f"It lives, at http://127.0.0.1:{admin}.\n")
        assert image.run(*check, "--ready", **ports)[0] == 0
        assert (image.directory / "data" / "sfu-delegate.db").stat().st_uid == USER
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert image.run(*check, **ports)[0] == 1
