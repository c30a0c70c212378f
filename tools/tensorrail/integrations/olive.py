"""`compress` as a pass of Microsoft Olive, which searches over passes and evaluates the models that they write.

Olive finds passes of other packages by a package configuration, a file that `write_package_config` writes:

>>> write_package_config("olive-package.json")  # doctest: +SKIP
>>> olive.run("workflow.json", package_config="olive-package.json")  # doctest: +SKIP

or `olive run --config workflow.json --package-config olive-package.json`. In the workflow, the pass has the type
`TensorrailCompress`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tensorrail as tr
from tensorrail.extras import MissingExtraError
from tensorrail_runtime.errors import TensorrailError
from tensorrail_runtime.records import write_text

try:
    from olive.data.config import DataConfig
    from olive.exception import OlivePassError
    from olive.hardware import AcceleratorSpec
    from olive.model import ONNXModelHandler
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.pass_config import BasePassConfig, PassConfigParam
    from olive.search.search_parameter import Categorical
except ModuleNotFoundError as error:
    raise MissingExtraError("the pass for Olive", error) from None

_PROVIDERS = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "tensorrt",
}
_TARGETS = ("latency", "flops", "params", "bytes")
_MODEL, _REPORT = "model.onnx", "tensorrail.json"
_ENTRY = {
    "module_path": f"{__name__}.TensorrailCompress",
    "supported_providers": list(_PROVIDERS),
    "supported_accelerators": ["cpu", "gpu"],
    "supported_precisions": ["fp32", "fp16", "int8"],
    "supported_algorithms": [],
    "supported_quantization_encodings": ["qdq"],
    "dataset": "dataset_optional",
}


class TensorrailCompress(Pass):  # type: ignore[misc] # Olive publishes no types
    """Factors the layers of an ONNX model, with ranks chosen by measured time and verified loss; see `tensorrail.compress`.

    `latency`, `flops`, `params` and `bytes` are the wanted reduction factors: `latency=1.5` asks for a latency 1.5× lower.
    With a search strategy, `latency` is tried at 1.2, 1.5 and 2 unless the workflow names values. Without any, the model is the
    fastest one whose outputs agree with the dense model's, which needs a `data_config`. Where the target is not reached, or
    outputs do not agree, the pass fails: a search leaves this point out. The report of the compression is written beside the
    model as `tensorrail.json`.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        del accelerator_spec  # the parameters are the same for all of them
        numbers = {
            "latency": "Wanted speed-up, such as 1.5.",
            "flops": "Wanted reduction of FLOPs, such as 2.",
            "params": "Wanted reduction of parameters, such as 2.",
            "bytes": "Wanted reduction of the stored bytes, such as 2.",
            "max_difference": "Largest difference of the outputs, as a multiple of their standard deviation.",
            "min_agreement": "Smallest top-1 agreement with the dense model, a share of the inputs.",
            "fit": "Seconds for fitting cores in torch; default: 120 where torch is installed, else 0.",
            "seconds": "Seconds for timing layers that are not in the latency table yet; default: 60.",
            "search_seconds": "Seconds for trading ranks between layers, by the whole network's loss; default: 20.",
            "duration": "Seconds for comparing the dense and the compressed model; default: 10.",
        }
        params = {name: PassConfigParam(type_=float, default_value=None, description=text) for name, text in numbers.items()}
        for name in _TARGETS:  # a workflow may list values of each; only latency is varied where it lists none
            params[name].search_defaults = Categorical([1.2, 1.5, 2.0] if name == "latency" else [None])
        return params | {
            "data_config": PassConfigParam(
                type_=DataConfig | dict,
                default_value=None,
                description="Inputs: cores are fitted to most of them, and the model is judged on those that are held out.",
            ),
            "samples": PassConfigParam(
                type_=int, default_value=512, description="Samples of data_config that are used at most."
            ),
            "precision": PassConfigParam(
                type_=str,
                default_value="fp32",
                description="fp32, fp16, int8, or auto: the one of these that loses least, fp16 only where it is computed in.",
            ),
            "format": PassConfigParam(
                type_=list[str],
                default_value=None,
                description="Formats of the cores, such as svd; default: auto, which is tt and svd.",
            ),
            "threads": PassConfigParam(
                type_=int, default_value=0, description="Threads that the model is timed with; 0: those of ONNX Runtime."
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        """Write the compressed model into the folder `output_model_path`, and return it with its report."""
        if not isinstance(model, ONNXModelHandler):
            raise OlivePassError(f"expected an ONNX model, got a {type(model).__name__}; put OnnxConversion before this pass")
        provider = str(self.accelerator_spec.execution_provider)
        if provider not in _PROVIDERS:
            raise OlivePassError(f"expected one of the providers {', '.join(_PROVIDERS)}, got {provider}")
        folder = Path(output_model_path.removesuffix(".onnx"))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            report = tr.compress(
                model.model_path,
                folder / _MODEL,
                {name: value for name in _TARGETS if (value := getattr(config, name)) is not None} or None,
                calibration=_inputs(model, config),
                options=_options(config, _PROVIDERS[provider]),
            )
        except TensorrailError as error:
            raise OlivePassError(str(error)) from None
        if not (report.meets and report.accepted and report.faster):
            for file in folder.glob(f"{_MODEL}*"):  # with its external data
                file.unlink()
            reached = (f"{name}={value:g}, got {getattr(report.ratios, name):.2f}" for name, value in report.targets.items())
            refused = "" if report.aside is None else report.guard.refusal(report.aside)
            missed = f"target not reached: expected {'; '.join(reached)}"
            low = report.ratios.latency_low
            slow = f"not measured to be faster: the interval of the speed-up begins at {low:.2f}×"
            raise OlivePassError(refused or (slow if report.meets and report.accepted else missed))
        write_text(folder / _REPORT, report.model_dump_json(indent=1) + "\n")
        return ONNXModelHandler(
            model_path=str(folder),
            onnx_file_name=_MODEL,
            inference_settings=model.inference_settings,
            model_attributes={**(model.model_attributes or {}), "additional_files": [str(folder / _REPORT)]},
        )


def package_config() -> dict[str, Any]:
    """Return Olive's own package configuration with this pass added."""
    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    config["passes"][TensorrailCompress.__name__] = _ENTRY
    return config


def write_package_config(path: Path | str) -> None:
    """Write Olive's own package configuration with this pass added, for `olive run --package-config`.

    Args:
        path: the JSON file.

    Raises:
        OSError: the file cannot be written.

    """
    write_text(path, json.dumps(package_config(), indent=1) + "\n")


def _options(config: Any, provider: str) -> tr.Options:
    """Return the options of `compress` that the parameters of the pass stand for."""
    search = {"seconds": config.seconds, "improve_seconds": config.search_seconds, "formats": config.format}
    limits = {"max_difference": config.max_difference, "min_agreement": config.min_agreement}
    return tr.Options(
        session=tr.Session(provider=provider, threads=config.threads),
        timing=tr.Timing(**_given({"seconds": config.duration})),
        search=tr.Search(**_given(search)),
        fit=tr.Fit(seconds=config.fit, samples=config.samples if config.data_config else None),
        guard=tr.Guard(**given) if (given := _given(limits)) else None,
        precision=config.precision,
    )


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are not None, lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if value is not None}


def _inputs(model: ONNXModelHandler, config: Any) -> dict[str, np.ndarray] | None:
    """Return the first samples of `data_config` by the names of the model's inputs; None without one."""
    if config.data_config is None:
        return None
    data = config.data_config if isinstance(config.data_config, DataConfig) else DataConfig(**config.data_config)
    reader = data.to_data_container().create_calibration_dataloader(model_path=model.model_path, io_config=model.io_config)
    batches: list[dict[str, np.ndarray]] = []
    count = 0
    next_batch: Callable[[], dict[str, np.ndarray] | None] = reader.get_next
    while count < config.samples and (batch := next_batch()) is not None:
        batches.append(batch)
        count += len(next(iter(batch.values())))
    if not batches:
        raise OlivePassError(f"data_config {data.name}: expected inputs, got none")
    try:
        return {name: np.concatenate([batch[name] for batch in batches])[: config.samples] for name in batches[0]}
    except (KeyError, ValueError) as error:
        raise OlivePassError(f"data_config {data.name}: expected batches of the same inputs and shapes ({error})") from None
