"""Writes a model into a model repository of Triton Inference Server, completely or not at all.

    REPOSITORY/NAME/config.pbtxt
    REPOSITORY/NAME/1/model.onnx   and its external data beside it

With a dense model, version 1 is the dense one and version 2 the other, or they are two models, `NAME` and `NAME-dense`.
The written files themselves are loaded and run before they move into the repository.
"""

from __future__ import annotations

import math
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.graphs.files import external_files, files_read
from tensorrail_runtime.records import Record, write_text
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.session import Session, open_session
from tensorrail_runtime.tables import Part, PrintedRecord, Table
from tensorrail_runtime.triton.config import MODEL_FILE, Serving, TritonSignature, config, text
from tensorrail_runtime.triton.model import check_batching, check_warmup, request_shapes, signature

__all__ = ["Package", "Packaged", "Repository", "Serving", "package"]


class Packaged(Record):
    """One model in the repository. Shapes are those of `config.pbtxt`: without the batch if Triton batches the model."""

    name: str
    folder: str
    versions: dict[int, str]  # the source file of each version
    max_batch: int
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    types: dict[str, str]
    batch_difference: float | None  # relative L2 difference of an answer alone and in a batch of two; None without batches


class Package(PrintedRecord):
    """The models that were written into a repository."""

    version: Literal[1] = 1
    repository: str
    models: tuple[Packaged, ...]

    def shown(self) -> tuple[Part, ...]:
        """Return a table of tensors for each model, its versions, and what batching changes."""
        return tuple(part for model in self.models for part in _shown(model))


def _shown(model: Packaged) -> tuple[Part, ...]:
    rows = [
        (name, side, model.types[name].removeprefix("TYPE_"), "×".join(map(str, dims)))
        for side, tensors in (("input", model.inputs), ("output", model.outputs))
        for name, dims in tensors.items()
    ]
    batch = f"batches up to {model.max_batch}" if model.max_batch else "no batching"
    table = Table(f"{model.folder}: {batch}", ("tensor", "side", "type", "dims"), rows)
    versions = "; ".join(f"version {version}: {path}" for version, path in model.versions.items())
    if model.batch_difference is None:
        return table, versions
    return table, versions, f"answers in a batch of two differ by {model.batch_difference:.1e} from single ones (relative L2)"


@dataclass(frozen=True)
class Repository:
    """What is written into a model repository, beside the model itself."""

    name: str | None = None
    """The model's name in Triton; default: that of its file."""
    dense: Path | str | None = None
    """The dense model, as version 1; the model is version 2."""
    separate: bool = False
    """Two models, NAME and NAME-dense, in place of two versions."""
    shapes: Shapes | None = None
    """Shapes of one request by input, needed for dynamic axes other than the batch."""
    tolerance: float = 1e-3
    """Largest relative L2 difference of an answer in a batch from a single one."""
    overwrite: bool = False
    """Replace the Triton model of that name."""

    def versions(self, model: Path) -> dict[str, dict[int, Path]]:
        """Return the file of each version, by the name of the Triton model; raises `ModelError` where they do not fit."""
        name = _checked_name(self.name or model.stem)
        if self.dense is None:
            if self.separate:
                raise ModelError("expected two models to package separately, got one: give the dense model as well")
            return {name: {1: model}}
        dense = Path(self.dense)
        return {name: {1: model}, f"{name}-dense": {1: dense}} if self.separate else {name: {1: dense, 2: model}}


def package(
    model: Path | str, repository: Path | str, *, contents: Repository | None = None, serving: Serving | None = None
) -> Package:
    """Write a model into a Triton model repository; other models in it do not change.

    Args:
        model: the ONNX file.
        repository: the folder of the repository, which may be new, in an existing folder.
        contents: the name, the versions and the dense model beside it.
        serving: how Triton serves the model.

    Returns:
        The models that were written.

    Raises:
        ModelError: the model cannot be served as asked, or its folder is not empty; nothing was written.

    """
    contents, serving, repository = contents or Repository(), serving or Serving(), Path(repository)
    serving.check()
    models = contents.versions(Path(model))
    for name in models:
        _refuse_taken(repository / name, contents.overwrite)
        _refuse_inside(repository / name, [path for versions in models.values() for path in versions.values()])
    with _workshop(repository) as workshop:
        packaged = []
        for name, versions in models.items():
            (workshop / name).mkdir()
            written = _fill(workshop / name, name, versions, serving, contents)
            packaged.append(written.model_copy(update={"folder": str(repository / name)}))
        repository.mkdir(exist_ok=True)
        for name in models:
            _refuse_taken(repository / name, contents.overwrite)  # another process may have written it meanwhile
            _replace(workshop / name, repository / name, workshop)
    return Package(repository=str(repository), models=tuple(packaged))


def _fill(folder: Path, name: str, versions: Mapping[int, Path], serving: Serving, contents: Repository) -> Packaged:
    """Write the folder of one model, and check the copies that Triton will load."""
    signatures: dict[int, TritonSignature] = {}
    differences = []
    requests: dict[str, tuple[int, ...]] = {}
    for version, path in versions.items():
        _copy(path, folder / str(version))
        copy = folder / str(version) / MODEL_FILE
        # Checked on the CPU, which every host has; the provider is that of the serving host.
        settings = Session(level=serving.settings.level, threads=serving.settings.threads)
        with _named(path, copy):
            session = open_session(copy, settings=settings)
            own = signatures[version] = signature(copy, session)
            batched = serving.batch_for(own) > 0
            if batched or serving.warmup:
                requests = request_shapes(own, batched, contents.shapes or {})
            if serving.warmup:
                check_warmup(session, own, serving, requests, batched)
            if batched:
                # Without dynamic batching, the samples of a batch are those of one client, and may depend on each other.
                tolerance = contents.tolerance if serving.dynamic_batching else math.inf
                differences.append(check_batching(copy, session, own, requests, tolerance))
    first, *others = signatures.values()
    for version, other in zip(list(versions)[1:], others, strict=True):
        _refuse_other(versions, version, first, other)
    write_text(folder / "config.pbtxt", text(config(name, first, serving, requests, list(versions))))
    largest = serving.batch_for(first)
    return Packaged(
        name=name,
        folder=str(folder),
        versions={version: str(path) for version, path in versions.items()},
        max_batch=largest,
        inputs={tensor.name: tensor.dims(largest > 0) for tensor in first.inputs},
        outputs={tensor.name: tensor.dims(largest > 0) for tensor in first.outputs},
        types={tensor.name: tensor.data_type for tensor in (*first.inputs, *first.outputs)},
        batch_difference=max(differences, default=None),
    )


def _copy(path: Path, folder: Path) -> None:
    """Copy a model as `model.onnx`, and its external data to the paths that the graph gives."""
    locations = external_files(path)
    if any(Path(location).as_posix().casefold() == MODEL_FILE for location in locations):
        raise ModelError(f"{path}: its external data are named {MODEL_FILE}, Triton's name for the model: rename them")
    folder.mkdir()
    shutil.copyfile(path, folder / MODEL_FILE)
    for location in locations:
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.parent / location, folder / location)


def _refuse_other(versions: Mapping[int, Path], version: int, first: TritonSignature, other: TritonSignature) -> None:
    """Raise `ModelError` if two versions of a model have different inputs or outputs: they share one configuration."""
    for sides in ((first.inputs, other.inputs), (first.outputs, other.outputs)):
        described = [", ".join(f"{t.name} {t.data_type} {list(t.shape)}" for t in sorted(side, key=str)) for side in sides]
        if described[0] != described[1]:
            raise ModelError(
                f"expected versions with the same inputs and outputs, got {described[0]} in {next(iter(versions.values()))} "
                f"and {described[1]} in {versions[version]}: package them as two separate models"
            )


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ModelError(f"expected a model name of letters, digits, '.', '_' and '-', got {name!r}: give another name")
    return name


def _refuse_taken(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ModelError(f"{target}: exists and is not a folder: choose another name")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ModelError(f"{target}: is not empty: choose another name, or allow to overwrite it")
    if not (target / "config.pbtxt").is_file():
        raise ModelError(
            f"{target}: holds no config.pbtxt, so it is not a Triton model and is never overwritten: choose another name"
        )


def _refuse_inside(target: Path, models: Sequence[Path]) -> None:
    """Raise `ModelError` if a model, or its external data, is in the folder that would be replaced."""
    for model in models:
        for file in files_read(model):
            if target.resolve() in file.resolve().parents:
                raise ModelError(f"{target}: holds {file}, which is read and would be lost: choose another name or repository")


@contextmanager
def _workshop(repository: Path) -> Iterator[Path]:
    """Yield a temporary folder on the file system of the repository.

    It is beside the repository, not in it: Triton takes every folder in it for a model, even one whose name starts with a dot.
    """
    if repository.exists() and not repository.is_dir():
        raise ModelError(f"{repository}: not a folder: expected a Triton model repository, or a path for a new one")
    target = repository.resolve()
    if not target.parent.is_dir():
        raise ModelError(f"{repository}: the folder {target.parent} does not exist: create it, or choose another repository")
    beside = not target.exists() or target.parent.stat().st_dev == target.stat().st_dev
    folder = (target.parent if beside else target) / f".{target.name}.{secrets.token_hex(4)}.part"
    try:
        folder.mkdir()
    except PermissionError:
        if not beside or not target.exists():
            raise
        raise ModelError(
            f"{target.parent}: no permission to write: a model is prepared there before it moves to {target.name}"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(new: Path, target: Path, workshop: Path) -> None:
    """Move a finished folder to its place; the old one is restored if that fails."""
    old = workshop / f"{target.name}.old"
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


@contextmanager
def _named(path: Path, copy: Path) -> Iterator[None]:
    """Make errors about the copy name its source file."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace(str(copy), str(path))) from None
