"""Runs a model in another Python environment, which has onnxruntime and numpy, and nothing of this package.

The gate starts this file with the other interpreter, sends requests as lines of JSON, and reads an answer to each. It runs with
Python 3.8 and newer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# The folder of this file has modules that would hide others.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

WARMUP, RUNS = 3, 10  # of a profile
ANSWER = "tensorrail-answer "  # starts a line that answers; a module may print others when Python starts


class Model:
    """A session, and the inputs that it runs on."""

    def open(self, path: str, provider: str, inputs: str, options: dict[str, Any]) -> dict[str, Any]:
        """Open a model; return the versions here.

        Args:
            path: the ONNX file.
            provider: ONNX Runtime's name of the provider.
            inputs: an npz file with the arrays of the inputs, in the order of `options["inputs"]`.
            options: `inputs` (names), `threads`, `provider` (its options), `optimized` (a file to write, or None), `profile` (a
                prefix, or None) and `disabled` (names of optimizers).

        """
        import numpy as np
        import onnxruntime as ort

        if provider not in ort.get_available_providers():
            raise RuntimeError(f"provider {provider} is not available, of {ort.get_available_providers()}")
        own = ort.SessionOptions()
        own.log_severity_level = 4
        own.intra_op_num_threads = options["threads"]
        own.add_session_config_entry("session.force_spinning_stop", "1")  # other sessions run interleaved with this one
        if options["optimized"]:
            own.optimized_model_filepath = options["optimized"]
            name = f"{Path(options['optimized']).name}.data"
            own.add_session_config_entry("session.optimized_model_external_initializers_file_name", name)
        if options["profile"]:
            own.enable_profiling = True
            own.profile_file_prefix = options["profile"]
        if provider.startswith(("CUDA", "Tensorrt")) and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        more = {"disabled_optimizers": options["disabled"]} if options["disabled"] else {}
        self.session = ort.InferenceSession(path, own, providers=[tuple(one) for one in options["providers"]], **more)
        if self.session.get_providers()[0] != provider:
            raise RuntimeError(f"ONNX Runtime fell back from {provider} to {self.session.get_providers()[0]}")
        with np.load(inputs, allow_pickle=False) as stored:
            self.feed = {name: stored[f"arr_{k}"] for k, name in enumerate(options["inputs"])}
        self.runs = 0
        self.names = [entry.name for entry in self.session.get_outputs()]
        return {
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
            "version": ".".join(map(str, sys.version_info[:3])),
        }

    def outputs(self, path: str) -> list[str]:
        """Run once and write the outputs to an npz file; return their names."""
        import numpy as np

        values = self.session.run(self.names, self.feed)
        self.runs += 1
        for name, array in zip(self.names, values):  # noqa: B905 - `strict` is of Python 3.10
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
                raise RuntimeError(f"output {name!r} is no array of numbers")
        np.savez(path, *values)
        return self.names

    def profile(self) -> list[list[Any]]:
        """Run several times with ONNX Runtime's profiler; return the operator, provider and time of each node.

        The session was opened with a prefix for the profile. Times are medians of a run, in microseconds.
        """
        for _ in range(WARMUP + RUNS):
            self.session.run(self.names, self.feed)
        self.runs += WARMUP + RUNS
        events = json.loads(Path(self.session.end_profiling()).read_text(encoding="utf-8"))
        times: dict[str, list[float]] = {}
        kinds: dict[str, tuple[str, str]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"][: -len("_kernel_time")]
                times.setdefault(name, []).append(float(event["dur"]))
                kinds[name] = event["args"].get("op_name", ""), event["args"].get("provider", "")
        found = []
        for name, values in times.items():
            each = len(values) // self.runs or 1  # a node in the body of a loop runs several times
            sums = sorted(sum(values[k : k + each]) for k in range((self.runs - RUNS) * each, len(values) - each + 1, each))
            found.append([name, *kinds[name], sums[len(sums) // 2] if sums else 0.0])
        return found

    def warm(self, seconds: float) -> float:
        """Run for a while; return the milliseconds of the fastest run."""
        least, began = float("inf"), time.perf_counter()
        while True:
            start = time.perf_counter()
            self.session.run(self.names, self.feed)
            end = time.perf_counter()
            least = min(least, 1e3 * (end - start))
            if end - began >= seconds:
                return least

    def times(self, count: int) -> list[float]:
        """Run so many times; return the milliseconds of each run."""
        found = []
        for _ in range(count):
            start = time.perf_counter()
            self.session.run(self.names, self.feed)
            found.append(1e3 * (time.perf_counter() - start))
        return found


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr
    model = Model()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(model, request["do"])(*request["arguments"])}
        except Exception as error:  # noqa: BLE001 - the gate reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(ANSWER + json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
