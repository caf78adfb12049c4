"""Reads a flat YAML file of flags; every error is one line that names the file and, where known, the line."""

from pathlib import Path
from typing import Any

import yaml

from ..usage import UsageError


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key that occurs twice; PyYAML alone silently keeps the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                continue
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in ``path``; an empty file is an empty mapping.

    Raises:
        UsageError: The file does not exist, is not text or not YAML, has a key twice, or is not a mapping with text keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            "--config", str(path), "no such file", hint="paths are relative to where the job is started"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("--config", str(path), f"cannot be read: {error}") from None
    try:
        content = yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        hint = "indent with spaces, not tabs" if "\t" in text else ""
        raise UsageError("--config", str(path), f"{line}{error.problem or error}", hint=hint) from None
    except yaml.YAMLError as error:
        raise UsageError("--config", str(path), f"is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(
            "--config", str(path), "is not a list of `key: value` lines", hint="for example `optimizer: muon`"
        )
    return content
