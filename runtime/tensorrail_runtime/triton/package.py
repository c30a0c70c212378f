"""A model as Triton Inference Server takes it: a folder with `config.pbtxt` and the model, whole or not at all.

    REPOSITORY/NAME/config.pbtxt
    REPOSITORY/NAME/1/model.onnx   and its external data beside it

With a dense model, version 1 is the dense one and version 2 the other, or they are two models, `NAME` and `NAME-dense`.
Nothing is written that has not been loaded and run here, from the very files that are served.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.graphs.files import external_files
from tensorrail_runtime.records import Record, write_text
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.session import Session, open_session
from tensorrail_runtime.triton.config import MODEL_FILE, Serving, TritonSignature, config, text
from tensorrail_runtime.triton.model import check_batching, check_warmup, request_shapes, signature

__all__ = ["Package", "Packaged", "Serving", "package"]


class Packaged(Record):
    """One model of the repository. Shapes are those of `config.pbtxt`: without the batch where Triton batches."""

    name: str
    folder: str
    versions: dict[int, str]  # the file that each version was made of
    max_batch: int
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    types: dict[str, str]
    batch_difference: float | None  # an answer alone against the same in a batch of two, relative L2; None where none is formed


class Package(Record):
    """What was written."""

    version: Literal[1] = 1
    repository: str
    models: tuple[Packaged, ...]


def package(
    model: Path | str,
    repository: Path | str,
    *,
    name: str | None = None,
    dense: Path | str | None = None,
    separate: bool = False,
    serving: Serving | None = None,
    shapes: Shapes | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
) -> Package:
    """Write a model into a Triton model repository, other models there untouched.

    `name` is the model's in Triton; without it, the file's. `shapes` says what a request is like where axes have any size.
    `tolerance` is the largest relative L2 difference between an answer alone and in a batch. A folder of that name that holds
    anything is refused, or replaced with `overwrite` when it is a Triton model. Raises `ModelError`, and leaves nothing behind.
    """
    serving, repository = serving or Serving(), Path(repository)
    serving.check()
    name = _checked_name(name or Path(model).stem)
    plan: dict[str, dict[int, Path]] = {name: {1: Path(model)}}
    if dense is not None and separate:
        plan[f"{name}-dense"] = {1: Path(dense)}
    elif dense is not None:
        plan[name] = {1: Path(dense), 2: Path(model)}
    elif separate:
        raise ModelError("expected two models to package separately, got one: give the dense model as well")
    for one in plan:
        _refuse_taken(repository / one, overwrite)
    with _workshop(repository) as workshop:
        made = []
        for one, versions in plan.items():
            (workshop / one).mkdir()
            found = _fill(workshop / one, one, versions, serving, shapes or {}, tolerance)
            made.append(found.model_copy(update={"folder": str(repository / one)}))
        repository.mkdir(exist_ok=True)
        for one in plan:
            _refuse_taken(repository / one, overwrite)  # another may have written it meanwhile
            _replace(workshop / one, repository / one, workshop)
    return Package(repository=str(repository), models=tuple(made))


def _fill(
    folder: Path, name: str, versions: Mapping[int, Path], serving: Serving, shapes: Shapes, tolerance: float
) -> Packaged:
    """Write one model's folder, and hold what Triton will rely on against the copies that it will load."""
    signatures: dict[int, TritonSignature] = {}
    differences = []
    requests: dict[str, tuple[int, ...]] = {}
    for version, path in versions.items():
        _copy(path, folder / str(version))
        copy = folder / str(version) / MODEL_FILE
        # Read on the CPU, which every host has: the provider asked for is that of the host that serves.
        settings = Session(level=serving.settings.level, threads=serving.settings.threads)
        with _named(path, copy):
            session = open_session(copy, settings=settings)
            found = signatures[version] = signature(copy, session)
            batched = serving.batch_for(found) > 0
            if batched or serving.warmup:
                requests = request_shapes(found, batched, shapes)
            if serving.warmup:
                check_warmup(session, found, serving, requests, batched)
            if batched:
                differences.append(check_batching(copy, session, found, requests, tolerance))
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
    """Copy a model as `model.onnx`, and its external data to where the graph expects them beside it."""
    locations = external_files(path)
    if any(Path(location).as_posix().casefold() == MODEL_FILE for location in locations):
        raise ModelError(f"{path}: its external data are named {MODEL_FILE}, Triton's name for the model: rename them")
    folder.mkdir()
    shutil.copyfile(path, folder / MODEL_FILE)
    for location in locations:
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.parent / location, folder / location)


def _refuse_other(versions: Mapping[int, Path], version: int, first: TritonSignature, other: TritonSignature) -> None:
    """Raise `ModelError` where two versions of one model differ in what they take or give: they share one configuration."""
    for mine, its in ((first.inputs, other.inputs), (first.outputs, other.outputs)):
        described = [
            ", ".join(f"{t.name} {t.data_type} {list(t.shape)}" for t in sorted(side, key=str)) for side in (mine, its)
        ]
        if described[0] != described[1]:
            raise ModelError(
                f"expected versions with the same inputs and outputs, got {described[0]} in {next(iter(versions.values()))} "
                f"and {described[1]} in {versions[version]}: package them as two models (--separate)"
            )


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ModelError(f"expected a model name of letters, digits, '.', '_' and '-', got {name!r}: give --name")
    return name


def _refuse_taken(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ModelError(f"{target}: exists and is not a folder: choose another --name")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ModelError(f"{target}: is not empty: choose another --name, or use --overwrite")
    if not (target / "config.pbtxt").is_file():
        raise ModelError(
            f"{target}: holds no config.pbtxt, so --overwrite does not replace it as a Triton model: choose another --name"
        )


@contextmanager
def _workshop(repository: Path) -> Iterator[Path]:
    """Yield a folder on the repository's file system that is removed afterwards.

    It lies beside the repository, not in it: Triton takes every folder in it for a model, one with a dot before its name too.
    """
    if repository.exists() and not repository.is_dir():
        raise ModelError(f"{repository}: not a folder: expected a Triton model repository, or a path for a new one")
    home = repository.resolve()
    beside = not home.exists() or home.parent.stat().st_dev == home.stat().st_dev
    folder = (home.parent if beside else home) / f".{home.name}.{secrets.token_hex(4)}.part"
    try:
        folder.mkdir()
    except PermissionError:
        if not beside or not home.exists():
            raise
        raise ModelError(
            f"{home.parent}: no permission to write: a model is prepared there before it moves to {home.name}"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(made: Path, target: Path, workshop: Path) -> None:
    """Move a finished folder to its place; what was there goes only when the new one stands."""
    old = workshop / f"{target.name}.old"
    if target.exists():
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


@contextmanager
def _named(path: Path, copy: Path) -> Iterator[None]:
    """Let errors of the copy name the file that it was made of."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace(str(copy), str(path))) from None
