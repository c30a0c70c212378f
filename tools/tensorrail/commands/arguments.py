"""The options that several commands share, alone and in groups that become one settings object."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tensorrail_exporter.search.targets import Search
    from tensorrail_runtime.feeds.rules import InputRules
    from tensorrail_runtime.measure.timing import Timing
    from tensorrail_runtime.sessions.session import Session


def _json(path: Path | None) -> Path | None:
    from tensorrail.inputs import require_writable
    from tensorrail_runtime.errors import UsageError

    if path is None:
        return None
    if path.suffix.lower() == ".onnx":
        raise UsageError(f"--json {path}: expected the name of a JSON file, such as out.json, got that of a model")
    return require_writable(path)


Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the record behind the table as JSON.", callback=_json),
]
Provider = Annotated[str, typer.Option(help="ONNX Runtime execution provider: cpu, cuda or tensorrt.")]
Threads = Annotated[int, typer.Option(min=0, help="Intra-op threads; 0: ONNX Runtime's own choice.")]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Let CUDA use TF32, which changes the fourth digit.")]
Nhwc = Annotated[bool, typer.Option("--nhwc", help="Let CUDA run convolutions with the channels last.")]
CudaGraph = Annotated[bool, typer.Option("--cuda-graph", help="Replay all launches as one CUDA graph; shapes must be fixed.")]
Batch = Annotated[int, typer.Option(min=1, help="Batch size: the size of dynamic axes that --shape does not give.")]
Shape = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=1,3,224,224", help="Shape of an input; may be repeated."),
]
Duration = Annotated[float, typer.Option(min=0.1, help="Seconds of measuring latency, all models together.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="X.npz|FOLDER",
        help="Labelled test inputs: arrays by input name, and `labels`. The accuracy is measured on them; nothing is fitted to "
        "them.",
    ),
]
Inputs = Annotated[
    Path | None,
    typer.Option("--data", metavar="X.npz|FOLDER", help="Typical inputs: arrays by input name; default: random ones."),
]
Metric = Annotated[
    str | None,
    typer.Option("--metric", help="top1 (default), top5, or module:function of (outputs, labels) that returns scores."),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="X.npz|FOLDER",
        help="Inputs, which need no labels: arrays by input name, or a folder of npz, npy or image files (ImageNet's scaling).",
    ),
]
Contrib = Annotated[
    bool,
    typer.Option(
        "--contrib/--no-contrib",
        help="Whether operators of com.microsoft may be written, which ONNX Runtime alone has; without them fused attention "
        "becomes operators of ONNX.",
    ),
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="latency=2.0",
        help="Reduction factor: latency=2.0 asks for half the latency; also flops, params, bytes. May be repeated: all must "
        "hold.",
    ),
]
Precision = Annotated[
    list[str] | None,
    typer.Option(
        "--precision",
        metavar="fp32|fp16|int8|auto",
        help="Precision that times are measured and ranks are chosen in. compress takes several (repeat the option), or auto: "
        "fp32, int8, and fp16 where the provider computes in it. It then writes the model, dense or low rank, that meets the "
        "target with the least loss.  [default: that of the plan, if one is given, else fp32]",
        show_default=False,
    ),
]
Folder = Annotated[Path | None, typer.Option("--folder", help="Run folder; default: runs/<name of the recipe>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its last finished epoch.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run that is in the folder and start again.")]
Track = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="NAME", help="Log to tensorboard (in the folder) or mlflow; may be repeated."),
]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, and how.")]


Constants = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="NAME=VALUE", help="An input that is the same in every run, such as sr=16000."),
]
BatchAxes = Annotated[
    list[str] | None,
    typer.Option(
        "--batch-axis",
        metavar="NAME=AXIS",
        help="The axis of an input's samples, if not the first; `none` if all samples share this input.",
    ),
]
States = Annotated[
    list[str] | None,
    typer.Option(
        "--state",
        metavar="INPUT:OUTPUT",
        help="An input that gets an output of the step before: samples are the steps of a sequence, in order.",
    ),
]


def input_options(constants: Constants = None, batch_axes: BatchAxes = None, states: States = None) -> InputRules:
    """Return what the model's inputs are."""
    from tensorrail_runtime.feeds.rules import parse_rules

    return parse_rules(constants or [], batch_axes or [], states or [])


def session_options(
    provider: Provider = "cpu", threads: Threads = 0, tf32: Tf32 = False, nhwc: Nhwc = False, cuda_graph: CudaGraph = False
) -> Session:
    """Return how models run."""
    from tensorrail_runtime.sessions.session import Session

    return Session(provider=provider, threads=threads, tf32=tf32, nhwc=nhwc, cuda_graph=cuda_graph)


def provider_option(provider: Provider = "cpu") -> Session:
    """Return how models run, of which the provider alone can be chosen."""
    from tensorrail_runtime.sessions.session import Session

    return Session(provider=provider)


def shape_options(batch: Batch = 1, shape: Shape = None) -> Timing:
    """Return the batch size and shapes that a network is looked at with."""
    from tensorrail_runtime.measure.timing import Timing
    from tensorrail_runtime.sessions.inputs import parse_shapes

    return Timing(batch, parse_shapes(shape or []))


def timing_options(batch: Batch = 1, shape: Shape = None, duration: Duration = 10.0) -> Timing:
    """Return how latency is measured."""
    from tensorrail_runtime.measure.timing import Timing
    from tensorrail_runtime.sessions.inputs import parse_shapes

    return Timing(batch, parse_shapes(shape or []), duration)


def given_options(context: typer.Context) -> set[str]:
    """Return the names of the options that were given, not left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def search_options(
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss",
            help="The fastest network whose loss is at most this: with calibration inputs the measured loss of the network, "
            "else the sum over layers.",
        ),
    ] = None,
    format: Annotated[  # noqa: A002 - the record's own word
        list[str] | None, typer.Option("--format", help="auto, or a format such as tt; may be repeated.")
    ] = None,
    grid: Annotated[
        int, typer.Option(min=0, help="Ranks are multiples of it; 0: what the provider's kernels compute at once.")
    ] = 0,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="PATTERN", help="Layers that stay dense; `*` and `?` match.")
    ] = None,
    joint: Annotated[
        bool | None,
        typer.Option(
            "--joint/--no-joint",
            help="Whether layers that read the same input, such as query, key and value, become one; default: where the "
            "network is faster for it.",
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            "--heads",
            metavar="SIZE[,SIZE]",
            help="Reduce attention heads to this many values before layers are planned; two numbers: between query and key, "
            "and between value and output.",
        ),
    ] = None,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="For a target on size: also rewrite layers that are not 5 % faster.")
    ] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="Seconds of timing layers that are not in the latency table yet.")
    ] = 60.0,
    search_seconds: Annotated[
        float,
        typer.Option(
            "--search-seconds",
            min=0,
            help="With calibration inputs: seconds of trading ranks between layers, by the whole network's loss; 0: none.",
        ),
    ] = 20.0,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="top1|top5|module:function",
            help="Loss is the fall of this score of (outputs, labels), one per sample; needs calibration inputs with labels.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="Folder of latency tables; default $TENSORRAIL_CACHE, else tensorrail in $XDG_CACHE_HOME or ~/.cache.",
        ),
    ] = None,
) -> Search:
    """Return how a plan is searched for."""
    from tensorrail_exporter.search.targets import Search

    return Search(
        formats=tuple(format or ("auto",)),
        grid=grid,
        keep=tuple(keep or ()),
        max_loss=max_loss,
        joint=joint,
        heads=read_heads(heads),
        allow_slower=allow_slower,
        seconds=seconds,
        improve_seconds=search_seconds,
        metric=metric,
        cache=cache,
    )


def read_heads(text: str | None) -> int | tuple[int, int] | None:
    """Return the sizes of heads of a text such as `48` or `32,48`; `UsageError` says how they are written."""
    from tensorrail_runtime.errors import UsageError

    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise UsageError(f"--heads: expected one or two positive numbers, such as 48 or 32,48, got {text!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def require_apart(json: Path | None, recipe: Path) -> None:
    """Raise `ModelError` if a record would be written over one of the files that a recipe names."""
    if json is not None and json.exists():
        from tensorrail.inputs import require_writable
        from tensorrail_trainer.recipes.recipe import Recipe

        require_writable(json, *(name for _, name in Recipe.load(recipe).files()))


def read_targets(texts: list[str] | None) -> dict[str, float]:
    """Return the targets of texts such as `latency=2.0`; `UsageError` says how one is written."""
    from tensorrail_runtime.errors import UsageError

    targets: dict[str, float] = {}
    for text in texts or []:
        name, _, value = text.partition("=")
        if name.strip() in targets:
            raise UsageError(f"--target: {name.strip()} is given twice; give it once")
        try:
            targets[name.strip()] = float(value)
        except ValueError:
            targets[name.strip()] = math.nan
        if not math.isfinite(targets[name.strip()]):
            raise UsageError(f"--target: expected NAME=NUMBER, such as latency=2.0, got {text!r}")
    return targets
