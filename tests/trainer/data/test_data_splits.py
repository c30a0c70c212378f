"""Splits: batches that follow from the seed and the place alone, and CIFAR's folders, read without running what they hold."""

import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from tensorrail_runtime.errors import DataError
from tensorrail_trainer.data import Augment, Dataset, InMemory, Share
from tensorrail_trainer.data.cifar import cifar10, cifar100
from tensorrail_trainer.data.splits import arrays, in_order, shuffled

ALL = Augment(shift=2, flip=True, cutout=3)


def split(count=20, size=8, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 256, (count, 3, size, size), generator=generator).to(dtype)
    return InMemory(x, torch.arange(count) % 4, torch.tensor(7.0), torch.tensor(2.0))


def plain(x, y=None):
    return InMemory(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y)


def one(data, picks, **arguments):
    return [torch.cat(parts) for parts in zip(*data.batches(picks, **arguments), strict=True)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("augment", [None, ALL])
def test_the_shares_of_processes_are_together_the_batches_of_one(world, augment):
    data, picks = split(), shuffled(20, 6, 1)
    whole = list(data.batches(picks, augment=augment, seed=5))
    shares = [list(data.batches(picks, Share(rank, world), augment, 5)) for rank in range(world)]
    assert len(whole) == 3
    for index, (x, y) in enumerate(whole):
        for rank in range(world):
            assert torch.equal(shares[rank][index][0], x[rank::world])
            assert torch.equal(shares[rank][index][1], y[rank::world])


def test_more_processes_than_samples_leave_some_without_any():
    x, y = one(split(), [torch.arange(2)], share=Share(2, 3))
    assert x.shape == (0, 3, 8, 8)
    assert len(y) == 0


def test_augmentation_follows_the_seed():
    data, picks = split(), in_order(20, 10)
    first, again, other, none = (
        one(data, picks, augment=augment, seed=seed)[0] for augment, seed in ((ALL, 3), (ALL, 3), (ALL, 4), (None, 3))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(none, (data.x.float() - 7) / 2)


def test_what_torch_drew_before_or_draws_next_has_no_part_in_it():
    data, picks = split(), in_order(20, 10)
    state = torch.get_rng_state()
    first = one(data, picks, augment=ALL)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(one(data, picks, augment=ALL)[0], first)
    torch.set_rng_state(state)


@pytest.mark.parametrize(("border", "mode"), [("zero", "constant"), ("edge", "edge"), ("reflect", "reflect")])
def test_a_shifted_image_is_a_window_of_the_padded_one(border, mode):
    image = split(1).x[0].numpy()
    moved = one(
        plain(torch.from_numpy(image)[None].repeat(60, 1, 1, 1)), [torch.arange(60)], augment=Augment(2, border=border)
    )[0]
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode=mode).astype(np.float32)
    windows = {padded[:, r : r + 8, c : c + 8].tobytes(): (r, c) for r in range(5) for c in range(5)}
    found = {windows[np.ascontiguousarray(each).tobytes()] for each in moved.numpy()}
    assert {r for r, _ in found} == {c for _, c in found} == set(range(5))


def test_a_flip_mirrors_about_half_of_the_images():
    image = split(1).x.float()
    flipped = one(plain(image.repeat(100, 1, 1, 1)), [torch.arange(100)], augment=Augment(flip=True))[0]
    mirrored = [torch.equal(each, image[0].flip(2)) for each in flipped]
    assert all(torch.equal(each, image[0]) for each, is_mirrored in zip(flipped, mirrored, strict=True) if not is_mirrored)
    assert 30 < sum(mirrored) < 70


@pytest.mark.parametrize("size", [3, 4])
def test_cutout_blanks_one_square_that_may_reach_over_the_border(size):
    image = split(1).x.float()
    cut = one(plain(image.repeat(200, 1, 1, 1)), [torch.arange(200)], augment=Augment(cutout=size))[0]
    areas = set()
    for each in cut:
        blank = (each == 0).all(0)
        assert torch.equal(each[:, ~blank], image[0][:, ~blank])
        rows, columns = blank.any(1).sum(), blank.any(0).sum()
        assert blank.sum() == rows * columns
        areas.add((int(rows), int(columns)))
    assert (size, size) in areas
    assert max(max(area) for area in areas) == size
    assert len(areas) > 1


def test_cutout_of_standardised_images_leaves_the_mean():
    data = InMemory(split(1).x.repeat(50, 1, 1, 1), torch.zeros(50, dtype=torch.int64), torch.tensor(7.0), torch.tensor(2.0))
    cut = one(data, [torch.arange(50)], augment=Augment(cutout=3))[0]
    changed = (cut != (data.x.float() - 7) / 2).any(1)
    assert changed.any()
    assert (cut.permute(0, 2, 3, 1)[changed] == 0).all()


def test_samples_that_are_no_images_stay_as_they_are():
    data = plain(torch.rand(6, 5, 4))
    assert torch.equal(one(data, in_order(6, 4), augment=ALL)[0], data.x)


def test_an_epoch_takes_every_sample_once_and_leaves_the_rest_of_a_batch_out():
    first, again, other = shuffled(23, 5, 0), shuffled(23, 5, 0), shuffled(23, 5, 1)
    assert [len(pick) for pick in first] == [5] * 4
    assert len(set(torch.cat(first).tolist())) == 20
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert shuffled(4, 5, 0) == []
    assert torch.cat(in_order(23, 5)).tolist() == list(range(23))


def test_a_split_comes_as_arrays_in_its_order():
    data = split()
    x, y = (np.concatenate(parts) for parts in zip(*arrays(data, 7), strict=True))
    np.testing.assert_array_equal(x, (data.x.numpy().astype(np.float32) - 7) / 2)
    np.testing.assert_array_equal(y, data.y.numpy())


def test_a_data_set_gives_the_first_test_samples_and_goes_to_a_device():
    data = Dataset("made", 4, split(20), split(3)).to(torch.device("cpu"))
    assert torch.equal(data.example(2), (data.test.x[:2].float() - 7) / 2)
    assert data.example(5).shape == (3, 3, 8, 8)
    moved = split().to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.x, moved.y, moved.mean, moved.deviation)} == {"meta"}


@pytest.mark.parametrize(("samples", "labels"), [(3, 4), (0, 0)])
def test_a_split_without_labels_for_its_samples_is_refused(samples, labels):
    with pytest.raises(ValueError, match=f"got {samples} samples and {labels} labels"):
        plain(torch.zeros(samples, 3), torch.zeros(labels, dtype=torch.int64))


class Python2(pickle._Pickler):
    """Writes strings as Python 2 did, with which CIFAR was published."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes
    dispatch[str] = lambda self, value: self.save_bytes(value.encode())


def publish(path, content, old):
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        (Python2 if old else pickle.Pickler)(file, protocol=2).dump(content)
    if old:
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))


def content(rng, count, classes):
    labels = {b"labels": rng.permutation(np.arange(count) % 10).tolist()}
    if classes == 100:
        fine = rng.permutation(np.arange(count) % 100)
        labels = {b"fine_labels": fine.tolist(), b"coarse_labels": (fine // 5).tolist()}
    data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": data, b"filenames": [b"a.png"] * count, b"batch_label": b"one"} | labels


def folder_of(classes):
    return {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]


def write_cifar(root, classes, rng, old=False):
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    made = {name: content(rng, 100 if name == "train" else 20, classes) for name in names}
    for name, each in made.items():
        publish(root / folder_of(classes) / name, each, old)
    return root / folder_of(classes), list(made.values())


@pytest.mark.parametrize("old", [False, True], ids=["python3", "python2"])
@pytest.mark.parametrize(("classes", "read"), [(10, cifar10), (100, cifar100)])
def test_cifar_is_read_from_its_published_folder(classes, read, old, tmp_path, rng):
    folder, made = write_cifar(tmp_path, classes, rng, old)
    assert (b"T\x04\x00\x00\x00data" in next(folder.iterdir()).read_bytes()) == old
    data = read(str(folder))
    assert data.classes == classes
    assert data.source == f"CIFAR-{classes} ({folder.name}), 100 training and 20 test images"
    pixels = np.concatenate([each[b"data"] for each in made[:-1]]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(data.train.x.numpy(), pixels)
    key = b"labels" if classes == 10 else b"fine_labels"
    np.testing.assert_array_equal(data.train.y.numpy(), np.concatenate([each[key] for each in made[:-1]]))
    np.testing.assert_array_equal(data.test.y.numpy(), made[-1][key])
    x, _ = one(data.train, in_order(100))
    expected = (pixels - pixels.mean((0, 2, 3), keepdims=True)) / pixels.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("classes", "read"), [(10, cifar10), (100, cifar100)])
def test_cifar_is_standardised_by_the_constants_given(classes, read, tmp_path, rng):
    folder, made = write_cifar(tmp_path, classes, rng)
    x, _ = one(read(str(folder), [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]).test, in_order(20))
    pixels = made[-1][b"data"].reshape(-1, 3, 32, 32) / 255
    expected = (pixels - np.array([0.5, 0.4, 0.3]).reshape(3, 1, 1)) / np.array([0.2, 0.25, 0.3]).reshape(3, 1, 1)
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-5)
    for constants, wrong in (
        (([0.5, 0.4, 0.3], None), "std: expected three numbers, one per channel, for pixel values from 0 to 1, got None"),
        (([0.5, 0.4], [0.2, 0.25, 0.3]), "mean: expected three numbers, one per channel"),
        (([0.5, 0.4, "a"], [0.2, 0.25, 0.3]), "mean: expected three numbers, one per channel"),
        (([0.5, 0.4, 0.3], [0.2, 0.25, 0]), "std: expected numbers above 0"),
    ):
        with pytest.raises(DataError, match=wrong):
            read(str(folder), *constants)


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(("classes", "read", "name"), [(10, cifar10, "data_batch_3"), (100, cifar100, "test")])
def test_a_hostile_pickle_runs_nothing(classes, read, name, tmp_path, rng):
    folder, _ = write_cifar(tmp_path, classes, rng)
    proof = tmp_path / "ran"
    for hostile, asked in (
        (Hostile(Path.touch, proof), r"pathlib\.|(__builtin__|builtins)\.getattr"),
        (Hostile(eval, f"open({str(proof)!r}, 'w')"), r"__builtin__\.eval|builtins\.eval"),  # noqa: S307 - never called
        (Hostile(np.load, str(proof)), r"numpy\.load"),
    ):
        publish(folder / name, {b"data": hostile}, old=False)
        with pytest.raises(DataError, match=rf"{name}: not a published CIFAR file \(it asks for ({asked})"):
            read(str(folder))
        assert not proof.exists()


@pytest.mark.parametrize(
    ("where", "hostile"),
    [
        (b"labels", [Hostile(np.ndarray, (1,), "O", b"A" * 8)]),  # an object at an address that the file chose
        (b"labels", Hostile(np.ndarray, (20,), "i8")),
        (b"data", np.array([{}], object)),
        (b"data", np.zeros(20, [("a", "i4"), ("b", "O")])),
    ],
)
def test_a_file_does_not_choose_where_its_arrays_lie(where, hostile, tmp_path, rng):
    folder, made = write_cifar(tmp_path, 10, rng)
    publish(folder / "test_batch", made[-1] | {where: hostile}, old=False)
    with pytest.raises(DataError, match=r"test_batch: not a published CIFAR file"):
        cifar10(str(folder))


def test_labels_may_be_an_array(tmp_path, rng):
    folder, made = write_cifar(tmp_path, 10, rng)
    publish(folder / "test_batch", made[-1] | {b"labels": np.array(made[-1][b"labels"], ">i4")}, old=False)
    assert cifar10(str(folder)).test.y.tolist() == made[-1][b"labels"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({b"data": np.zeros((20, 3071), np.uint8)}, r"expected uint8 data of shape \(20, 3072\)"),
        ({b"data": np.zeros((19, 3072), np.uint8)}, r"expected uint8 data of shape \(20, 3072\)"),
        ({b"data": np.zeros((20, 3072), np.int16)}, r"expected uint8 data of shape \(20, 3072\)"),
        ({b"data": np.zeros((20, 3072), np.float32)}, r"holds an array of 'f4', which no CIFAR file needs"),
        ({b"data": b"bytes"}, r"expected uint8 data of shape \(20, 3072\)"),
        ({b"labels": [[0] * 20] * 20}, "expected labels that are integers from 0"),
        ({b"labels": np.zeros((20, 1), np.int64)}, "expected labels that are integers from 0"),
        ({b"labels": []}, r"expected uint8 data of shape \(0, 3072\)"),
        ({b"data": [0] * 20}, r"expected uint8 data of shape \(20, 3072\)"),
        ({b"labels": [-1] * 20}, "expected labels that are integers from 0"),
        ({b"labels": [0.5] * 20}, "expected labels that are integers from 0"),
        ({b"labels": [10] * 20}, r"expected labels 0 to 9, got 10; check that it is the folder of CIFAR-10"),
    ],
)
def test_cifar_of_other_shapes_is_refused(changes, reason, tmp_path, rng):
    folder, _ = write_cifar(tmp_path, 10, rng)
    publish(folder / "data_batch_2", content(rng, 20, 10) | changes, old=False)
    with pytest.raises(DataError, match=reason) as raised:
        cifar10(str(folder))
    assert "\n" not in str(raised.value)


def test_what_is_no_cifar_folder_is_refused(tmp_path, rng):
    with pytest.raises(DataError, match=r"data_batch_1: cannot be read \(No such file"):
        cifar10(str(tmp_path))
    folder, _ = write_cifar(tmp_path, 100, rng)
    (folder / "train").write_bytes(b"\x80\x02 no pickle")
    with pytest.raises(DataError, match=r"train: not a published CIFAR file \("):
        cifar100(str(folder))
    publish(folder / "train", {b"data": 1}, old=False)
    with pytest.raises(DataError, match="expected the keys data and fine_labels"):
        cifar100(str(folder))
    publish(folder / "train", [1, 2], old=False)
    with pytest.raises(DataError, match="expected the keys data and fine_labels"):
        cifar100(str(folder))


def test_images_for_validation_are_left_out_of_training_and_always_the_same(tmp_path, rng):
    folder, _ = write_cifar(tmp_path, 10, rng)
    whole, apart, again = (cifar10(str(folder), validation=count) for count in (0, 20, 20))
    assert "80 training and 20 validation images" in apart.source
    assert (len(apart.train), len(apart.test)) == (len(whole.train) - 20, 20)
    assert torch.equal(apart.test.x, again.test.x)
    assert torch.bincount(apart.test.y).tolist() == [2] * 10
    pixels = {
        split: {image.numpy().tobytes() for image in split_.x} for split, split_ in (("a", apart.train), ("b", apart.test))
    }
    assert not pixels["a"] & pixels["b"]
    assert pixels["a"] | pixels["b"] == {image.numpy().tobytes() for image in whole.train.x}
    for count in (15, -10, 100):
        with pytest.raises(DataError, match=f"validation: expected a multiple of the 10 classes below 100, got {count}"):
            cifar10(str(folder), validation=count)
