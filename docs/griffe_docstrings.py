"""What the reference shows of docstrings beyond their text: examples as code, and the fields of records with their comments."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LINES = re.compile(r"(?:^>>> .*(?:\n|$))+", re.MULTILINE)
_FLAG = re.compile(r"\s*# doctest: \+SKIP")
_RECORDS = {"BaseModel", "Part", "Record"}


class Docstrings(griffe.Extension):
    """Lines of `>>>`, which Markdown takes for quotations, become a block; so do the fields of pydantic's records."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object in place."""
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = _LINES.sub(_block, obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the fields of a record to its docstring, as its source says them."""
        if cls.docstring is None or not {str(base).rpartition(".")[2] for base in cls.bases} & _RECORDS:
            return
        fields = [
            one.source
            for name, one in cls.members.items()
            if one.is_attribute and not name.startswith("_") and name != "model_config" and "property" not in one.labels
        ]
        if fields:
            cls.docstring.value += "\n\n```python\n" + "\n".join(fields) + "\n```\n"


def _block(found: re.Match[str]) -> str:
    return "```pycon\n" + _FLAG.sub("", found[0]).rstrip("\n") + "\n```\n"
