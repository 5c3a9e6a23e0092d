"""YAML of plain values: no tags that make objects, no aliases, no key twice, no file without end."""

from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 20
"""Bytes of a file; a config has a few thousand."""


class _Loader(yaml.SafeLoader):
    """Refuses aliases, by which a few lines become gigabytes, and keys of which one silently wins."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read: write the value out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                twice = f"the key {key.value} stands here a second time"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """What the text says.

    Raises:
        ValueError: it is not YAML, or says more than plain values; a reason without a full stop.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # PyYAML's constructors answer values that they cannot read, such as the date 2001-99-99, with many types of error.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or repr(error)) from None


def read(path: Path) -> Any:
    """What a UTF-8 file says.

    Raises:
        OSError: it cannot be read.
        ValueError: as ``parse``, or it is larger than LARGEST; a reason without a full stop.
    """
    with path.open("rb") as file:  # not by its size, which a pipe or a device does not tell
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    return parse(content.decode("utf-8-sig"))
