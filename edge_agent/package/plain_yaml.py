"""Reads YAML of a package: plain values of bounded number, and no anchors, which can expand a small file into a huge
document."""

from __future__ import annotations

from typing import Any

from edge_agent.errors import PolicyError

_MAX_NODES = 50_000
_MAX_NUMBER_CHARACTERS = 100
"""`1:1:1:…` is a number to YAML, to the base of 60, and takes time with the square of its length."""


def load(data: bytes, name: str) -> object:
    """Parses one document.

    Args:
        name: the file's, for messages.

    Raises:
        PolicyError: it is not plain YAML.
    """
    import yaml  # type: ignore[import-untyped]  # takes 10 ms, so only when a package is checked

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
        """Safe YAML of bounded size, without anchors."""

        nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.nodes += 1
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise PolicyError(f"{name} has YAML anchors or aliases")
            if self.nodes > _MAX_NODES:
                raise PolicyError(f"{name} has more than {_MAX_NODES} values")
            return super().compose_node(parent, index)

        def construct_scalar(self, node: Any) -> Any:
            is_number = node.tag.endswith((":int", ":float"))
            if is_number and len(node.value) > _MAX_NUMBER_CHARACTERS:
                raise PolicyError(f"{name} has a number of {len(node.value)} characters")
            return super().construct_scalar(node)

    try:
        return yaml.load(data, Loader=PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PolicyError(f"{name} is not YAML ({type(error).__name__})") from error
