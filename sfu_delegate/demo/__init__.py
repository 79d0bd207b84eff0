"""`sfu-delegate demo`: the main job on real parts, live in the terminal.

The daemon runs as a process of its own, beside a real Synapse (or the sandbox's stand-in) and a real livekit-server where there is one (else the
sandbox's). Everything is on loopback and in one temporary directory, and nothing of it outlives the demonstration.
"""

import sys


def run(*, synapse: bool, seconds: float | None, plain: bool) -> int:
    """Play it, and return the exit code: 0 only if everything was as it must be, 130 when it was interrupted.

    `seconds`: about how long from the first join to the end; by default long enough for the whole story.
    """
    from sfu_delegate.demo.show import show
    from sfu_delegate.demo.story import LENGTH
    from sfu_delegate.demo.synapse import installed

    if synapse and not installed():
        sys.stderr.write(
            "The demonstration uses a real Synapse, and the package matrix-synapse is not installed here. Either run it with a stand-in "
            "homeserver:\n  sfu-delegate demo --no-synapse\nor, in a checkout of the source, install Synapse too:\n"
            "  make demo\nor, into an environment of your own:\n  pip install '.[demo]'\n"
        )
        return 1
    return show(synapse=synapse, length=LENGTH if seconds is None else seconds, plain=plain)
