"""Folders of short videos in the layout of UCF11, UCF101 and HMDB51; each clip is read as a few frames.

A clip is a video file, or a folder of images in the order of the numbers in their names, anywhere below the folder of its
class. UCF11 and UCF101 number the recordings from which the clips were cut, `v_<class>_<group>_<clip>`. Clips of one group look
alike, so a group must not be divided between training and test (Liu, Luo and Shah, CVPR 2009).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tensorrail_runtime.errors import DataError
from tensorrail_runtime.feeds.folders import left_out
from tensorrail_runtime.feeds.pictures import SUFFIXES
from tensorrail_trainer.data.clip_splits import TEST, TRAIN, VIDEOS, by_class, by_group, by_list, groups_of
from tensorrail_trainer.data.files import Files, class_folders, files_below, loose_files, unreadable
from tensorrail_trainer.data.images import decoded
from tensorrail_trainer.data.splits import Dataset

_CONTAINERS = "avi,mpeg,mpegvideo,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"  # without formats that can open other files
_MEAN, _DEVIATION = 0.45 * 255, 0.225 * 255  # the usual values for videos
_SHARE = 0.2  # of the groups or clips in the test split
_PIXELS = 89_478_485  # the same limit as for images
_NUMBERED = re.compile(r"([^0-9]*)([0-9]*)")  # text and the number after it
_LAYOUT = "the layout <class>/…/<clip>.avi, or <class>/…/<clip>/<frame>.jpg"


def video(
    root: str,
    seed: int,
    frames: int = 6,
    size: Sequence[int] = (120, 160),
    test_groups: Sequence[int] | None = None,
    test_fraction: float | None = None,
    lists: str | None = None,
    split: int | None = None,
    memory: bool = True,
    workers: int | None = None,
) -> Dataset:
    """Return clips as sequences of flattened images.

    Args:
        root: the folder of the classes.
        seed: the seed of a random split.
        frames: the number of frames per clip: the middle frames of equal parts of the clip; default 6.
        size: height and width in pixels; default (120, 160).
        test_groups: the groups of the test split, for clips that are named by group; default: a random share of the groups.
        test_fraction: the share of the groups, or of the clips of each class if there are no groups, in the test split, between
            0 and 1; default 0.2.
        lists: the folder of the published lists of HMDB51 or UCF101, which then define the split; default none.
        split: the number of the published split, with `lists`; default 1.
        memory: keep all frames in memory, as uint8; otherwise each clip is read again when it is needed; default True.
        workers: the number of processes that read files; default one per core, at most four.

    Returns:
        Clips (N, frames, height · width · 3) float32.

    Raises:
        DataError: a file cannot be read, an argument is out of range, or a class has no training clip.

    """
    folder, (height, width) = Path(root), _sizes(frames, size, test_fraction)
    classes = class_folders(folder, _LAYOUT)
    clips, others = [], loose_files(folder)
    for label, name in enumerate(classes):
        own_clips, own_others = _clips(folder / name)
        clips += [(path, label) for path in own_clips]
        others += own_others
    paths, labels = [path for path, _ in clips], np.array([label for _, label in clips])
    marks, by = _marks(folder, paths, labels, seed, test_groups, test_fraction, lists, split)
    untrained = set(range(len(classes))) - set(labels[marks == TRAIN].tolist())
    if untrained or TEST not in marks:
        missing = f"no training clip of {classes[min(untrained)]!r}" if untrained else "no test clip"
        raise DataError(f"{folder}: the split leaves {missing}; change lists, test_groups or test_fraction")
    mean, deviation = torch.tensor(_MEAN), torch.tensor(_DEVIATION)
    splits = []
    for chosen in (marks == TRAIN, marks == TEST):
        own = [path for path, take in zip(paths, chosen, strict=True) if take]
        files = Files(own, torch.from_numpy(labels[chosen]), ClipReader(frames, height, width), mean, deviation, workers)
        splits.append(files.held() if memory else files)
    source = f"videos of {len(classes)} classes ({folder.name}), {frames} frames of {width}×{height}, split by {by}"
    source = f"{source}; {len(splits[0])} training and {len(splits[1])} test clips"
    note = left_out(folder, others, f"videos ({', '.join(sorted(VIDEOS))}) or images in folders of classes")
    return Dataset(source, len(classes), *splits, left_out=(note,) if note else ())


def video_known(root: str, size: Sequence[int] = (120, 160), **_: Any) -> Mapping[str, int]:
    """Return the arguments of a model for `video`, from the names of the folders."""
    height, width = _sizes(1, size, 0.5)
    return {"inputs": 3 * height * width, "classes": len(class_folders(Path(root), _LAYOUT))}


@dataclass(frozen=True)
class ClipReader:
    """Reads a clip, a video file or a folder of frames, as uint8 (frames, height · width · 3)."""

    frames: int
    height: int
    width: int

    def __call__(self, path: Path, _: int | None) -> Tensor:
        """Return the clip. Raises `DataError` if it cannot be read."""
        if path.is_dir():
            files = _frames(path)
            images = (decoded(files[k]) for k in self._middles(len(files)))
            resized = [np.array(image.resize((self.width, self.height), Image.Resampling.BILINEAR)) for image in images]
        else:
            resized = self._video(path)
        return torch.from_numpy(np.stack(resized)).reshape(self.frames, -1)

    def _middles(self, count: int) -> list[int]:
        """Return the indices of the middle frames of equal parts; in a short clip some indices repeat."""
        return [int((k + 0.5) * count / self.frames) for k in range(self.frames)]

    def _video(self, path: Path) -> list[np.ndarray]:
        av = _av()
        options = {"format_whitelist": _CONTAINERS}  # together with _refuse: no other file or address can be opened
        decoded_frames: dict[int, np.ndarray] = {}
        try:
            with path.open("rb") as file, av.open(file, options=options, io_open=_refuse) as container:
                count = sum(1 for packet in container.demux(video=0) if packet.size)
            indices = self._middles(count)
            with path.open("rb") as file, av.open(file, options=options, io_open=_refuse) as container:
                for index, frame in enumerate(container.decode(video=0)):
                    if index in indices or index == 0:
                        _require_size(path, frame.width, frame.height)
                        image = frame.reformat(self.width, self.height, "rgb24", interpolation="AREA")
                        decoded_frames[index] = image.to_ndarray()
                    if index >= indices[-1]:
                        break
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - a broken video can raise any exception
            raise unreadable(path, error, "a video file") from None
        if not decoded_frames:
            raise DataError(f"{path}: no frames found; expected a video file")
        # A packet may hold no frame: then the frame before it is used.
        return [decoded_frames[max(k for k in decoded_frames if k <= index)] for index in indices]


def _require_size(path: Path, width: int, height: int) -> None:
    if width * height > _PIXELS:
        raise DataError(f"{path}: expected frames of at most {_PIXELS} pixels, got {width}×{height}; make the video smaller")


def _sizes(frames: int, size: Sequence[int], test_fraction: float | None) -> tuple[int, int]:
    if frames < 1 or len(size) != 2 or min(size) < 1 or not 0 < (_SHARE if test_fraction is None else test_fraction) < 1:
        raise DataError(
            "video: expected frames ≥ 1, size [height, width] and test_fraction between 0 and 1, got "
            f"frames={frames}, size={list(size)}, test_fraction={test_fraction}"
        )
    return size[0], size[1]


def _marks(
    folder: Path,
    paths: Sequence[Path],
    labels: np.ndarray,
    seed: int,
    test_groups: Sequence[int] | None,
    test_fraction: float | None,
    lists: str | None,
    split: int | None,
) -> tuple[np.ndarray, str]:
    """Return the split of each clip, and a description of how the clips were split."""
    if lists is None and split is not None:
        raise DataError(f"{folder}: split {split} is that of published lists: give lists, their folder, or remove split")
    if lists is not None and test_fraction is not None:
        raise DataError(f"{folder}: expected either lists or test_fraction to select the test clips, got both; remove one")
    share = _SHARE if test_fraction is None else test_fraction
    if lists is not None:
        if test_groups is not None:
            raise DataError(
                f"{folder}: expected either lists or test_groups to select the test clips, got both; remove one of them"
            )
        number = 1 if split is None else split
        return by_list(folder, paths, Path(lists), number), f"its list {number}"
    groups = groups_of(folder, paths)
    if groups is not None:
        return by_group(folder, groups, test_groups, share, seed), "group"
    if test_groups is not None:
        raise DataError(f"{folder}: test_groups expects clips named v_<class>_<group>, got {paths[0].name}; remove test_groups")
    return by_class(labels, share, seed), "clip"


def _clips(folder: Path) -> tuple[list[Path], tuple[Path, ...]]:
    """Return the clips of a class, folders of images and video files, and the files that are neither."""
    listing = files_below(folder, SUFFIXES | VIDEOS, _LAYOUT)
    files = [path for path in listing.files if path.suffix.lower() in VIDEOS]
    folders = {path.parent for path in listing.files if path.suffix.lower() in SUFFIXES}
    clips: dict[Path, Path] = {}
    for path in (*folders, *files):  # the frames of a video may lie beside it
        clip = path if path in folders else path.with_suffix("")
        if clip in clips:
            names = " and ".join(sorted({clips[clip].name, path.name}))
            raise DataError(f"{clip}: the same clip twice, {names}; keep one of them")
        clips[clip] = path
    if not clips:
        raise DataError(f"{folder}: no clips found; expected {_LAYOUT}")
    # The files of a folder stand before its subfolders: the order decides which clips a seed picks.
    ordered = sorted(clips.values(), key=lambda path: (path.parts, "") if path in folders else (path.parent.parts, path.name))
    return ordered, listing.others


def _frames(folder: Path) -> list[Path]:
    """Return the images of a folder in the order of the numbers in their names: f2.jpg before f10.jpg."""
    frames: dict[tuple[tuple[str, int], ...], Path] = {}
    for path in folder.iterdir():
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        key = tuple((text, int(digits or -1)) for text, digits in _NUMBERED.findall(path.stem))
        if key in frames:
            names = " and ".join(sorted((frames[key].name, path.name)))
            raise DataError(f"{folder}: {names} have the same number; expected each frame once")
        frames[key] = path
    return [frames[key] for key in sorted(frames)]


def _av() -> Any:
    try:
        return import_module("av")
    except ImportError:
        raise DataError(
            "reading video files needs PyAV: install the extra `video`, as in pip install '.[video]', or give folders of frames"
        ) from None


def _refuse(url: str, *_: Any) -> NoReturn:
    raise DataError(f"it asks for another file ({url[:80]})")
