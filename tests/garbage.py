"""What would be in memory until the next garbage collection."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from sfu_delegate.api.errors import MatrixError


@contextmanager
def left_for_the_collector(of: str) -> Iterator[list[object]]:
    """What is done within leaves these errors, and these texts and bytes in which `of` is, until a garbage collection."""
    found: list[object] = []
    enabled, flags = gc.isenabled(), gc.get_debug()
    gc.collect()
    gc.freeze()  # all that there is by now need not be gone through
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += [left for left in gc.garbage if isinstance(left, MatrixError)]
        found += [held for left in gc.garbage for held in gc.get_referents(left) if isinstance(held, bytes | bytearray | str) and of in str(held)]
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.unfreeze()
        if enabled:
            gc.enable()
