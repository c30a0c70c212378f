"""Measures the load time and the memory of a model, in a fresh process."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path

from tensorrail_runtime.records import Record
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.fresh import fresh
from tensorrail_runtime.sessions.inputs import Shapes, random_inputs
from tensorrail_runtime.sessions.kernels import Contents, contents_of, remember
from tensorrail_runtime.sessions.session import Session
from tensorrail_runtime.sessions.values import Values, load_values, save_values

_RUNS = 3  # memory is allocated in the first runs


class Footprint(Record):
    """The load time in milliseconds and the memory in MiB, above that of the process without the model."""

    model: str
    load_ms: float
    host_peak_mib: float | None  # None where the system does not report it
    gpu_mib: int | None  # None on the CPU


def footprint(
    path: Path | str,
    *,
    settings: Session | None = None,
    batch: int = 1,
    shapes: Shapes | None = None,
    values: Values | None = None,
) -> Footprint:
    """Measure the load time and the memory of a model, which runs three times in a fresh process.

    Args:
        path: the ONNX file.
        settings: the options of the session.
        batch: the size of dynamic axes that `shapes` does not set.
        shapes: shapes of inputs, by name.
        values: known values of inputs by name, in place of random ones.

    Returns:
        The load time and the memory of host and GPU.

    Raises:
        ModelError: the model cannot be loaded or run.

    """
    request: dict[str, object] = {
        "path": str(path),
        "contents": asdict(contents_of(path)),  # or the process would import onnx, whose memory would count as the model's
        "batch": batch,
        "settings": asdict(settings or Session()),
        "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
    }
    with scratch() as folder:
        if values:
            request["values"] = save_values(values, Path(folder))
        return Footprint.model_validate_json(fresh("tensorrail_runtime.measure.footprint:measure", request, [path]))


def measure(request: dict[str, object]) -> str:
    """Measure in this process and return the record as JSON; `footprint` calls it in a fresh process."""
    from tensorrail_runtime.sessions.machine import gpu_memory_used
    from tensorrail_runtime.sessions.session import open_session, run

    settings = Session(**request["settings"])  # type: ignore[arg-type] # made by `asdict` above
    on_gpu = settings.on_gpu
    remember(str(request["path"]), Contents(**request["contents"]))  # type: ignore[arg-type] # likewise
    before, gpu_before = peak_mib(), gpu_memory_used() if on_gpu else None
    start = time.perf_counter()
    session = open_session(str(request["path"]), settings=settings)
    load_ms = 1e3 * (time.perf_counter() - start)
    known = load_values(request.get("values"))  # type: ignore[arg-type] # likewise
    feed = random_inputs(session, int(str(request["batch"])), shapes=request["shapes"], values=known)  # type: ignore[arg-type] # likewise
    for _ in range(_RUNS):
        run(session, feed)
    after, gpu_after = peak_mib(), gpu_memory_used() if on_gpu else None
    measured = Footprint(
        model=Path(str(request["path"])).name,
        load_ms=load_ms,
        host_peak_mib=None if before is None or after is None else after - before,
        gpu_mib=None if gpu_before is None or gpu_after is None else gpu_after - gpu_before,
    )
    return measured.model_dump_json()


def peak_mib() -> float | None:
    """Return the peak memory of this process in MiB; None where the system does not report it.

    On Linux, getrusage also counts the memory of the parent process before exec; /proc does not.
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
