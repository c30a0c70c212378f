"""What a plan does to the heads of attentions, as rows for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.graphs.head_pairs import find_pairs
from tensorrail_exporter.graphs.heads import with_heads
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.graphs.rounding import Rewritten, require_rounding
from tensorrail_exporter.plans.plan import HeadPlan
from tensorrail_runtime.records import Record
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session
from tensorrail_runtime.tables import Table

_REWRITTEN = Rewritten("heads of the same size to differ from the dense ones", "leave heads as they are", 1e-3)


class NarrowedHeads(Record):
    """The heads between two layers, before and after."""

    layers: tuple[str, str]  # query and key, or value and output
    scores: bool  # whether they are query and key
    heads: int
    before: int  # values of each head
    after: int


def narrowed_heads(model: onnx.ModelProto, plans: Sequence[HeadPlan]) -> tuple[NarrowedHeads, ...]:
    """Return what a plan does to the heads of a dense model that it fits.

    Args:
        model: the dense model.
        plans: the pairs with the new size of their heads.

    """
    found = {pair.names: pair for pair in find_pairs(model).found} if plans else {}
    return tuple(
        NarrowedHeads(layers=pair.names, scores=pair.scores, heads=pair.heads, before=pair.size, after=plan.size)
        for plan in plans
        if (pair := found.get(plan.weights)) is not None
    )


def heads_error(
    dense: Path,
    model: onnx.ModelProto,
    plans: Sequence[HeadPlan],
    feeds: Sequence[Mapping[str, np.ndarray]],
    settings: Session | None = None,
) -> float:
    """Return how far the outputs are from the dense ones when the heads of a plan are written anew at their full size.

    That is rounding alone, unless the graph computes something else from the heads than was understood.

    Args:
        dense: the file of the dense model.
        model: the same model.
        plans: the pairs whose heads get another size.
        feeds: batches of inputs by name.
        settings: how both run; default: the CPU provider.

    Raises:
        GraphError: the outputs differ by more than rounding.
        ModelError: a model does not run, or the outputs cannot be compared.

    """
    sizes = {row.layers: row.before for row in narrowed_heads(model, plans)}
    with scratch() as folder:
        path = Path(folder) / "full.onnx"
        save_model(with_heads(model, sizes), path)
        return require_rounding(dense, path, feeds, _REWRITTEN, settings)


def heads_table(rows: Sequence[NarrowedHeads]) -> Table:
    """Return the table of narrowed heads."""
    cells = [
        (" and ".join(row.layers), "query and key" if row.scores else "value and output", row.heads, row.before, row.after)
        for row in rows
    ]
    head = ("layers", "what", "heads", "size of a head", "narrowed to")
    return Table("attention heads", head, [tuple(map(str, row)) for row in cells])
