"""What is remembered of things that others choose the number of: it is bounded, and what was of use least recently goes first."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def keep(kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Remember `value`, and forget the oldest where there are more than `most`. Whoever reads one moves it to the end, if that counts as a use."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)
