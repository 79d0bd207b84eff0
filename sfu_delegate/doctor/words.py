"""Numbers as people say them."""

from collections.abc import Sequence


def spoken(seconds: float) -> str:
    """A duration: `3 ms`, `2.5 s`, `8 min 15 s`, `1 h 5 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.00995 else f"{seconds * 1000:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        minutes, rest, units = whole // 60, whole % 60, ("min", "s")
    elif whole < 2 * 86_400:
        minutes, rest, units = whole // 3600, whole % 3600 // 60, ("h", "min")
    else:
        minutes, rest, units = whole // 86_400, whole % 86_400 // 3600, ("d", "h")
    return f"{minutes} {units[0]} {rest} {units[1]}" if rest else f"{minutes} {units[0]}"


def in_bytes(count: float) -> str:
    """An amount of data: `2.4 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def counted(count: int, one: str, several: str = "") -> str:
    """`1 webhook`, `2 webhooks`."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else ""
