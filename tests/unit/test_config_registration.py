"""An application service's registration is read with care, judged by what the daemon needs, and made so that Synapse takes it."""

import os
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from sfu_delegate.config import HIDDEN, Config, ConfigInvalid, Problem, from_mapping, load, warnings
from sfu_delegate.config.registration import IS_JOINED, PROXY_PREFIX, NotARegistration, Registration, judge, make, parse

AS_TOKEN = "hunter2-as-hunter2-as-hunter2-as-hunter2"
HS_TOKEN = "hunter2-hs-hunter2-hs-hunter2-hs-hunter2"
NAME = "example.org"
URL = "http://127.0.0.1:8080"
GOOD = make(NAME, AS_TOKEN, HS_TOKEN, URL)


def changed(**changes: Any) -> Registration:
    """A good registration with other values; None takes a key away."""
    said: dict[str, Any] = {**yaml.safe_load(GOOD), **{key.replace("__", "."): value for key, value in changes.items()}}
    return parse(yaml.safe_dump({key: value for key, value in said.items() if value is not None or key == "url"}))


# ── made ──


@pytest.mark.parametrize("name", ["example.org", "matrix-1.example.org:8448", "[2001:db8::1]:8448", "192.0.2.7"])
def test_what_is_made_is_read_again_and_good(name: str) -> None:
    """Tokens and URL survive, whatever YAML would make of them, and nothing is to be said against it."""
    for as_token, hs_token in ((AS_TOKEN, HS_TOKEN), ("1" * 64, "0x" + "e" * 62), ("'\"#:{}[]!&*%@`", "~"), ("null", "-")):
        made = parse(make(name, as_token, hs_token, "http://[::1]:8080"))
        assert (made.as_token, made.hs_token, made.proxy_url, made.proxy_prefix) == (as_token, hs_token, "http://[::1]:8080", PROXY_PREFIX)
        assert (made.id, made.foreign_keys) == ("sfu-delegate", ())
        assert list(judge(made, name)) == []


def test_the_users_of_the_server_and_no_others_are_in_the_namespace() -> None:
    """Neither a longer name nor one that differs where the dot is."""
    [users] = yaml.safe_load(GOOD)["namespaces"]["users"]
    assert users == {"exclusive": False, "regex": r"@.*:example\.org$"}
    assert re.match(users["regex"], "@al.ice=2f:example.org")
    for other in ("@alice:example.org.evil", "@alice:exampleXorg", "@alice:example.org:8448", "alice"):
        assert not re.match(users["regex"], other)


def test_it_says_what_it_is_and_that_it_is_secret() -> None:
    """Comments at the top, for whoever finds the file."""
    head = GOOD.partition("\nid:")[0]
    for part in ("sfu-delegate appservice", NAME, "SECRETS", "registration_file", "app_service_config_files"):
        assert part in head


def test_synapse_takes_it(tmp_path: Path) -> None:
    """The homeserver's own loader finds in it all that it was made for."""
    pytest.importorskip("synapse")
    from synapse.config.appservice import load_appservices

    path = tmp_path / "registration.yaml"
    path.write_text(GOOD)
    [service] = load_appservices(NAME, [str(path)])
    assert (service.token, service.hs_token, service.url) == (AS_TOKEN, HS_TOKEN, None)
    assert (service.proxy_prefix, service.proxy_url, service.scopes) == (PROXY_PREFIX, URL, {IS_JOINED})
    assert not service.is_rate_limited()
    assert service.is_user_in_namespace(f"@alice:{NAME}")
    assert not service.is_exclusive_user(f"@alice:{NAME}")


# ── read ──


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must have keys with values"),
        (f"- {AS_TOKEN}", "must have keys with values"),
        (f"as_token: {AS_TOKEN}\nhs_token: [{HS_TOKEN}", "is not YAML"),
        (f"as_token: {AS_TOKEN}\n", "it has no hs_token"),
        (f"hs_token: {AS_TOKEN}\n", "it has no as_token"),
        (f"{AS_TOKEN}: 1\n{AS_TOKEN}: 2\n", "has a key that is there twice (line 2)"),
        (f"as_token: {AS_TOKEN}\nhs_token: 12345\n", "has an hs_token that is not a text"),
        (f"as_token: ''\nhs_token: {HS_TOKEN}\n", "has an as_token that is empty"),
        (f"as_token: '{AS_TOKEN} x'\nhs_token: {HS_TOKEN}\n", "has an as_token with a space in it"),
        (f'as_token: {AS_TOKEN}\nhs_token: "{HS_TOKEN}\\u200b"\n', "has an hs_token with a character that cannot be seen in it"),
        (f"as_token: {AS_TOKEN}é\nhs_token: {HS_TOKEN}\n", "has an as_token that cannot be sent"),
        (f"as_token: {AS_TOKEN}\x00", "is not YAML"),
    ],
)
def test_what_is_no_registration_is_refused_and_not_quoted(text: str, said: str) -> None:
    """The reason is given, and nothing of the file."""
    with pytest.raises(NotARegistration) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_no_token_is_in_a_repr() -> None:
    """A registration can be logged by mistake without harm."""
    assert "hunter2" not in repr(parse(GOOD))


# ── judged ──


@pytest.mark.parametrize(
    ("changes", "said", "remedy"),
    [
        ({"rate_limited": True}, "rate_limited: false", "false"),
        ({"rate_limited": None}, "rate_limited: false", "false"),
        ({"url": URL}, "every event of every room", "url: null"),
        ({"namespaces": {"users": []}}, "no namespace that the users of example.org are in", r"'@.*:example\.org$'"),
        ({"namespaces": {"users": [{"exclusive": False, "regex": r"@.*:other\.org"}]}}, "no namespace", r"'@.*:example\.org$'"),
        ({"namespaces": {"users": [{"exclusive": False, "regex": "(("}]}}, "no namespace", r"'@.*:example\.org$'"),
        ({"namespaces": "users"}, "no namespace", r"'@.*:example\.org$'"),
        ({"namespaces": {"users": [{"exclusive": True, "regex": r"@.*:example\.org"}]}}, "nobody register", "exclusive: false"),
        ({"io__element__msc4512__proxy_prefix": "rtc"}, "cannot reach the daemon through the homeserver", "appservice"),
        ({"io__element__msc4512__proxy_prefix": None}, "no io.element.msc4512.proxy_prefix, and Synapse does not start", "appservice"),
        ({"io__element__msc4512__proxy_url": None}, "no io.element.msc4512.proxy_url, and Synapse does not start", "appservice"),
        (
            {"io__element__msc4512__proxy_prefix": None, "io__element__msc4512__proxy_url": None},
            "cannot reach the daemon through the homeserver",
            "appservice",
        ),
        ({"io__element__msc4502__scopes": None}, "memberships cannot be checked", IS_JOINED),
        ({"io__element__msc4502__scopes": ["x"]}, "memberships cannot be checked", IS_JOINED),
        ({"io__element__msc4502__scopes": IS_JOINED}, "memberships cannot be checked", IS_JOINED),
        ({"id": None}, "has no id", "appservice"),
        ({"sender_localpart": None}, "has no sender_localpart", "appservice"),
    ],
)
def test_what_will_not_do_what_people_expect_is_named(changes: dict[str, Any], said: str, remedy: str) -> None:
    """One thing that is amiss is one warning, with what to do."""
    [(problem, what_to_do)] = judge(changed(**changes), NAME)
    assert said in problem
    assert remedy in what_to_do
    assert "hunter2" not in problem + what_to_do


def test_a_url_that_is_left_out_is_named() -> None:
    """Synapse wants it to be there, though it be null."""
    [(problem, _)] = judge(parse(GOOD.replace("url: null\n", "", 1)), NAME)
    assert "has no url" in problem


def test_the_stable_names_of_the_proxy_will_do() -> None:
    """As they will be once the proposal is part of the specification."""
    without = {"io__element__msc4512__proxy_prefix": None, "io__element__msc4512__proxy_url": None}
    assert list(judge(changed(**without, proxy_prefix=f"{PROXY_PREFIX}/", proxy_url=URL), NAME)) == []


# ── in the configuration ──


def data(*homeservers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    sfu = {"url": "wss://sfu.example.org", "keys": {"APIone": "hunter2" * 8}}
    return {"sfus": {"main": sfu}, "homeservers": list(homeservers), **changes}


def written(path: Path, text: str = GOOD, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def problems_of(given: dict[str, Any]) -> dict[str, Problem]:
    with pytest.raises(ConfigInvalid) as caught:
        from_mapping(given)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    return {problem.key: problem for problem in caught.value.problems}


def tokens_of(config: Config) -> list[tuple[str | None, str | None]]:
    return [
        (h.as_token.get_secret_value() if h.as_token else None, h.hs_token.get_secret_value() if h.hs_token else None) for h in config.homeservers
    ]


def test_both_tokens_come_from_the_registration(tmp_path: Path) -> None:
    """Whatever they come from, they end in the same place, and the keys that they come from are told."""
    path = written(tmp_path / "registration.yaml")
    config = from_mapping(data({"name": NAME, "registration_file": path}, {"name": "b.org", "as_token": "x" * 32, "hs_token": "y" * 32}))
    assert tokens_of(config) == [(AS_TOKEN, HS_TOKEN), ("x" * 32, "y" * 32)]
    assert [(h.token_key, h.hs_token_key) for h in config.homeservers] == [("registration_file",) * 2, ("as_token", "hs_token")]
    assert warnings(config) == []
    assert config.shown()["homeservers"][0]["hs_token"] == HIDDEN
    assert "hunter2" not in repr(config) + str(config.shown()) + config.model_dump_json()


def test_a_registration_and_tokens_beside_it_are_a_problem_for_each(tmp_path: Path) -> None:
    """Both keys are named, and nothing else is wrong because of it."""
    token = written(tmp_path / "token", AS_TOKEN)
    given = {"as_token": AS_TOKEN, "as_token_file": token, "hs_token": HS_TOKEN, "hs_token_file": token}
    for key, value in given.items():
        found = problems_of(data({"name": NAME, "registration_file": written(tmp_path / "r.yaml"), key: value}))
        assert list(found) == [f"homeservers[0].{key}"]
        assert "registration_file as well" in found[f"homeservers[0].{key}"].problem


def test_an_hs_token_in_two_places_is_a_problem(tmp_path: Path) -> None:
    """As an as_token is."""
    token = written(tmp_path / "token", HS_TOKEN)
    found = problems_of(data({"name": NAME, "as_token": AS_TOKEN, "hs_token": HS_TOKEN, "hs_token_file": token}))
    assert list(found) == ["homeservers[0].hs_token"]
    assert "hs_token_file as well" in found["homeservers[0].hs_token"].problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "keys with values"),
        ("as_token: [", "is not YAML"),
        (f"as_token: {AS_TOKEN}", "no hs_token"),
        (f"as_token: {AS_TOKEN}\nhs_token: é", "sent"),
    ],
)
def test_a_file_that_is_no_registration_is_a_problem(text: str, said: str, tmp_path: Path) -> None:
    """It is named, with what to do, and not quoted."""
    path = written(tmp_path / "registration.yaml", text)
    [(key, problem)] = problems_of(data({"name": NAME, "registration_file": path})).items()
    assert (key, problem.value) == ("homeservers[0].registration_file", path)
    assert said in problem.problem
    assert "make one with `sfu-delegate appservice`" in problem.remedy


def test_a_registration_that_is_not_there_can_be_made(tmp_path: Path) -> None:
    """The remedy is the command; and only that command can do without the file."""
    missing = {"name": NAME, "registration_file": str(tmp_path / "registration.yaml")}
    [problem] = problems_of(data(missing)).values()
    assert "sfu-delegate appservice --config FILE" in problem.remedy
    config = from_mapping(data(missing, {"name": "b.org", "as_token": AS_TOKEN}), registrations_needed=False)
    assert tokens_of(config) == [(None, None), (AS_TOKEN, None)]
    with pytest.raises(ConfigInvalid, match="is not a registration"):
        from_mapping(data({"name": NAME, "registration_file": written(tmp_path / "empty", "")}), registrations_needed=False)
    path = tmp_path / "delegate.yaml"
    path.write_text(yaml.safe_dump(data(missing)))
    assert tokens_of(load(path, registrations_needed=False)) == [(None, None)]
    with pytest.raises(ConfigInvalid, match="is not there"):
        load(path)


def test_a_registration_that_cannot_be_read_is_not_called_missing(tmp_path: Path) -> None:
    """A pipe is there, and nobody waits for it."""
    os.mkfifo(tmp_path / "pipe")
    for needed in (True, False):
        with pytest.raises(ConfigInvalid, match="it is a pipe"):
            from_mapping(data({"name": NAME, "registration_file": str(tmp_path / "pipe")}), registrations_needed=needed)


def test_a_pattern_has_no_registration(tmp_path: Path) -> None:
    """It vouches for the users of one server; that its tokens may leak is not said on top of it."""
    path = written(tmp_path / "registration.yaml")
    [(key, problem)] = problems_of(data({"name": "*.example.org", "registration_file": path})).items()
    assert (key, problem.value) == ("homeservers[0].registration_file", path)
    assert "vouches for the users of one server" in problem.problem


def test_no_two_homeservers_share_a_registration(tmp_path: Path) -> None:
    """Neither the file, even before it is there, nor what is in it."""
    one, two = (written(tmp_path / name) for name in ("one", "two"))
    for files in ((one, one), (one, two), ("/nonexistent", "/nonexistent")):
        servers = [{"name": name, "registration_file": file} for name, file in zip(("a.org", "b.org"), files, strict=True)]
        with pytest.raises(ConfigInvalid) as caught:
            from_mapping(data(*servers), registrations_needed=False)
        [problem] = caught.value.problems
        assert (problem.key, problem.value) == ("homeservers[1].registration_file", files[1])
        assert "also that of homeservers[0]" in problem.problem


def test_the_two_tokens_of_a_registration_differ(tmp_path: Path) -> None:
    """Who is sent the one must not be able to pose as the other."""
    [problem] = problems_of(data({"name": NAME, "registration_file": written(tmp_path / "r.yaml", make(NAME, AS_TOKEN, AS_TOKEN, URL))})).values()
    assert "the same as the as_token" in problem.problem


def test_what_a_registration_lacks_is_warned_of(tmp_path: Path) -> None:
    """What `judge` finds, weak tokens, and a file that everybody can read."""
    text = make("other.org", "short", "put-the-token-here-put-the-token-here", URL).replace("rate_limited: false", "rate_limited: true")
    found = warnings(from_mapping(data({"name": NAME, "registration_file": written(tmp_path / "r.yaml", text, 0o644)})))
    assert {warning.key for warning in found} == {"homeservers[0].registration_file"}
    for part in ("every user of this machine", "rate_limited", "no namespace", "its as_token is short", "its hs_token is a placeholder"):
        assert sum(part in warning.problem for warning in found) == 1, part


@pytest.mark.parametrize(
    ("proxy_url", "listen", "said"),
    [
        (URL, {}, ""),
        ("http://localhost:9999", {"port": 9999}, ""),
        ("http://127.0.0.1:9999", {}, "its proxy_url is http://127.0.0.1:9999, and the daemon listens on 127.0.0.1:8080"),
        ("http://[::1]:9999", {"host": "::1"}, "its proxy_url is http://[::1]:9999, and the daemon listens on [::1]:8080"),
        ("http://localhost", {}, "its proxy_url is http://localhost:80, and"),
        ("http://hunter2:hunter2@localhost/hunter2", {}, "its proxy_url is http://localhost:80, and"),
        ("http://10.0.0.7:9999", {}, ""),
        ("http://127.0.0.1:9999", {"port": 0}, ""),
        ("http://127.0.0.1:99999", {}, ""),
        ("hunter2", {}, ""),
    ],
)
def test_requests_that_go_to_another_port_of_this_machine_are_warned_of(proxy_url: str, listen: dict[str, Any], said: str, tmp_path: Path) -> None:
    """A proxy may listen there; elsewhere than here nothing can be told."""
    path = written(tmp_path / "r.yaml", make(NAME, AS_TOKEN, HS_TOKEN, proxy_url))
    found = warnings(from_mapping(data({"name": NAME, "registration_file": path}, listen=listen)))
    assert [(warning.key, warning.value) for warning in found] == [("homeservers[0].registration_file", path)] * bool(said)
    for warning in found:
        assert said in warning.problem
        assert "fine if a proxy listens there; otherwise `sfu-delegate appservice` writes it anew" in warning.remedy
        assert "hunter2" not in str(warning)


def test_one_half_of_the_proxy_keeps_synapse_from_starting(tmp_path: Path) -> None:
    """What is said of it is so: both or none."""
    pytest.importorskip("synapse")
    from synapse.config.appservice import load_appservices

    path = tmp_path / "registration.yaml"
    prefix, url = f"io.element.msc4512.proxy_prefix: {PROXY_PREFIX}\n", f"io.element.msc4512.proxy_url: {URL}\n"
    path.write_text(GOOD.replace(prefix, "").replace(url, ""))
    assert load_appservices(NAME, [str(path)])[0].proxy_url is None
    for half in (prefix, url):
        path.write_text(GOOD.replace(half, ""))
        with pytest.raises(KeyError, match="set together"):
            load_appservices(NAME, [str(path)])


def test_the_readmes_tokens_are_placeholders(tmp_path: Path) -> None:
    """Who copies its registration is told that everybody knows its tokens."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    as_token, hs_token = re.findall(r"^[ah]s_token: (\S+)", readme, re.MULTILINE)
    text = make(NAME, as_token, hs_token, URL)
    problems = [warning.problem for warning in warnings(from_mapping(data({"name": NAME, "registration_file": written(tmp_path / "r.yaml", text)})))]
    assert problems == ["its as_token is a placeholder, no token", "its hs_token is a placeholder, no token"]


def test_tokens_in_a_configuration_that_everybody_can_read_are_warned_of(tmp_path: Path) -> None:
    """Each by its key; not what comes from a file."""
    path = tmp_path / "delegate.yaml"
    hs_token = written(tmp_path / "hs", HS_TOKEN)
    for tokens, named in (
        ({"as_token": AS_TOKEN, "hs_token": HS_TOKEN}, "sfus.main.keys, homeservers[0].as_token, homeservers[0].hs_token"),
        ({"as_token": AS_TOKEN, "hs_token_file": hs_token}, "sfus.main.keys, homeservers[0].as_token"),
        ({"registration_file": written(tmp_path / "r.yaml")}, "sfus.main.keys"),
    ):
        path.write_text(yaml.safe_dump(data({"name": NAME, **tokens})))
        path.chmod(0o644)
        assert [warning.problem for warning in warnings(load(path))] == [f"holds secrets ({named}) and every user of this machine may read it"]


def test_enforcing_membership_is_no_use_without_an_application_service(tmp_path: Path) -> None:
    """It is said once no homeserver can tell, and not where one might."""
    enforced = {"membership": {"enforce": True}}
    assert [warning.key for warning in warnings(from_mapping(data({"name": NAME}, **enforced)))] == ["membership.enforce"]
    assert warnings(from_mapping(data({"name": NAME, "registration_file": written(tmp_path / "r.yaml")}, **enforced))) == []
    with pytest.raises(ConfigInvalid) as caught:
        from_mapping(data({"name": NAME, "registration_file": "/nonexistent"}, **enforced))
    assert caught.value.warnings == ()
    assert from_mapping(data({"name": NAME})).membership.enforce is False
    assert from_mapping(data({"name": NAME})).membership.interval == 300.0
