"""YAML that a stranger may have written: no objects, no key twice, and no more than is there.

Aliases and merge keys can stand for exponentially more than they take to write, so a document is
measured before anything is made of it. A merge key's values give way to those beside it.
"""

from collections.abc import Sequence
from typing import Any

import yaml

MAX_BYTES = 16 << 20
MAX_NODES = 500_000
"""Keys and values, aliases written out."""

SEPARATORS = "\n,:[{-?"
"""Each value but the first takes one of them at least."""

SMALL = 2000
"""Characters of a wrong document that is parsed again in Python, whose messages show the place."""

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MERGE = "tag:yaml.org,2002:merge"


def load_yaml(text: str) -> Any:
    """The value of a document. Raises ValueError with what is wrong and where."""
    try:
        _bound(text)
        root = _compose(text)
        if root is None:
            return None
        if _measure(root, {}) > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES} values")
        return yaml.SafeLoader("").construct_document(root)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def line_of(text: str, path: Sequence[str]) -> int | None:
    """The line, from 1, of the key at a path of a document that was loaded, or of the last one on
    the way to it that is there; None where not even the first is."""
    node, line = _compose(text), None
    for part in path:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            found = (node.value[int(part)],) * 2
        if found is None:
            break
        line = found[0].start_mark.line + 1
        node = found[1]
    return line


def _bound(text: str) -> None:
    """Raises ValueError for more values than are read, before anything is kept of them: a node
    takes a hundred times what it takes to write."""
    if sum(map(text.count, SEPARATORS)) < MAX_NODES:
        return
    events = yaml.parse(text, Loader=LOADER)
    nodes = (event for event in events if isinstance(event, yaml.NodeEvent))
    if any(number > MAX_NODES for number, _ in enumerate(nodes, 1)):
        raise ValueError(f"it holds more than {MAX_NODES} values")


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=LOADER)
    except yaml.YAMLError:
        if len(text) > SMALL:
            raise
        return yaml.compose(text, Loader=yaml.SafeLoader)


def _measure(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes that this one stands for. Raises for a key given twice, and for a node in itself."""
    size = known.get(id(node))
    if size is not None:
        if not size:
            raise _error("a value is part of itself", node)
        return size
    known[id(node)] = 0
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_measure(item, known) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in keys and key.tag != MERGE:
                raise _error(f"key {key.value!r} appears twice", key)
            keys.add(name)
            size += _measure(key, known) + _measure(value, known)
    known[id(node)] = size
    return size


def _error(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)
