"""The commented example of the file, made from the model alone, so that it never says anything else than the model does."""

import textwrap
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import yaml
from pydantic.fields import FieldInfo

from sfu_delegate.config.model import Config, Homeserver, Section, Sfu, type_of
from sfu_delegate.config.values import format_duration
from sfu_delegate.delegation.policy import DEPARTURES, Unasked

_EXAMPLE_HEAD: Final = """\
# The configuration of sfu-delegate.
#
# Only sfus and homeservers are required. Every other key is shown with its default, after a #: remove it to change one.
#
# Durations are numbers with a unit (500ms, 30s, 2m, 1h30m, 7d) or numbers of seconds; sizes likewise (64KiB, 1MiB) or
# numbers of bytes.
#
# Every key can be overridden by an environment variable: SFU_DELEGATE_ and the keys, joined by two underscores:
#   SFU_DELEGATE_LISTEN__PORT=8090
#   SFU_DELEGATE_SFUS__MAIN__URL=wss://sfu.example.org
#   SFU_DELEGATE_HOMESERVERS__0__AS_TOKEN=…
#   SFU_DELEGATE_CORS__ORIGINS='["https://call.example.org"]'      (lists and maps as YAML or JSON; null: not set)
#
# Paths may begin with ${CREDENTIALS_DIRECTORY}/: files that systemd gives to the daemon (LoadCredential=).
#
# `sfu-delegate check-config` finds everything that is wrong here. SIGHUP makes the daemon read this file again; listen,
# admin, database, postgresql, encryption, log.format, timeouts.connect, matrixrtc.enabled, path_prefixes and which SFU
# is the first need a restart.
"""
_EXAMPLE_WIDTH: Final = 118


def example() -> str:
    """The commented example: every key with its description and default; `config/sfu-delegate.yaml` is this text."""
    lines = [_EXAMPLE_HEAD.rstrip("\n")]
    for name, field in Config.model_fields.items():
        lines.append("")
        lines += _comment(field, 0)
        found = type_of(field.annotation, field)
        if name == "sfus":
            lines += ["sfus:", "  main:", *_section(Sfu, 4)]
        elif name == "homeservers":
            first, *rest = _section(Homeserver, 4)
            body = [first, *rest]
            start = next(number for number, line in enumerate(body) if line.startswith("    name:"))
            lines += ["homeservers:", *(line[2:] for line in body[:start]), "  - " + body[start].lstrip(), *body[start + 1 :]]
        elif name == "departures":
            lines.append("departures:")
            for reason, departure in DEPARTURES.items():
                rule: dict[str, str] = {"look_after": format_duration(departure.look_after), "unasked": departure.unasked.value}
                if departure.unasked is Unasked.AFTER:
                    rule["unasked_after"] = format_duration(departure.unasked_after)
                lines.append(f"  #{reason}: {_flow(rule)}")
        elif found.kind == "section":
            lines += [f"{name}:", *_section(found.type, 2)]
        else:
            lines.append(f"#{name}: {_flow(field.default)}")
    return "\n".join(lines) + "\n"


def _section(section: type[Section], indent: int) -> list[str]:
    blank = " " * indent
    defaults = section.model_construct().model_dump(mode="json", warnings=False)
    lines: list[str] = []
    for name, field in section.model_fields.items():
        required = field.is_required() or (section, name) in _EXAMPLE_GIVEN
        lines += _comment(field, indent, sample=not required)
        if required:
            sample = (field.examples or [""])[0]
            if isinstance(sample, dict):
                lines += [f"{blank}{name}:", *(f"{blank}  {key}: {_flow(value)}" for key, value in sample.items())]
            else:
                lines.append(f"{blank}{name}: {_flow(sample)}")
        else:
            line = f"{blank}#{name}: {_flow(defaults[name])}"
            lines += [line] if len(line) <= _EXAMPLE_WIDTH else [f"{blank}#{name}:", *(f"{blank}#  - {_flow(item)}" for item in defaults[name])]
    return lines


# Optional, but shown in use: hardly anybody goes without them.
_EXAMPLE_GIVEN: Final = {(Sfu, "keys"), (Homeserver, "url")}


def _comment(field: FieldInfo, indent: int, *, sample: bool = False) -> list[str]:
    text = field.description or ""
    if sample and field.default in (None, ()) and field.examples:
        one = field.examples[0]
        text += f" For example: {one if isinstance(one, str) else _flow(one)}"
    start = " " * indent + "# "
    return textwrap.wrap(text, _EXAMPLE_WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False)


def _flow(value: Hashable | Mapping[str, Any] | Sequence[Any]) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=100_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
