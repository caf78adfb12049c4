"""Dataclasses of settings as dictionaries and JSON texts, and back."""

import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Self

import torch


class SerializationMixin:
    """Adds conversion to dictionaries and JSON texts to a dataclass whose fields are plain values or dtypes."""

    def to_dict(self) -> dict[str, Any]:
        """Field → value; dtypes by name (``"bfloat16"``), all other values as they are."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The object with these values; fields that are left out keep their defaults.

        A key that is no field is left out with a warning that names it, so that files of other versions can be read.
        """
        known = inspect.signature(cls).parameters
        if strange := [key for key in data if key not in known]:
            near = [match for key in strange for match in get_close_matches(key, known, n=1)]
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            warnings.warn(
                f"{cls.__name__} has no {', '.join(strange)}, which is left out; it has {', '.join(known)}.{hint}",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in data.items() if key in known})

    def to_json(self) -> str:
        """:meth:`to_dict` as a JSON text.

        Raises:
            TypeError: for a field that JSON cannot hold, such as a function; names the field.
        """
        values = self.to_dict()
        for name, value in values.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise TypeError(
                    f"{type(self).__name__}.{name} is {value!r}, which JSON cannot hold; use to_dict, or leave the field empty "
                    f"and set it after from_json."
                ) from error
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, json_str: str) -> Self:
        """:meth:`from_dict` of a JSON text.

        Raises:
            ValueError: for a text that is not one JSON object.
        """
        data = json.loads(json_str)
        if not isinstance(data, dict):
            raise ValueError(
                f"the text holds a {type(data).__name__}; give one object, {{...}}, with the fields of {cls.__name__}."
            )
        return cls.from_dict(data)
