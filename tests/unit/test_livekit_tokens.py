"""Verifying and making LiveKit's tokens, held to livekit-api's own verifier."""

import base64
import hashlib
import hmac
import json
import time
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from livekit.api import AccessToken, TokenVerifier, VideoGrants
from sfu_delegate.livekit import tokens
from sfu_delegate.livekit.keys import KeyRing, SfuKey
from sfu_delegate.livekit.tokens import LEEWAY, Access, Refusal, TokenRefused

KEY = SfuKey("main", "devkey", "devsecretdevsecretdevsecretdevsecret")
OTHER = SfuKey("other", "otherkey", "othersecretothersecretothersecret")
KEYS = KeyRing([KEY, OTHER])
NOW = 1_800_000_000.0
VIDEO = {"room": "the room", "roomJoin": True, "canPublish": True}
CLAIMS: dict[str, Any] = {"iss": "devkey", "sub": "alice", "nbf": NOW, "exp": NOW + 300, "video": VIDEO}


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def sign(
    claims: Any, header: Any = None, secret: str = KEY.secret, digest: str = "sha256", payload: bytes | None = None, head: bytes | None = None
) -> str:
    """A token with anything in it, signed properly."""
    head = json.dumps(header if header is not None else {"alg": "HS256", "typ": "JWT"}).encode() if head is None else head
    signed = f"{encode(head)}.{encode(json.dumps(claims).encode() if payload is None else payload)}"
    return f"{signed}.{encode(hmac.digest(secret.encode(), signed.encode(), digest))}"


def refusal(token: str, now: float = NOW) -> Refusal:
    with pytest.raises(TokenRefused) as error:
        tokens.verify(token, KEYS, now)
    assert str(error.value) == error.value.sentence
    assert error.value.sentence.endswith((".", "?"))
    return error.value.reason


def accepted_by_livekit(token: str, key: SfuKey = KEY) -> bool:
    try:
        TokenVerifier(key.key, key.secret).verify(token)
    except Exception:
        return False
    return True


def accepted_by_us(token: str, now: float) -> bool:
    try:
        tokens.verify(token, KEYS, now)
    except TokenRefused:
        return False
    return True


def test_accepts_what_livekit_api_mints() -> None:
    """A token made by livekit-api is verified by its own key, and its claims are returned."""
    token = AccessToken(OTHER.key, OTHER.secret).with_identity("bob").with_grants(VideoGrants(room_join=True, room="r")).with_ttl(timedelta(hours=1))
    key, claims = tokens.verify(token.to_jwt(), KEYS, time.time())
    assert key == OTHER
    assert claims["sub"] == "bob"


def test_leeway_is_livekits() -> None:
    """Clocks may differ by exactly as much as livekit-api allows."""
    assert TokenVerifier("key", "secret")._leeway.total_seconds() == LEEWAY


@pytest.mark.parametrize(
    ("claims", "off_by", "reason"),
    [
        ({"exp": NOW}, LEEWAY - 0.001, None),
        ({"exp": NOW}, LEEWAY, Refusal.EXPIRED),
        ({"exp": NOW + 0.9}, LEEWAY, Refusal.EXPIRED),
        ({"nbf": NOW}, -LEEWAY, None),
        ({"nbf": NOW}, -LEEWAY - 0.001, Refusal.NOT_YET_VALID),
        ({"iat": NOW}, -LEEWAY - 0.001, Refusal.NOT_YET_VALID),
    ],
)
def test_times_hold_to_the_second(claims: dict[str, float], off_by: float, reason: Refusal | None) -> None:
    """A token counts from `nbf` to just before `exp`, give or take the leeway."""
    token = sign({"iss": "devkey", "exp": NOW + 1000, **claims})
    if reason is None:
        tokens.verify(token, KEYS, NOW + off_by)
    else:
        assert refusal(token, NOW + off_by) is reason


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CLAIMS.items() if key != name}


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", Refusal.MISSING),
        ("x", Refusal.MALFORMED),
        ("a.b", Refusal.MALFORMED),
        ("..", Refusal.MALFORMED),
        ("a.b.c.d", Refusal.MALFORMED),
        ("ä.ö.ü", Refusal.MALFORMED),
        ("a" * 20_000, Refusal.MALFORMED),
        (sign([]), Refusal.MALFORMED),
        (sign(None), Refusal.MALFORMED),
        (sign(CLAIMS, payload=b"{"), Refusal.MALFORMED),
        (sign(CLAIMS, payload=b"\xff"), Refusal.MALFORMED),
        (sign(CLAIMS, payload=b"[" * 9000), Refusal.MALFORMED),
        (sign(CLAIMS, payload=b'{"exp":NaN}'), Refusal.MALFORMED),
        (sign(CLAIMS, payload=b'{"iss":"devkey","exp":' + b"9" * 5000 + b"}"), Refusal.MALFORMED),
        (sign(CLAIMS, payload=b'{"iss":"devkey","exp":1e999}'), Refusal.MALFORMED),
        (sign(CLAIMS, head=b"[]"), Refusal.MALFORMED),
        (sign(CLAIMS, {"typ": "JWT"}), Refusal.WRONG_ALGORITHM),
        (sign(CLAIMS, {"alg": "none"}), Refusal.WRONG_ALGORITHM),
        (sign(CLAIMS, {"alg": "hs256"}), Refusal.WRONG_ALGORITHM),
        (sign(CLAIMS, {"alg": ["HS256"]}), Refusal.WRONG_ALGORITHM),
        (sign(CLAIMS, {"alg": "HS512"}, digest="sha512"), Refusal.WRONG_ALGORITHM),
        (sign(CLAIMS, {"alg": "HS256", "crit": ["exp"]}), Refusal.MALFORMED),
        (sign(CLAIMS, {"alg": "HS256", "b64": False}), Refusal.MALFORMED),
        (sign(CLAIMS, {"alg": "HS256", "kid": 1}), Refusal.MALFORMED),
        (sign(without("iss")), Refusal.MALFORMED),
        (sign(CLAIMS | {"iss": ["devkey"]}), Refusal.MALFORMED),
        (sign(CLAIMS | {"iss": "nobody"}), Refusal.UNKNOWN_KEY),
        (sign(CLAIMS | {"iss": "otherkey"}), Refusal.BAD_SIGNATURE),
        (sign(CLAIMS, secret="another"), Refusal.BAD_SIGNATURE),
        (sign(CLAIMS, digest="sha512"), Refusal.BAD_SIGNATURE),
        (sign(CLAIMS).rpartition(".")[0] + ".", Refusal.BAD_SIGNATURE),
        (sign(CLAIMS) + "=", Refusal.BAD_SIGNATURE),
        (sign(without("exp")), Refusal.MALFORMED),
        (sign(CLAIMS | {"exp": None}), Refusal.MALFORMED),
        (sign(CLAIMS | {"exp": True}), Refusal.MALFORMED),
        (sign(CLAIMS | {"exp": str(NOW + 300)}), Refusal.MALFORMED),
        (sign(CLAIMS | {"nbf": "x"}), Refusal.MALFORMED),
        (sign(CLAIMS | {"nbf": None}), Refusal.MALFORMED),
        (sign(CLAIMS | {"iat": []}), Refusal.MALFORMED),
        (sign(CLAIMS | {"sub": 7}), Refusal.MALFORMED),
        (sign(CLAIMS | {"jti": 7}), Refusal.MALFORMED),
        (sign(CLAIMS | {"aud": "somebody else"}), Refusal.MALFORMED),
        (sign(CLAIMS | {"exp": NOW - 100}), Refusal.EXPIRED),
        (sign(CLAIMS | {"nbf": NOW + 100}), Refusal.NOT_YET_VALID),
    ],
)
def test_refuses(token: str, reason: Refusal) -> None:
    """Whatever is wrong with a token, it is refused for that reason."""
    assert refusal(token) is reason


def test_another_spelling_of_the_same_token_is_refused() -> None:
    """Base64url has one canonical form: padding, the standard alphabet, and stray bits in the last character are refused."""
    token = sign(CLAIMS)
    head, payload, signature = token.split(".")
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    sloppy = signature[:-1] + last[last.index(signature[-1]) + 1]
    assert base64.urlsafe_b64decode(sloppy + "=") == base64.urlsafe_b64decode(signature + "=")
    assert refusal(f"{head}.{payload}.{sloppy}") is Refusal.BAD_SIGNATURE
    for junk in ("=", "==", "\n"):
        assert refusal(f"{head}.{payload}{junk}.{signature}") is Refusal.MALFORMED
        assert refusal(f"{head}{junk}.{payload}.{signature}") is Refusal.MALFORMED
    standard = base64.b64encode(b'{"iss":"devkey","exp":1800000300,"x":"???>>>~~~"}').decode().rstrip("=")
    assert set(standard) & set("+/")
    signed = f"{head}.{standard}"
    signature = encode(hmac.digest(KEY.secret.encode(), signed.encode(), "sha256"))
    assert refusal(f"{signed}.{signature}") is Refusal.MALFORMED


def test_no_error_quotes_the_token() -> None:
    """Neither the sentence nor the exception's context shows a piece of the token."""
    secret = "topsecretidentity"
    for token in (
        sign(CLAIMS | {"iss": secret}),
        sign({"iss": secret}, payload=secret.encode()),
        sign(CLAIMS | {"sub": secret, "exp": 1}),
        sign(CLAIMS, {"alg": secret}),
        f"{secret}.{secret}.{secret}",
    ):
        with pytest.raises(TokenRefused) as error:
            tokens.verify(token, KEYS, NOW)
        assert secret not in repr(error.value) + repr(error.value.__context__)


# Seconds from now, with some distance to the leeway's end: livekit-api reads the clock by itself.
OFFSETS = st.one_of(
    st.integers(-(10**6), -65), st.integers(-55, 55), st.integers(65, 10**6), st.floats(-55, 55), st.floats(65, 10**6), st.floats(-(10**6), -65)
)
ODD_TIMES = st.one_of(st.none(), st.just("x"), st.just([]), st.just(0), st.just(-1), st.just(10**30), st.just(float("inf")), st.just(float("nan")))
ABSENT = object()


@st.composite
def token_parts(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Claims, header and secret: good ones, with up to two things changed."""
    now = time.time()
    claims: dict[str, Any] = {"iss": KEY.key, "exp": int(now + 600), "nbf": int(now)}
    header: dict[str, Any] = {"alg": "HS256", "typ": "JWT"}
    secret = KEY.secret
    times = st.one_of(OFFSETS.map(lambda offset: now + offset), OFFSETS.map(lambda offset: int(now + offset)), ODD_TIMES)
    for change in draw(st.sets(st.sampled_from(["exp", "nbf", "iat", "exp", "absent", "iss", "other", "alg", "header", "secret"]), max_size=2)):
        match change:
            case "exp" | "nbf" | "iat":
                claims[change] = draw(times)
            case "absent":
                claims.pop(draw(st.sampled_from(["iss", "exp", "nbf"])))
            case "iss":
                claims["iss"] = draw(st.sampled_from(["nobody", "", "Devkey", 7, None]))
            case "other":
                odd = st.one_of(st.text(max_size=8), st.none(), st.integers())
                claims[draw(st.sampled_from(["sub", "jti", "aud", "name", "sha256"]))] = draw(odd)
            case "alg":
                header["alg"] = draw(st.sampled_from(["none", "HS384", "RS256", "", None]))
            case "header":
                odd_header = st.sampled_from(["x", None, True, False, ["b64"], [], 1])
                header[draw(st.sampled_from(["kid", "crit", "b64", "typ"]))] = draw(odd_header)
            case _:
                secret = OTHER.secret
    return claims, header, secret


@given(token_parts())
@example(({"iss": "devkey", "exp": 4_000_000_000}, {"alg": "HS256"}, KEY.secret))
def test_same_verdict_as_livekit_api(parts: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    """On tokens of every kind, valid, expired, early, odd or signed by somebody else, we and livekit-api agree."""
    claims, header, secret = parts
    token = sign(claims, header, secret)
    ours, theirs = accepted_by_us(token, time.time()), accepted_by_livekit(token)
    # the one difference: livekit-api lets a header speak of unencoded payloads (`b64`, `crit`), which LiveKit's tokens never do
    assert ours == theirs or (theirs and ("b64" in header or "crit" in header))


@given(st.data())
def test_tampering_is_refused_as_by_livekit_api(data: st.DataObject) -> None:
    """A valid token with one character changed, added or removed anywhere is refused; and never accepted where livekit-api refuses."""
    token = sign(CLAIMS | {"nbf": 0, "exp": 4_000_000_000})
    assert accepted_by_us(token, time.time())
    position = data.draw(st.integers(0, len(token)))
    inserted = data.draw(st.text(st.sampled_from("ABab01-_.=+/ \nä"), max_size=2))
    tampered = token[:position] + inserted + token[position + data.draw(st.integers(0, 2)) :]
    if tampered != token:
        assert not accepted_by_us(tampered, time.time())


@given(st.one_of(st.text(), st.binary().map(lambda b: b.decode("latin1")), st.from_regex(r"[\w-]*\.[\w-]*\.[\w-]*", fullmatch=True)))
def test_arbitrary_text_is_refused(token: str) -> None:
    """Nothing that is thrown at the verifier raises anything but a refusal."""
    refusal(token)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=5
)


@given(JSON)
def test_signed_nonsense_is_refused(claims: object) -> None:
    """The holder of a key cannot make the verifier fail either, whatever JSON is signed."""
    for token in (sign(claims), sign({"iss": "devkey", "exp": claims}), sign({"iss": "devkey", "exp": 4e9, "nbf": claims, "aud": claims})):
        try:
            tokens.verify(token, KEYS, NOW)
        except TokenRefused:
            continue
    with pytest.raises(TokenRefused):
        tokens.access(sign(CLAIMS | {"video": claims}), KEYS, NOW)


def test_an_access_token_proves_room_and_identity() -> None:
    """Whoever holds the token that a participant joins with is that participant."""
    assert tokens.access(sign(CLAIMS), KEYS, NOW) == Access("main", "the room", "alice", NOW + 300)


@pytest.mark.parametrize(
    ("claims", "lack"),
    [
        (without("video"), "video"),
        (CLAIMS | {"video": []}, "video"),
        (CLAIMS | {"video": {"room": "r"}}, "roomJoin"),
        (CLAIMS | {"video": {"room": "r", "roomJoin": False}}, "roomJoin"),
        (CLAIMS | {"video": {"room": "r", "roomJoin": "true"}}, "roomJoin"),
        (CLAIMS | {"video": {"room": "r", "roomAdmin": True}}, "roomJoin"),
        (CLAIMS | {"video": {"roomJoin": True}}, "room"),
        (CLAIMS | {"video": {"roomJoin": True, "room": ""}}, "room"),
        (CLAIMS | {"video": {"roomJoin": True, "room": 5}}, "room"),
        (CLAIMS | {"video": {"roomJoin": True, "room": "a\0b"}}, "room"),
        (without("sub"), "sub"),
        (CLAIMS | {"sub": ""}, "sub"),
        (CLAIMS | {"sub": "a\0b"}, "sub"),
        (without("video") | {"sha256": base64.b64encode(hashlib.sha256(b"{}").digest()).decode()}, "video"),
    ],
)
def test_other_tokens_are_not_access_tokens(claims: dict[str, Any], lack: str) -> None:
    """A webhook's token, an API token, or one that leaves the room or the identity open, is refused with what it lacks."""
    with pytest.raises(TokenRefused, match=rf"`{lack}\b") as error:
        tokens.access(sign(claims), KEYS, NOW)
    assert error.value.reason is Refusal.NOT_AN_ACCESS_TOKEN


def test_an_expired_access_token_proves_nothing() -> None:
    """Access is refused for the same reasons as any token."""
    with pytest.raises(TokenRefused) as error:
        tokens.access(sign(CLAIMS | {"exp": NOW - LEEWAY}), KEYS, NOW)
    assert error.value.reason is Refusal.EXPIRED


def test_mints_what_livekit_api_accepts() -> None:
    """Our token for RoomService passes livekit-api's verifier, with the grants for that one room."""
    claims = TokenVerifier(KEY.key, KEY.secret).verify(tokens.mint_admin(KEY, "Zürich + 1", time.time()))
    assert claims.video is not None
    assert (claims.video.room, claims.video.room_admin, claims.video.room_create) == ("Zürich + 1", True, True)
    assert claims.video.room_join is None


def test_minted_tokens_expire_by_the_given_clock() -> None:
    """A token made for a call is valid from the given time, ten minutes, and also where the SFU's clock is behind."""
    token = tokens.mint_admin(KEY, "r", NOW)
    for now in (NOW - 3600, NOW, NOW + 600):
        assert tokens.verify(token, KEYS, now)[0] == KEY
    assert refusal(token, NOW + 700) is Refusal.EXPIRED


def test_minting_takes_the_short_secrets_of_livekits_development_mode() -> None:
    """`livekit-server --dev` has the secret "secret": that is no reason for a warning in every call."""
    key = SfuKey("dev", "devkey", "secret")
    assert tokens.verify(tokens.mint_admin(key, "r", NOW), {"devkey": key}, NOW)[0] == key


def test_mints_access_tokens() -> None:
    """A participant's token that we make is one that we accept."""
    token = tokens.mint(KEY, VideoGrants(room_join=True, room="r"), NOW, 3600, "alice")
    assert tokens.access(token, KEYS, NOW) == Access("main", "r", "alice", NOW + 3600)


def test_a_participant_gets_just_what_it_needs() -> None:
    """Our token to join with passes livekit-api's verifier, and has the grants of MSC4195 and no others."""
    token = tokens.mint_participant(KEY, "Zürich + 1", "@alice:example.org:DEVICE", time.time(), "@alice:example.org")
    claims = TokenVerifier(KEY.key, KEY.secret).verify(token)
    assert claims.identity == "@alice:example.org:DEVICE"
    assert claims.video == VideoGrants(
        room_join=True, room="Zürich + 1", room_create=False, can_publish=True, can_subscribe=True, can_update_own_metadata=True
    )
    assert {claims.name, claims.metadata, claims.sha256} == {""}


def test_a_participants_token_to_the_letter() -> None:
    """`roomCreate: false` is said, since an SFU may create rooms for others; data goes with publishing, as it does for LiveKit if nothing is said."""
    payload = tokens.mint_participant(KEY, "r", "alice", NOW, "@alice:hs.test").split(".")[1]
    assert json.loads(base64.urlsafe_b64decode(payload + "==")) == {
        "iss": KEY.key,
        "sub": "alice",
        "exp": NOW + 3600,
        "matrix_user": "@alice:hs.test",
        "video": {
            "roomJoin": True,
            "room": "r",
            "roomCreate": False,
            "canPublish": True,
            "canPublishData": True,
            "canSubscribe": True,
            "canUpdateOwnMetadata": True,
        },
    }


def test_a_participants_token_counts_for_an_hour() -> None:
    """It proves room and identity to our own verifier until then, by the given clock."""
    token = tokens.mint_participant(KEY, "r", "alice", NOW, "@alice:hs.test")
    for now in (NOW, NOW + 3600):
        assert tokens.access(token, KEYS, now) == Access("main", "r", "alice", NOW + 3600, "@alice:hs.test")
    assert refusal(token, NOW + 3600 + LEEWAY) is Refusal.EXPIRED


@pytest.mark.parametrize("user", [None, 1, ["@alice:hs.test"], {}])
def test_a_claim_of_that_name_that_is_not_ours(user: object) -> None:
    """Somebody else's token service may mean something else by it."""
    assert tokens.access(sign(CLAIMS | {"matrix_user": user}), KEYS, NOW).user is None


def test_each_sfu_has_its_own_tokens() -> None:
    """A token is signed by the key of the SFU that is joined."""
    assert tokens.access(tokens.mint_participant(OTHER, "r", "alice", NOW, "@alice:hs.test"), KEYS, NOW).sfu == "other"
