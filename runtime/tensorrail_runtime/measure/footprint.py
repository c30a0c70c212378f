"""What a model takes beside time: load time and peak memory, each measured in a fresh process of its own."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path

from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.fresh import fresh
from tensorrail_runtime.sessions.inputs import Shapes, random_inputs
from tensorrail_runtime.sessions.session import Session

_RUNS = 3


class Footprint(Record):
    """Load time in milliseconds, memory in MiB above that of the process without the model."""

    model: str
    load_ms: float
    host_peak_mib: float | None  # None where the system does not tell
    gpu_mib: int | None  # None on the CPU


def footprint(path: Path | str, *, settings: Session | None = None, batch: int = 1, shapes: Shapes | None = None) -> Footprint:
    """Open the model in a fresh process, run it three times, and return what that took.

    Dynamic axes are set by `shapes`, or else to `batch`.
    """
    request = {
        "path": str(path),
        "batch": batch,
        "settings": asdict(settings or Session()),
        "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
    }
    return Footprint.model_validate_json(fresh("tensorrail_runtime.measure.footprint:measure", request))


def measure(request: dict[str, object]) -> str:
    """Measure in this process, and return the record as JSON."""
    from tensorrail_runtime.sessions.machine import gpu_memory_used
    from tensorrail_runtime.sessions.session import open_session, run

    settings = Session(**request["settings"])  # type: ignore[arg-type] # made by `asdict` above
    on_gpu = settings.on_gpu
    before, gpu_before = _peak_mib(), gpu_memory_used() if on_gpu else None
    start = time.perf_counter()
    session = open_session(str(request["path"]), settings=settings)
    load_ms = 1e3 * (time.perf_counter() - start)
    feed = random_inputs(session, int(str(request["batch"])), shapes=request["shapes"])  # type: ignore[arg-type] # likewise
    for _ in range(_RUNS):
        run(session, feed)
    after, gpu_after = _peak_mib(), gpu_memory_used() if on_gpu else None
    found = Footprint(
        model=Path(str(request["path"])).name,
        load_ms=load_ms,
        host_peak_mib=None if before is None or after is None else after - before,
        gpu_mib=None if gpu_before is None or gpu_after is None else gpu_after - gpu_before,
    )
    return found.model_dump_json()


def _peak_mib() -> float | None:
    """Return the largest memory that this process had, None where the system does not tell.

    Linux's getrusage counts what the process had before it became this program, which is its parent's: /proc does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
