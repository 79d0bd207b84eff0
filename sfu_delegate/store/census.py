"""What is counted once at the start, and now and then where instances share the database."""

from dataclasses import dataclass, field

from sfu_delegate.store.base import KnownHomeserver, KnownSfu


@dataclass
class StoreCensus:
    """See `base.Census`."""

    states: dict[tuple[str, str, str], int] = field(default_factory=dict)
    schedule: dict[str, float] = field(default_factory=dict)
    rooms: dict[str, float] = field(default_factory=dict)
    load: dict[str, float] = field(default_factory=dict)
    homeservers: list[KnownHomeserver] = field(default_factory=list)
    sfus: list[KnownSfu] = field(default_factory=list)
