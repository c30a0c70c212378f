"""The one place that opens ONNX Runtime sessions, and refuses one that runs elsewhere than asked."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError, first_line
from tensorrail_runtime.sessions.float16 import holds_fp16

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
MOST_THREADS = 4096
SEARCHES = ("exhaustive", "heuristic", "default")


@dataclass(frozen=True)
class Session:
    """How a session runs. TF32 is off unless asked for: it changes results in the fourth digit.

    `threads` is the number of intra-op threads, 0 for ONNX Runtime's own choice. `cuda_graph`, `nhwc` and `conv_search` are of
    the CUDA provider; the last says how it chooses cuDNN's algorithm for a convolution: by trying all (`exhaustive`, ONNX
    Runtime's own choice), by cuDNN's `heuristic`, or its `default` one. `arena` is the CPU's memory pool. With `linger` off,
    threads stop waiting for work as soon as a run has ended: where several sessions take turns, the waiting threads of one
    would otherwise take cores from the next.
    """

    provider: str = "cpu"
    threads: int = 0
    level: str = "all"
    tf32: bool = False
    cuda_graph: bool = False
    nhwc: bool = False
    conv_search: str = SEARCHES[0]
    arena: bool = True
    linger: bool = True

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU: what is timed then has its inputs and outputs there, for copies are not the network's."""
        return self.provider != "cpu"

    @property
    def exact(self) -> Session:
        """The same for outputs that are compared: without TF32, and without a graph, which takes one shape alone."""
        return replace(self, tf32=False, cuda_graph=False)

    def check(self) -> None:
        """Raise `ModelError` for a provider or level that is unknown, or an option that the provider does not have."""
        if self.provider not in PROVIDERS:
            raise ModelError(f"unknown provider {self.provider!r}: expected one of {', '.join(PROVIDERS)}")
        if self.level not in LEVELS:
            raise ModelError(f"unknown graph optimization level {self.level!r}: expected one of {', '.join(LEVELS)}")
        if self.conv_search not in SEARCHES:
            raise ModelError(f"unknown conv_search {self.conv_search!r}: expected one of {', '.join(SEARCHES)}")
        if not 0 <= self.threads <= MOST_THREADS:
            raise ModelError(f"expected 0 (ONNX Runtime's own choice) to {MOST_THREADS} threads, got {self.threads}")
        if not self.on_gpu and (self.cuda_graph or self.nhwc or self.tf32):
            raise ModelError("CUDA graphs, NHWC and TF32 need the CUDA provider: use provider 'cuda'")
        if self.provider == "tensorrt" and (self.nhwc or self.tf32):
            raise ModelError(
                "NHWC and TF32 can be set for the CUDA provider only: TensorRT chooses layouts by itself, and uses TF32 unless "
                "NVIDIA_TF32_OVERRIDE=0 is in the environment"
            )
        if self.provider != "cuda" and self.conv_search != SEARCHES[0]:
            raise ModelError(f"a {self.conv_search} search needs the CUDA provider: use provider 'cuda'")


def open_session(
    path: Path | str,
    *,
    provider: str = "cpu",
    threads: int = 0,
    settings: Session | None = None,
    optimized: Path | str | None = None,
    profile: Path | str | None = None,
) -> ort.InferenceSession:
    """Open a model; `ModelError` when it is no model or does not run on the provider asked for, with the reason given.

    `settings` says all there is to say, `provider` and `threads` the most common two. `optimized` names a file for the graph
    as ONNX Runtime runs it, `profile` a prefix for its profile.
    """
    settings = settings or Session(provider=provider, threads=threads)
    settings.check()
    name = PROVIDERS[settings.provider]
    if name not in ort.get_available_providers():
        raise ModelError(
            f"provider {settings.provider!r} is not available: this ONNX Runtime has {ort.get_available_providers()}"
        )
    options = ort.SessionOptions()
    # On the CPU all that it logs is in its exceptions too; on a GPU the reason of a fallback stands in the log alone.
    options.log_severity_level = 3 if settings.on_gpu else 4
    options.intra_op_num_threads = settings.threads
    options.graph_optimization_level = LEVELS[settings.level]
    options.enable_cpu_mem_arena = settings.arena
    if not settings.linger:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    # In fp16 ONNX Runtime 1.31 fuses Transpose(1, 0, 2) → MatMul on the CPU in a way that ends the process.
    left_out = ["MatmulTransposeFusion"] if not settings.on_gpu and holds_fp16(path) else []
    with _native_errors(quiet=not settings.on_gpu) as said:
        if settings.on_gpu:
            _preload()
        try:
            session = ort.InferenceSession(
                str(path), options, providers=[_entry(settings)], enable_fallback=0, disabled_optimizers=left_out
            )
        except Exception as error:  # noqa: BLE001 - ONNX Runtime raises a dozen unrelated classes from its C++ side
            raise ModelError(f"{path}: ONNX Runtime cannot load it ({first_line(error)})") from None
    if session.get_providers()[0] != name:
        reason = said() or "ONNX Runtime gave no reason"
        raise ModelError(f"{path}: expected {name}, but ONNX Runtime fell back to {session.get_providers()[0]}: {reason}")
    return session


def run(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a session once and return its outputs by name; `ModelError` names an input that does not fit."""
    wanted = [entry.name for entry in session.get_inputs()]
    if set(wanted) != set(inputs):
        raise ModelError(f"expected inputs {', '.join(wanted) or 'none'}, got {', '.join(inputs) or 'none'}")
    names = [entry.name for entry in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:  # noqa: BLE001 - as above
        lines = " ".join(str(error).split())  # which input and axis it is stands behind the first line
        raise ModelError(f"ONNX Runtime cannot run the model on these inputs ({lines[:_SAID]})") from None


def require_tensors(path: Path | str, session: ort.InferenceSession) -> None:
    """Raise `ModelError` for an output that is no tensor, such as a sequence: nothing can be compared or scored there."""
    for entry in session.get_outputs():
        if not entry.type.startswith("tensor("):
            raise ModelError(f"{path}: output {entry.name!r} has type {entry.type}: only tensors can be compared or scored")


_SAID = 400  # letters of what ONNX Runtime says


def _entry(settings: Session) -> str | tuple[str, dict[str, str]]:
    flags = {"use_tf32": settings.tf32, "enable_cuda_graph": settings.cuda_graph, "prefer_nhwc": settings.nhwc}
    match settings.provider:
        case "cuda":
            options = {key: str(int(value)) for key, value in flags.items()}
            return PROVIDERS["cuda"], options | {"cudnn_conv_algo_search": settings.conv_search.upper()}
        case "tensorrt":
            return PROVIDERS["tensorrt"], {"trt_cuda_graph_enable": str(int(settings.cuda_graph))}
    return PROVIDERS[settings.provider]


def _preload() -> None:
    """Load CUDA's libraries from where pip puts them, when ONNX Runtime can and they are there; it prints what it misses.

    By itself it looks beside its own package alone; torch, which brings them, may be installed in another folder.
    """
    if not hasattr(ort, "preload_dlls"):
        return
    own = Path(ort.__file__).resolve().parents[1]
    others = [path for path in map(Path, sys.path) if (path / "nvidia").is_dir() and path.resolve() != own]
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
        for libraries in (found for path in others for found in sorted((path / "nvidia").glob("*/lib"))):
            ort.preload_dlls(directory=str(libraries.resolve()))


@contextlib.contextmanager
def _native_errors(quiet: bool) -> Iterator[Callable[[], str]]:
    """Catch what ONNX Runtime's C++ side writes to stderr, and yield a function that returns its first error.

    That is the only place where it says why a provider could not be had.
    """
    if quiet:
        yield lambda: ""
        return
    sys.stderr.flush()
    text = ""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: _reason(text)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")


def _reason(text: str) -> str:
    """Return the message of the first error line, without colours, time and source position."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line for line in plain.splitlines() if "[E:" in line or "rror" in line or "ailed" in line]
    if not lines:
        return ""
    return re.sub(r"^.*(\[ONNXRuntimeError\] : \d+ : \w+ : |\[E:[^\]]*\]\s*)", "", lines[0]).strip()
