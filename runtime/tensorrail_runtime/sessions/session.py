"""Opens ONNX Runtime sessions; a session that would run on another provider than the one asked for is an error."""

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
from tensorrail_runtime.records import require_utf8
from tensorrail_runtime.sessions.kernels import Contents, contents_of
from tensorrail_runtime.sessions.values import Drawn, native

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
    """Options of a session.

    Attributes:
        provider: "cpu", "cuda" or "tensorrt".
        threads: the number of intra-op threads; 0 lets ONNX Runtime choose.
        level: the graph optimization level: "none", "basic", "extended" or "all".
        tf32: whether the CUDA provider uses TF32, which changes results in the fourth digit.
        cuda_graph: whether runs are captured in a CUDA graph and replayed; it needs IO binding and fixed shapes.
        nhwc: whether the CUDA provider runs convolutions with the channels last.
        conv_search: how the CUDA provider chooses cuDNN's algorithm for a convolution: "exhaustive" tries all (ONNX Runtime's
            default), "heuristic" asks cuDNN, "default" takes a fixed one.
        arena: whether the CPU's memory arena is used.
        linger: whether threads keep waiting for work after a run. Turn it off where runs of several sessions are interleaved:
            the waiting threads of one session would take cores from the next.

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
        """Whether the session runs on a GPU."""
        return self.provider != "cpu"

    @property
    def exact(self) -> Session:
        """The same options for comparing outputs: without TF32, and without a CUDA graph, which allows only one shape."""
        return replace(self, tf32=False, cuda_graph=False)

    @property
    def is_plain(self) -> bool:
        """Whether a provider and a number of threads are its only settings; `linger` does not count."""
        return replace(self, linger=True) == Session(provider=self.provider, threads=self.threads)

    def check(self) -> None:
        """Raise `ModelError` for an unknown value, or an option that the provider does not have."""
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
    """Open an ONNX model in an ONNX Runtime session.

    Args:
        path: the ONNX file.
        provider: "cpu", "cuda" or "tensorrt"; ignored with `settings`.
        threads: the number of intra-op threads, 0 for ONNX Runtime's choice; ignored with `settings`.
        settings: all options of the session.
        optimized: a file to which ONNX Runtime writes the graph as it runs it, with the weights in another one beside it.
        profile: a prefix for the file of ONNX Runtime's profile; without it nothing is profiled.

    Returns:
        The session, which runs on the provider that was asked for.

    Raises:
        ModelError: the file is not a model that ONNX Runtime can load, the options do not fit together, ONNX Runtime would run
            the model on another provider, or would end the process when it runs; the message has the reason.

    """
    settings = settings or Session(provider=provider, threads=threads)
    settings.check()
    require_utf8(path)
    name = PROVIDERS[settings.provider]
    if name not in ort.get_available_providers():
        raise ModelError(
            f"provider {settings.provider!r} is not available: this ONNX Runtime has {ort.get_available_providers()}"
        )
    options = ort.SessionOptions()
    # On the CPU all that ONNX Runtime logs is in its exceptions; on a GPU only the log has the reason of a fallback.
    options.log_severity_level = 3 if settings.on_gpu else 4
    options.intra_op_num_threads = settings.threads
    options.graph_optimization_level = LEVELS[settings.level]
    options.enable_cpu_mem_arena = settings.arena
    if not settings.linger:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(_OPTIMIZED_WEIGHTS, f"{Path(optimized).name}.data")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    contents = Contents() if settings.on_gpu else contents_of(path)
    if contents.crashing is not None:
        raise ModelError(
            f"{path}: node {contents.crashing!r} is a com.microsoft.Attention without a bias, on which ONNX Runtime's CPU "
            "kernel ends the process: add a bias of zeros as its third input"
        )
    # On the CPU, ONNX Runtime 1.31 fuses Transpose(1, 0, 2) → MatMul in fp16 in a way that crashes the process.
    disabled = ["MatmulTransposeFusion"] if contents.fp16 else []
    with _native_errors(quiet=not settings.on_gpu) as first_error:
        if settings.on_gpu:
            _preload()
        try:
            session = ort.InferenceSession(
                str(path), options, providers=_entries(settings), enable_fallback=0, disabled_optimizers=disabled
            )
        except Exception as error:  # noqa: BLE001 - ONNX Runtime raises a dozen unrelated classes from its C++ side
            if not Path(path).exists():
                raise ModelError(f"{path}: cannot be read (No such file or directory): expected an ONNX model") from None
            raise ModelError(f"{path}: ONNX Runtime cannot load it ({first_line(error)})") from None
    if session.get_providers()[0] != name:
        reason = first_error() or "ONNX Runtime gave no reason"
        raise ModelError(
            f"{path}: expected {name}, but ONNX Runtime fell back to {session.get_providers()[0]}: {reason}; "
            "install what is missing, or choose provider cpu"
        )
    return session


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put the name of a model before each `ModelError` that is raised inside, so that one of several models is told apart."""
    try:
        yield
    except ModelError as error:
        temporary = any(part.startswith("tensorrail-") for part in Path(path).parts[:-1])
        name = Path(path).name if temporary else str(path)  # of a copy only the name is known to the user
        if str(error).startswith(name):
            raise
        raise type(error)(f"{name}: {error}") from error.__cause__


def run(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a session once.

    Args:
        session: a session of the model.
        inputs: one array for each input, by name.

    Returns:
        The outputs, by name.

    Raises:
        ModelError: the inputs do not fit the model, or it fails on them; the message has ONNX Runtime's reason.

    """
    expected = [entry.name for entry in session.get_inputs()]
    if set(expected) != set(inputs):
        raise ModelError(f"expected inputs {', '.join(expected) or 'none'}, got {', '.join(inputs) or 'none'}")
    names = [entry.name for entry in session.get_outputs()]
    try:
        # ONNX Runtime reads the bytes of an array in another byte order as if they were in this machine's.
        feed = {name: native(array) if isinstance(array, np.ndarray) else array for name, array in inputs.items()}
        return dict(zip(names, session.run(names, feed), strict=True))
    except Exception as error:  # noqa: BLE001 - as above
        lines = " ".join(str(error).split())  # the input and the axis are named after the first line
        hint = inputs.hint if isinstance(inputs, Drawn) else ""
        raise ModelError(f"ONNX Runtime cannot run the model on these inputs ({lines[:_MESSAGE_LENGTH]}){hint}") from None


def require_tensors(path: Path | str, session: ort.InferenceSession) -> None:
    """Raise `ModelError` for an output that is not a tensor, such as a sequence: it cannot be compared or scored."""
    for entry in session.get_outputs():
        if not entry.type.startswith("tensor("):
            raise ModelError(f"{path}: output {entry.name!r} has type {entry.type}: only tensors can be compared or scored")


_OPTIMIZED_WEIGHTS = "session.optimized_model_external_initializers_file_name"
_MESSAGE_LENGTH = 400  # characters of ONNX Runtime's message that an error repeats


def _entries(settings: Session) -> list[str | tuple[str, dict[str, str]]]:
    """Return the providers in their order; what TensorRT does not take runs on CUDA, as where Triton serves the model."""
    flags = {"use_tf32": settings.tf32, "enable_cuda_graph": settings.cuda_graph, "prefer_nhwc": settings.nhwc}
    match settings.provider:
        case "cuda":
            options = {key: str(int(value)) for key, value in flags.items()}
            return [(PROVIDERS["cuda"], options | {"cudnn_conv_algo_search": settings.conv_search.upper()})]
        case "tensorrt":
            graph = {"trt_cuda_graph_enable": str(int(settings.cuda_graph))}
            return [(PROVIDERS["tensorrt"], graph), (PROVIDERS["cuda"], {"use_tf32": str(int(settings.tf32))})]
    return [PROVIDERS[settings.provider]]


def _preload() -> None:
    """Load CUDA's libraries from the folders in which pip installs them.

    ONNX Runtime looks only beside its own package; torch, which installs the libraries, may be in another folder.
    """
    if not hasattr(ort, "preload_dlls"):
        return
    own_folder = Path(ort.__file__).resolve().parents[1]
    other_folders = [path for path in map(Path, sys.path) if (path / "nvidia").is_dir() and path.resolve() != own_folder]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which libraries are missing
        ort.preload_dlls()
        for libraries in (folder for path in other_folders for folder in sorted((path / "nvidia").glob("*/lib"))):
            ort.preload_dlls(directory=str(libraries.resolve()))


@contextlib.contextmanager
def _native_errors(quiet: bool) -> Iterator[Callable[[], str]]:
    """Capture what ONNX Runtime's C++ code writes to stderr, and yield a function that returns the first error in it.

    It says nowhere else why a provider is not available.
    """
    if quiet:
        yield lambda: ""
        return
    sys.stderr.flush()
    text = ""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: _reason(text)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            text = file.read().decode(errors="replace")


def _reason(text: str) -> str:
    """Return the message of the first error line, without colours, time and position in the source."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line for line in plain.splitlines() if "[E:" in line or "rror" in line or "ailed" in line]
    if not lines:
        return ""
    return re.sub(r"^.*(\[ONNXRuntimeError\] : \d+ : \w+ : |\[E:[^\]]*\]\s*)", "", lines[0]).strip()
