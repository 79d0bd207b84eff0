"""The configuration: one YAML file, every key of which the environment can override, checked as a whole before anything starts.

All problems are found at once, each with its key, its value and what to do; a secret must never be shown, neither in a problem nor in a repr.
"""

from sfu_delegate.config.example import example
from sfu_delegate.config.loading import from_mapping, load
from sfu_delegate.config.model import (
    EXAMPLE_SECRET,
    Config,
    Cors,
    Delegations,
    DepartureRule,
    Federation,
    Homeserver,
    Limits,
    MatrixRtc,
    Membership,
    Postgresql,
    Restart,
    Section,
    Sfu,
    Timeouts,
)
from sfu_delegate.config.problems import HIDDEN, ConfigInvalid, Problem
from sfu_delegate.config.risks import reloadable_changes, reloaded, warnings
from sfu_delegate.config.values import format_duration, format_size, parse_duration, parse_size

__all__ = [
    "EXAMPLE_SECRET",
    "HIDDEN",
    "Config",
    "ConfigInvalid",
    "Cors",
    "Delegations",
    "DepartureRule",
    "Federation",
    "Homeserver",
    "Limits",
    "MatrixRtc",
    "Membership",
    "Postgresql",
    "Problem",
    "Restart",
    "Section",
    "Sfu",
    "Timeouts",
    "example",
    "format_duration",
    "format_size",
    "from_mapping",
    "load",
    "parse_duration",
    "parse_size",
    "reloadable_changes",
    "reloaded",
    "warnings",
]
