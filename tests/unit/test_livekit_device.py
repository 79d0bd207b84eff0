"""The device in the state key of a call membership."""

import pytest
from sfu_delegate.livekit.names import device_in

ALICE = "@alice:example.org"


@pytest.mark.parametrize(
    ("state_key", "device"),
    [
        ("_@alice:example.org_DEVICE_m.call", "DEVICE"),
        ("_@alice:example.org_DEV_ICE_m.call", "DEV_ICE"),
        ("@alice:example.org_DEVICE", "DEVICE"),
        ("_@alice:example.org__m.call", None),
        ("@alice:example.org", None),
        ("_@bob:example.org_DEVICE_m.call", None),
        ("_@alice:example.org:8448_DEVICE_m.call", None),
        ("x@alice:example.org_DEVICE", None),
        ("@alice:example.org_8448:DEVICE", None),
        ("@alice:example.org_DEV\0ICE", None),
        ("@alice:example.org_DEV\ud800ICE", None),
        ("", None),
        (None, None),
    ],
)
def test_the_device_in_a_state_key(state_key: str | None, device: str | None) -> None:
    """As deployed clients write it, for this user; whatever could not be a device is none."""
    assert device_in(state_key, ALICE) == device
