"""The text of a YAML file to plain data and the lines of its keys, or to what is wrong with it.

It must never quote what it could not read, which may be a secret, nor be kept busy by a small text that stands for an endless one.
"""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import yaml

from sfu_delegate.config.problems import HIDDEN, KeyPath, Problem, dotted

MOST_NODES: Final = 100_000  # values in a file, those behind aliases counted each time


class _TooLarge(Exception):
    """There are more values than a configuration can have."""


class _Nothing:
    """The file could not be parsed."""


NOTHING: Final = _Nothing()
"""What `ParsedYaml.data` is where the text could not be parsed."""


class ParsedYaml(NamedTuple):
    """What a text holds, the line of each key in it, and what is wrong with it."""

    data: object
    lines: dict[KeyPath, int]
    problems: list[Problem]


class _Loader(yaml.SafeLoader):
    """YAML without dates: a secret or a name that looks like one stays a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> ParsedYaml:
    """Read a text; never raises."""
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return ParsedYaml(None, {}, [])
            _index(node, (), lines, problems, frozenset(), iter(range(MOST_NODES)))
            return ParsedYaml(loader.construct_document(node), lines, problems)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # PyYAML quotes what it stumbled over, which may be part of a secret.
        said = (error.problem or "it cannot be read").replace(r"character '\t'", "a tab")
        said = re.sub(r"(['\"])(?![<\[{,:?\]}>-])[^'\"]{2,}\1", HIDDEN, said)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = Problem("", "", f"is not YAML: {said}", "check the indentation (spaces, no tabs), quotes and colons there", where)
    except _TooLarge:
        problem = Problem("", "", f"has more than {MOST_NODES} values", "write it without aliases (*) of aliases")
    except RecursionError:
        problem = Problem("", "", "is nested too deeply", "write it as in the example-config")
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError):
        # What PyYAML raises for characters that are not allowed, and for values that contradict their tag (`!!int x`).
        problem = Problem("", "", "is not YAML that can be read", "remove control characters and tags (words that begin with !)")
    return ParsedYaml(NOTHING, lines, [*problems, problem])


def _index(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem], above: frozenset[int], left: Iterator[int]) -> None:
    """Note the line of each key, and report keys that are there twice, of which YAML silently takes the last.

    Raises _TooLarge when there is no number `left`: a few aliases (*) of aliases make a small file an endless one.
    """
    if next(left, None) is None:
        raise _TooLarge
    if id(node) in above:
        return
    above |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode) or name.value == "<<":
                continue
            line = name.start_mark.line + 1
            inner = (*path, name.value)
            if name.value in seen:
                problems.append(Problem(dotted(inner), "", f"is there twice, first in line {seen[name.value]}", "keep one of them", f"line {line}"))
            seen.setdefault(name.value, line)
            lines[inner] = line
            _index(value, inner, lines, problems, above, left)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*path, number)] = value.start_mark.line + 1
            _index(value, (*path, number), lines, problems, above, left)
