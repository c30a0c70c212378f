"""Run the test suite in environments that differ from this machine's own: `make test-environments`.

Each environment sets several things at once; when a test fails in one, set them one by one to find which of them it leans on.
Tests run in random order; the seed is printed, and `-p randomly -p "no:xdist" --randomly-seed=SEED` repeats an order.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = {
    "oldest": {  # no vector instructions beyond those that every x86-64 has; nobody's home; no network; one core
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "HOME": os.devnull + "/nobody",
        "TENSORRAIL_TEST_CHANNEL_BLOCK": "8",
        "LC_ALL": "C",
        "TZ": "XYZ-13:45",
    },
    "avx2": {  # a processor of ten years ago, somewhere else; one core
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "TENSORRAIL_TEST_CHANNEL_BLOCK": "8",
        "LC_ALL": "tr_TR.UTF-8",
        "LANG": "tr_TR.UTF-8",
        "TZ": "XYZ+9:30",
    },
    "all-cores": {  # this machine's own; every test process may use all of its cores
        "TENSORRAIL_TEST_ALL_CORES": "1",
        "TENSORRAIL_TEST_CHANNEL_BLOCK": "16",
    },
}
ONE_CORE = ("oldest", "avx2")
NO_NETWORK = ("oldest",)


def main() -> None:
    """Run the suite in every environment that was asked for, one after the other; exit code 1 when a test failed in one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; all of them by default")
    parser.add_argument("--core", type=int, default=0, help="which core the environments of one core use")
    options, more = parser.parse_known_args()
    unknown = set(options.names) - set(ENVIRONMENTS)
    if unknown:
        parser.error(f"unknown environment {', '.join(sorted(unknown))}: expected one of {', '.join(ENVIRONMENTS)}")
    failed = [name for name in options.names or ENVIRONMENTS if run(name, options.core, more)]
    print(f"failed in {', '.join(failed)}" if failed else "every environment passed", flush=True)
    sys.exit(bool(failed))


def run(name: str, core: int, more: list[str]) -> int:
    """Return the exit code of pytest in one environment."""
    print(f"== {name}: {ENVIRONMENTS[name]}", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "randomly", *more]
    command += ["-n", "1" if name in ONE_CORE else "2"]
    if name in NO_NETWORK and shutil.which("unshare") and hasattr(os, "geteuid") and os.geteuid() == 0:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]  # loopback stays
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    environment = {**os.environ, **ENVIRONMENTS[name]}
    try:
        if before and name in ONE_CORE:
            os.sched_setaffinity(0, {sorted(before)[core % len(before)]})
        return subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=False).returncode
    finally:
        with contextlib.suppress(AttributeError, OSError):
            os.sched_setaffinity(0, before)


if __name__ == "__main__":
    main()
