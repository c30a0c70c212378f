"""What onnxscript keeps private and the export needs. Tested with onnxscript 0.7.2."""

from __future__ import annotations

from typing import Any


def simplification_rules() -> tuple[Any, ...]:  # Any: rewrite rules, whose class onnxscript does not annotate
    """Return the rewrite rules that remove operations without effect and turn computed Reshape shapes into constants."""
    from onnxscript.rewriter.rules.common import _materialize_reshape_shape, _no_op

    return (*_no_op.rules, *_materialize_reshape_shape.rules)
