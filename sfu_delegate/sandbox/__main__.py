"""`python -m sfu_delegate.sandbox`: a stand-in SFU and a stand-in homeserver on loopback, until interrupted."""

import argparse
import asyncio
import json
import signal
import sys

from .homeserver import HomeserverModel, Mode, RateLimit
from .server import SandboxHomeserver, SandboxSfu
from .sfu import SfuModel


def arguments() -> argparse.ArgumentParser:
    """What can be chosen on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sfu_delegate.sandbox",
        description="Runs a stand-in SFU and a stand-in homeserver on 127.0.0.1, and prints their addresses as one line of JSON. Not for production.",
        epilog="Each is driven through its control address: POST /sandbox/OPERATION with a JSON object of arguments. To the SFU's: "
        '/sandbox/create_room {"name": "call"}, which --auto-create makes needless; then /sandbox/join {"room": "call", "identity": '
        '"@alice:hs.test:PHONE"}, and /sandbox/leave with the same, and, if you like, "reason": "CLIENT_INITIATED". An operation that there is not '
        "is answered with those that there are, and arguments that do not fit with those that do.",
    )
    parser.add_argument("--webhook", action="append", default=[], metavar="URL", help="where webhooks are sent; may be repeated")
    parser.add_argument("--key", default="devkey", help="the SFU's API key (default: %(default)s)")
    parser.add_argument("--secret", default="a-secret-that-is-at-least-32-bytes-long", help="its secret (default: %(default)s)")
    parser.add_argument("--auto-create", action="store_true", help="rooms need not be created before somebody joins")
    parser.add_argument("--server-name", default="hs.test", help="the homeserver's name (default: %(default)s)")
    parser.add_argument("--generations", default="BC", help="which forms of the management API it has, of ABCD (default: %(default)s)")
    parser.add_argument("--mode", choices=[mode.value for mode in Mode], default="synapse", help="whose answers it gives (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="management requests a second; 0: no limit (default: %(default)s)")
    parser.add_argument("--burst", type=float, default=5.0, help="how many at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")
    for name in ("sfu", "homeserver"):
        parser.add_argument(f"--{name}-port", type=int, default=0, help="0: any free one (default)")
        parser.add_argument(f"--{name}-control-port", type=int, default=0, help="0: any free one (default)")
    return parser


async def run(options: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sfu_model = SfuModel({options.key: options.secret}, options.webhook, seed=options.seed, auto_create=options.auto_create)
    homeserver_model = HomeserverModel(
        options.server_name,
        seed=options.seed,
        generations=options.generations,
        mode=options.mode,
        limit=RateLimit(options.rate, options.burst) if options.rate > 0 else None,
    )
    async with (
        SandboxSfu(sfu_model, port=options.sfu_port, control_port=options.sfu_control_port) as sfu,
        SandboxHomeserver(homeserver_model, port=options.homeserver_port, control_port=options.homeserver_control_port) as homeserver,
    ):
        addresses = {
            "sfu": sfu.url,
            "sfu_control": sfu.control_url,
            "homeserver": homeserver.url,
            "homeserver_control": homeserver.control_url,
        }
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> None:
    """The command."""
    asyncio.run(run(arguments().parse_args()))


if __name__ == "__main__":
    main()
