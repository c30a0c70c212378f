"""Training and test split of a folder of videos: by published lists, by groups of clips, or by a share of each class."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tensorrail_runtime.errors import DataError
from tensorrail_trainer.data.files import unreadable

VIDEOS = frozenset({".avi", ".mpg", ".mpeg", ".mp4", ".m4v", ".mov", ".mkv", ".webm"})
NEITHER, TRAIN, TEST = 0, 1, 2  # the marks in the lists of HMDB51

_GROUP = re.compile(r"v_.*?_g?(\d+)(?:_c?\d+)?")
_LISTS = "<class>_test_split{0}.txt (HMDB51), or trainlist{0:02}.txt and testlist{0:02}.txt (UCF101)"


def by_list(root: Path, paths: Sequence[Path], lists: Path, number: int) -> np.ndarray:
    """Return TRAIN, TEST or NEITHER for every clip, from the published lists of HMDB51 or UCF101 for the split `number`.

    A clip is identified by the folder of its class and its name, with or without the suffix of a video file. Raises `DataError`
    if there are no such lists, a line has another form, the lists contradict each other, or they and the clips belong to
    different data sets.
    """
    listed: dict[tuple[str, str], int] = {}
    for key, mark in _listed(lists, number):
        if listed.setdefault(key, mark) != mark:
            raise DataError(
                f"{lists}: the lists of split {number} name {'/'.join(key)} twice, with other marks; expected each clip once"
            )
    if not listed:
        raise DataError(f"{lists}: no lists of split {number} found; expected {_LISTS.format(number)}")
    keys = [(path.relative_to(root).parts[0], _clip(path.name)) for path in paths]
    for path, key in zip(paths, keys, strict=True):
        if key not in listed:
            raise DataError(f"{path}: not in any list of split {number} in {lists}; expected the lists of this data set")
    missing = sorted({key for key, mark in listed.items() if mark != NEITHER} - set(keys))
    if missing:
        first = "/".join(missing[0])
        raise DataError(f"{root}: {len(missing)} clips of split {number} are missing, such as {first}; unpack all clips")
    return np.array([listed[key] for key in keys])


def groups_of(root: Path, paths: Sequence[Path]) -> list[int] | None:
    """Return the group of every clip, or None if no clip has one. Raises `DataError` if only some clips have one."""
    groups = [_group(path.relative_to(root)) for path in paths]
    if all(group is None for group in groups):
        return None
    for path, group in zip(paths, groups, strict=True):
        if group is None:
            raise DataError(
                f"{path}: has no group, but other clips have one; expected all clips, or none, to be named v_<class>_<group>"
            )
    return [group for group in groups if group is not None]


def by_group(root: Path, groups: Sequence[int], test_groups: Sequence[int] | None, fraction: float, seed: int) -> np.ndarray:
    """Return TEST for the clips of the test groups, else TRAIN. By default the seed selects a fraction of the groups."""
    known = sorted(set(groups))
    if test_groups is None:
        count = max(1, round(fraction * len(known)))
        test_groups = np.random.default_rng(seed).permutation(known)[:count].tolist()
    missing = [group for group in test_groups if group not in known]
    if missing:
        raise DataError(
            f"{root}: test_groups: group {missing[0]} does not exist; expected some of {', '.join(map(str, known))}"
        )
    return np.where(np.isin(groups, list(test_groups)), TEST, TRAIN)


def by_class(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return TEST for a fraction of the clips of each class, selected by the seed, else TRAIN."""
    generator = np.random.default_rng(seed)
    marks = np.full(len(labels), TRAIN)
    for label in np.unique(labels):
        (own,) = np.nonzero(labels == label)
        marks[generator.permutation(own)[: round(fraction * len(own))]] = TEST
    return marks


def _group(path: Path) -> int | None:
    """Return the group that the path of a clip below the root names; the outermost name applies."""
    for part in (*path.parts[1:-1], path.stem):
        match = _GROUP.fullmatch(part)
        if match is not None:
            return int(match[1])
    return None


def _clip(name: str) -> str:
    """Return the name of a clip without the suffix of a video file; the name of a folder of frames may contain other dots."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in VIDEOS else name


def _listed(lists: Path, number: int) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield ((class, clip), mark) for every line of the lists of a split."""
    ending = f"_test_split{number}.txt"
    for file in sorted(lists.glob(f"*{ending}")):
        for line in _lines(file):
            clip, _, digit = line.rpartition(" ")
            if digit not in {"0", "1", "2"}:
                raise DataError(f"{file}: expected lines of HMDB51 (<clip>.avi and 0, 1 or 2), got {line[:80]!r}")
            yield (file.name.removesuffix(ending), _clip(clip.strip())), int(digit)
    for mark, kind in ((TRAIN, "train"), (TEST, "test")):
        file = lists / f"{kind}list{number:02}.txt"
        for line in _lines(file) if file.exists() else ():
            class_name, slash, clip = line.split()[0].partition("/")
            if not slash:
                raise DataError(f"{file}: expected lines of UCF101 (<class>/<clip>.avi), got {line[:80]!r}")
            yield (class_name, _clip(clip)), mark


def _lines(file: Path) -> list[str]:
    try:
        # Editors on Windows put a byte-order mark at the start; joined files have more of them.
        text = file.read_text(encoding="utf-8").replace("\ufeff", "")
    except (OSError, UnicodeError) as error:
        raise unreadable(file, error, "a list of clips") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
