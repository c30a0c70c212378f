"""Exact changes: layers that read the same input as one layer, and a file without the shapes of inner tensors.

ONNX Runtime fuses an Add and the LayerNormalization behind it into SkipLayerNormalization, but only where it knows the shapes
of both; exporters write these into the file. On CPUs the fused operator can take longer than the two: a MiniLM ran 1.11 times
faster without (ONNX Runtime 1.31, batch 1, one thread). So both changes are tried, alone and together, and the network that
layers are then replaced in is the one that is measured to be fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import onnx

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.graphs.joint import Joint, joint_groups, rounding_error, with_joint, without_inner_shapes
from tensorrail_exporter.search.targets import Search
from tensorrail_exporter.search.verification import Verification
from tensorrail_runtime.errors import GraphError, ModelError, PlanError
from tensorrail_runtime.measure.latency import bench
from tensorrail_runtime.progress import Progress
from tensorrail_runtime.sessions.session import open_session

_SHARE = 0.25  # of the seconds for timing a network, for each variant
_WORTH = 1.02  # times faster, at least: a change for less may be one of the machine
_STAGE = "trying exact changes"


@dataclass(frozen=True)
class Exact:
    """Changes of a network that lose nothing."""

    joint: tuple[Joint, ...] = ()
    """Groups of layers that become one."""
    inner_shapes: bool = True
    """Whether the file states the shapes of inner tensors."""

    def of(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a model with these changes; the model itself if there are none."""
        joined = with_joint(model, self.joint)
        return joined if self.inner_shapes else without_inner_shapes(joined)


def fastest_exact(verification: Verification, search: Search, folder: Path, progress: Progress) -> Exact:
    """Return the changes with which the network is measured to be fastest; none where it is not faster for any.

    Args:
        verification: the dense model, and how networks are timed.
        search: whether layers are joined, and which ones stay as they are.
        folder: for the files that are compared.
        progress: told what is done.

    Raises:
        PlanError: joint layers are asked for, and no layers of the model can become one.

    """
    variants = _variants(verification.model, search)
    if len(variants) == 1:
        return variants[0]  # joint layers are compared with the dense ones where the network is written
    progress(_STAGE, 0.0)
    settings = verification.settings
    kept, paths = [], []
    for number, variant in enumerate(variants):
        plain, path = folder / f"exact{number}.onnx", folder / f"variant{number}.onnx"
        try:
            if number:
                save_model(variant.of(verification.model), plain)
                rounding_error(verification.unchanged, plain, verification.feeds, settings.exact)
            verification.write(with_joint(verification.model, variant.joint), path, inner_shapes=variant.inner_shapes)
            if number:
                open_session(path, settings=settings)
        except (ModelError, GraphError):  # it differs, or cannot be compared or run
            if not number:
                return variant
            continue
        kept.append(variant)
        paths.append(path)
    ratios = bench(paths, verification.timing_for(_SHARE * len(paths)), settings).ratios if len(paths) > 1 else ()
    place, best = max(enumerate(ratios, 1), key=lambda pair: pair[1].value, default=(0, None))
    faster = best is not None and best.low > 1.0 and best.value >= _WORTH
    progress(_STAGE, 1.0, f"{best.value:.2f}× faster" if best is not None and faster else "none is faster")
    return kept[place if faster else 0]


def _variants(model: onnx.ModelProto, search: Search) -> list[Exact]:
    """Return what is tried, the least changes first."""
    groups = () if search.joint is False else joint_groups(model, search.keeps)
    if search.joint and not groups:
        raise PlanError("joint layers are asked for, but no layers of this model that may change read the same input")
    joint: list[tuple[Joint, ...]] = [groups] if search.joint else [(), groups] if groups else [()]
    known = any(dim.HasField("dim_value") for value in model.graph.value_info for dim in value.type.tensor_type.shape.dim)
    shapes = [True, False] if known else [True]
    return [Exact(*pair) for pair in product(joint, shapes)]
