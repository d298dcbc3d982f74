"""YAML as plain data: no tag runs code, and no file of some lines becomes gigabytes."""

from __future__ import annotations

from typing import Any

import yaml

MERGE = 'tag:yaml.org,2002:merge'
MOST = 1_000_000  # values of a file, each alias counted as what it stands for

_Loader: Any = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)


class PlainLoader(_Loader):
    """PyYAML's safe loader, which refuses files whose aliases would multiply.

    An alias that stands for ten others, and so on, needs no memory when it is read, but all of it when it is printed.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The root of the document.

        Raises:
            yaml.YAMLError: if it is malformed, holds itself, or more than MOST values.
        """
        node = super().get_single_node()
        if node is not None and _count(node, {}) > MOST:
            raise yaml.YAMLError(f'it holds more than {MOST} values, with what its aliases stand for')
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping.

        Raises:
            yaml.YAMLError: if a key is given twice: the last one would win without a word.
        """
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
        made = super().construct_mapping(node, deep)
        if len({*keys}) < len(keys):
            raise yaml.YAMLError(f'a key is given twice, among {", ".join(map(str, keys[:8]))}')
        return made


# As MMEngine writes a config's tuples.
PlainLoader.add_constructor(
    'tag:yaml.org,2002:python/tuple', lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)


def load_yaml(text: str) -> Any:
    """The content of a YAML file.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: if it is not one, or more than data.
    """
    return yaml.load(text, PlainLoader)


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """How many values a node holds. `counts` has the known ones, and None for those that are being counted."""
    if id(node) in counts:
        known = counts[id(node)]
        if known is None:
            raise yaml.YAMLError('an alias in it stands for something that holds it')
        return known
    counts[id(node)] = None
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    counts[id(node)] = total = 1 + sum(_count(part, counts) for part in inner)
    return total
