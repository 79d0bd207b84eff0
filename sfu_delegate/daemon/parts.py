"""From the configuration to what each part that asks somebody takes: homeservers, federation, SFUs. Nothing here opens or asks anything."""

import ssl

from sfu_delegate.config import Config
from sfu_delegate.daemon.actions import Sfu
from sfu_delegate.livekit.keys import SfuKey
from sfu_delegate.livekit.room_service import SfuAddress
from sfu_delegate.matrix.discovery import HomeserverRule, Homeservers, trusting
from sfu_delegate.matrix.federation import OF_A_STRANGER, Terms


def named(config: Config) -> list[str]:
    """The homeservers that the configuration names, without the patterns."""
    return [homeserver.name.lower() for homeserver in config.homeservers if "*" not in homeserver.name]


def services(config: Config) -> dict[str, bool]:
    """The homeservers with an application service, and whether they are to pass requests on."""
    return {one.name.lower(): one.hs_token is not None for one in config.homeservers if one.as_token is not None and "*" not in one.name}


def rules(config: Config) -> list[HomeserverRule]:
    """Which homeservers are served, and how they are reached."""
    return [
        HomeserverRule(
            pattern=homeserver.name,
            url=homeserver.url,
            as_token=homeserver.as_token.get_secret_value() if homeserver.as_token else None,
            ca_file=str(homeserver.ca_file) if homeserver.ca_file else None,
            allow_private=homeserver.allow_private_addresses,
            federation_url=homeserver.federation_url,
            hs_token=homeserver.hs_token.get_secret_value() if homeserver.hs_token else None,
            max_in_flight=homeserver.in_flight,
            limited=homeserver.rate_limited,
        )
        for homeserver in config.homeservers
    ]


def federation_tls(config: Config) -> ssl.SSLContext | None:
    """What is trusted of servers that the configuration does not name; of all servers where nothing is verified. None: the system's authorities.

    Raises ValueError where the file cannot be used.
    """
    federation = config.federation
    if federation.verify_tls and federation.ca_file is None:
        return None
    try:
        context = trusting(federation.ca_file)
    except ValueError as error:
        raise ValueError(f"federation.ca_file {error}") from None
    if not federation.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def federation_terms(config: Config, homeservers: Homeservers, tls: ssl.SSLContext | None, name: str) -> Terms:
    """How the federation API of a homeserver is reached; `tls` is what `federation_tls` gave."""
    rule, federation = homeservers.rule_for(name), config.federation
    if rule is None:
        return Terms(allow_private=federation.allow_private_addresses, ssl=tls, stranger=True)
    context = homeservers.ssl_for(rule) if federation.verify_tls else tls
    stranger = rule.anybodys and rule.federation_url is None
    places = min(rule.max_in_flight, OF_A_STRANGER) if stranger else rule.max_in_flight
    return Terms(rule.federation_url, rule.allow_private, context, places, stranger)


def keys(config: Config) -> list[SfuKey]:
    """By which webhooks and access tokens are verified."""
    return [SfuKey(name, key, secret.get_secret_value()) for name, sfu in config.sfus.items() for key, secret in sfu.keys.items()]


def sfus(config: Config) -> dict[str, Sfu]:
    """How the SFUs are asked, by name."""
    found = {}
    for name, sfu in config.sfus.items():
        key = sfu.api_key or next(iter(sfu.keys))
        found[name] = Sfu(SfuAddress(name, sfu.url, key, sfu.keys[key].get_secret_value()), sfu.request_timeout)
    return found
