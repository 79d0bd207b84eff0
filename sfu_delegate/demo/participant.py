"""One participant of a real LiveKit server, with LiveKit's own SDK, as a process of its own, so that it can be killed.

`python -m sfu_delegate.demo.participant URL`: the first line of the standard input is the access token, and the end of the input, or a further
line, means: say goodbye. It writes `connected` to the standard error when it is in the call.
"""

import asyncio
import sys

from livekit import rtc


async def take_part(url: str) -> None:
    """Join, publish a silent microphone, and stay until told otherwise or thrown out."""
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    token = (await orders.readline()).decode().strip()
    room = rtc.Room()
    over = asyncio.Event()
    room.on("disconnected", lambda *_: over.set())
    await room.connect(url, token)
    sys.stderr.write("connected\n")
    sys.stderr.flush()
    microphone = rtc.LocalAudioTrack.create_audio_track("microphone", rtc.AudioSource(48_000, 1))
    await room.local_participant.publish_track(microphone)
    waiting = [asyncio.create_task(orders.readline()), asyncio.create_task(over.wait())]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await room.disconnect()


if __name__ == "__main__":
    asyncio.run(take_part(sys.argv[1]))
