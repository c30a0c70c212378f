"""What a plan does to the heads of attentions, as rows for people."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from tensorrail_exporter.graphs.head_pairs import find_pairs
from tensorrail_exporter.plans.plan import HeadPlan
from tensorrail_runtime.records import Record
from tensorrail_runtime.tables import Table


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


def heads_table(rows: Sequence[NarrowedHeads]) -> Table:
    """Return the table of narrowed heads."""
    cells = [
        (" and ".join(row.layers), "query and key" if row.scores else "value and output", row.heads, row.before, row.after)
        for row in rows
    ]
    head = ("layers", "what", "heads", "size of a head", "narrowed to")
    return Table("attention heads", head, [tuple(map(str, row)) for row in cells])
