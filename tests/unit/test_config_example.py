"""The example in the repository is what the model says, and removing its #s changes nothing."""

import re
from pathlib import Path
from typing import Any

import yaml
from sfu_delegate.config import Config, DepartureRule, Homeserver, Section, Sfu, example, format_duration, from_mapping, load
from sfu_delegate.delegation.policy import DEPARTURES
from sfu_delegate.sealing import new_key

FILE = Path(__file__).parents[2] / "config" / "sfu-delegate.yaml"


def uncommented(text: str) -> dict[str, Any]:
    """The example with every default made active."""
    data: dict[str, Any] = yaml.safe_load(re.sub(r"(?m)^( *)#(\w+:|  - )", r"\1\2", text))
    return data


def test_the_file_is_the_models() -> None:
    """After a change of the model: `sfu-delegate example-config > config/sfu-delegate.yaml`."""
    assert FILE.read_text() == example()


def test_the_file_can_be_used() -> None:
    """It loads as it is, and all of its defaults are the model's."""
    config = load(FILE)
    required = {"sfus": yaml.safe_load(example())["sfus"], "homeservers": yaml.safe_load(example())["homeservers"]}
    assert config.model_dump() == from_mapping(required).model_dump()


def test_the_defaults_in_the_file_are_the_models() -> None:
    """With every # removed the configuration is the same."""
    text = example()
    assert from_mapping(uncommented(text)).model_dump() == from_mapping(yaml.safe_load(text)).model_dump()


def test_the_defaults_in_the_file_are_good_for_postgresql_but_for_what_depends_on_it() -> None:
    """Lease and timeout are those of SQLite, and their comments say what they are with PostgreSQL; nothing else differs."""
    postgresql = {"database": "postgresql:///x", "encryption": {"keys": [new_key()]}}
    text = example()
    written, left_out = (from_mapping({**data, **postgresql}).model_dump() for data in (uncommented(text), yaml.safe_load(text)))
    assert {
        (section, key) for section, keys in written.items() if keys != left_out[section] for key in keys if keys[key] != left_out[section][key]
    } == {
        ("actions", "lease"),
        ("timeouts", "request"),
    }
    assert text.count("With PostgreSQL the default is") == 2
    for section, key in (("actions", "lease"), ("timeouts", "request")):
        model = type(getattr(Config.model_construct(), section))
        assert model.model_fields[key].description.endswith(f"With PostgreSQL the default is {format_duration(left_out[section][key])}.")


def keys_of(section: type[Section]) -> set[str]:
    return set(section.model_fields)


def test_every_key_is_in_the_file() -> None:
    """No section lacks a key of the model."""
    data = uncommented(example())
    assert set(data) == keys_of(Config)
    assert set(data["sfus"]["main"]) == keys_of(Sfu)
    assert set(data["homeservers"][0]) == keys_of(Homeserver)
    assert list(data["departures"]) == list(DEPARTURES)
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            assert set(data[name]) == keys_of(field.annotation), name


def test_every_key_has_a_comment() -> None:
    """Each key of each section is described."""
    sections = [Config, Sfu, Homeserver, DepartureRule, *(f.annotation for f in Config.model_fields.values())]
    for section in sections:
        if isinstance(section, type) and issubclass(section, Section):
            for name, field in section.model_fields.items():
                assert field.description, (section, name)


def test_lines_are_short() -> None:
    """The file can be read in an ordinary terminal."""
    assert max(map(len, example().splitlines())) <= 120
