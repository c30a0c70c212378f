"""Describes the machine of a measurement: processor, GPU, driver, clocks and versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from tensorrail_runtime.records import Record

_QUERY = "name,driver_version,clocks.sm,clocks.mem,power.limit,memory.total"


class Gpu(Record):
    """An NVIDIA GPU, in the words of nvidia-smi; clocks, power and memory are texts with their units, as measured."""

    name: str
    driver: str
    sm_clock: str
    memory_clock: str
    power_limit: str
    memory: str


class Machine(Record):
    """The machine on which times were measured."""

    processor: str
    cores: int
    system: str
    onnxruntime: str
    python: str = ""
    mhz: float | None = None  # clock of the first core at the time of the measurement
    gpu: Gpu | None = None


def machine(gpu: bool = False) -> Machine:
    """Describe this machine.

    Args:
        gpu: whether to ask nvidia-smi for the first GPU that CUDA uses as well.

    Returns:
        Processor, versions and, with `gpu`, the GPU; None for what the system does not report.

    """
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        onnxruntime=ort.__version__,
        python=platform.python_version(),
        mhz=_mhz(),
        gpu=_gpu() if gpu else None,
    )


@dataclass(frozen=True)
class Processor:
    """The properties of a processor that decide how ONNX Runtime's CPU kernels compute.

    Args:
        architecture: as `platform.machine()` gives it: "x86_64", "AMD64", "aarch64", …
        flags: the names of its instruction sets, as /proc/cpuinfo gives them; empty where they are unknown.

    """

    architecture: str
    flags: frozenset[str]

    @property
    def channel_block(self) -> int:
        """The number of channels that a convolution computes at once: 16 with AVX-512, else 8."""
        return 16 if "avx512f" in self.flags else 8

    @property
    def saturates(self) -> bool:
        """Whether products of uint8 and int8 are added in pairs as 16-bit integers, which may saturate: x86 without VNNI.

        Source: "Quantize ONNX Models", section Data type selection, ONNX Runtime's documentation.
        """
        return self.architecture.lower() in ("x86_64", "amd64") and not self.flags & {"avx512_vnni", "avx_vnni"}


def processors() -> int:
    """Return the number of processors that this process may use: all of the machine, or those that it is bound to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> Processor:
    """Return the processor of this machine."""
    flags = next((line.partition(":")[2] for line in _cpuinfo() if line.startswith("flags")), "")
    return Processor(platform.machine(), frozenset(flags.split()))


def gpu_memory_used() -> int | None:
    """Return the used memory of the first GPU that CUDA uses, in MiB; None where nvidia-smi does not report it."""
    values = _smi("memory.used")
    number = values[0].partition(" ")[0] if values else ""
    return int(number) if number.isdecimal() else None


def _processor() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _mhz() -> float | None:
    for line in _cpuinfo():
        if line.startswith("cpu MHz"):
            return float(line.partition(":")[2])
    return None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _gpu() -> Gpu | None:
    values = _smi(_QUERY)
    return Gpu(**dict(zip(Gpu.model_fields, values, strict=True))) if len(values) == len(Gpu.model_fields) else None


def _smi(query: str) -> list[str]:
    """Return what nvidia-smi reports of the first GPU that CUDA uses; empty where it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    # nvidia-smi numbers all GPUs, CUDA those that are visible. It knows indices and UUIDs, but no parts of a GPU (MIG).
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    gpu = first if first.isdecimal() or first.startswith("GPU-") else "0"
    command = [program, f"--query-gpu={query}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - fixed program
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [value.strip() for value in completed.stdout.split(",")] if completed.returncode == 0 else []
