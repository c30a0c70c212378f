"""Data sets that are read from files, generated, or made by anybody's function."""

import pickle
import random
import struct
import sys
import wave
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tensorrail_runtime.errors import DataError
from tensorrail_runtime.feeds.pictures import Preprocessing, picture
from tensorrail_trainer.data import DATASETS, Augment, Files, InMemory, Mapped, Share, source_of
from tensorrail_trainer.data.images import decoded, images
from tensorrail_trainer.data.shapes import MOTIONS, SHAPES, moving_shapes
from tensorrail_trainer.data.speech import speech
from tensorrail_trainer.data.splits import in_order, shuffled
from tensorrail_trainer.data.video import video
from tensorrail_trainer.networks.recurrent import LSTMClassifier

# torch says so where there are fewer cores than processes; the answer is the same
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def one(data, picks=None, **arguments):
    picks = in_order(len(data), 4) if picks is None else picks
    return [torch.cat(parts) for parts in zip(*data.batches(picks, **arguments), strict=True)]


def refused(call, reason):
    with pytest.raises(DataError, match=reason) as raised:
        call()
    assert "\n" not in str(raised.value)


# files


def noisy(path, seed):
    values = torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy()).float()
    return values if seed is None else values + random.Random(seed).random()  # noqa: S311


@pytest.fixture
def files(tmp_path):
    for k in range(11):
        (tmp_path / f"{k}.bin").write_bytes(bytes([k, 2 * k, 3 * k]))
    return Files([tmp_path / f"{k}.bin" for k in range(11)], torch.arange(11), noisy, workers=0)


def with_workers(files, workers):
    return Files(files.paths, files.y, files.read, files.mean, files.deviation, workers)


def test_files_are_read_alike_by_any_number_of_workers_and_processes(files):
    picks = shuffled(11, 4, 0)
    whole = list(files.batches(picks, augment=Augment(), seed=7))
    for index, (x, y) in enumerate(with_workers(files, 2).batches(picks, augment=Augment(), seed=7)):
        assert torch.equal(x, whole[index][0])
        assert torch.equal(y, whole[index][1])
    for rank in range(3):
        for index, (x, y) in enumerate(files.batches(picks, Share(rank, 3), Augment(), 7)):
            assert torch.equal(x, whole[index][0][rank::3])
            assert torch.equal(y, whole[index][1][rank::3])


def test_chance_in_a_file_follows_from_the_seed_and_the_index_alone(files):
    first, other = (one(files, [torch.tensor([3, 5, 8])], augment=Augment(), seed=seed)[0] for seed in (1, 2))
    assert torch.equal(one(files, [torch.tensor([8]), torch.tensor([3])], augment=Augment(), seed=1)[0], first[[2, 0]])
    noise = first - torch.tensor([[k, 2 * k, 3 * k] for k in (3, 5, 8)])
    assert len({round(float(each), 4) for each in noise[:, 0]}) == 3
    assert not torch.equal(first, other)
    assert torch.equal(one(files, seed=1)[0][5], torch.tensor([5.0, 10.0, 15.0]))


def test_reading_files_draws_nothing_from_torchs_own_generator(files):
    state = torch.get_rng_state()
    one(files, augment=Augment())
    assert torch.equal(torch.get_rng_state(), state)


def test_files_are_standardised_held_in_memory_and_shared_out_to_nobody(files):
    data = Files(files.paths, files.y, noisy, torch.tensor(2.0), torch.tensor(4.0), 0)
    x, y = one(data)
    assert torch.equal(x, (torch.tensor([[k, 2 * k, 3 * k] for k in range(11)]) - 2) / 4)
    held = data.held()
    assert torch.equal(one(held)[0], x)
    assert torch.equal(held.y, y)
    empty, none = one(data, [torch.arange(2)], share=Share(2, 3))
    assert (tuple(empty.shape), len(none)) == ((0, 3), 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_is_named(files, workers):
    files.paths[9].unlink()
    refused(lambda: one(with_workers(files, workers)), r"9\.bin: cannot be read \(No such file")


def test_files_of_other_shapes_are_named(files):
    files.paths[5].write_bytes(b"ab")
    refused(lambda: one(files), r"sample 5: expected \(3,\) torch.float32, as sample 4 is, got \(2,\) torch.float32")
    for path in files.paths:
        path.write_bytes(b"ab")
    for path in files.paths[:4]:
        path.write_bytes(b"abc")
    refused(files.held, "sample 4: expected .*, as sample 0 is")


def test_files_without_labels_and_workers_that_cannot_be_are_refused(files):
    with pytest.raises(ValueError, match="expected one label per file and at least one file, got 11 files and 3 labels"):
        Files(files.paths, torch.arange(3), noisy)
    refused(lambda: with_workers(files, -1), "workers: expected 0 .*, got -1")


# images


def save_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path, rng):
    for name, per_class in (("train", 4), ("val", 2)):
        for one_class in ("cat", "ant"):
            for k in range(per_class):
                save_image(tmp_path / name / one_class / f"{k}.png", rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    return tmp_path


def standardised(pixels):
    return (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])


def test_images_are_read_by_class_and_standardised(folder):
    data = images(str(folder), size=32, workers=0)
    assert (data.classes, len(data.train), len(data.test)) == (2, 8, 4)
    assert data.train.y.tolist() == [0] * 4 + [1] * 4
    assert data.train.paths[0].parent.name == "ant"
    save_image(folder / "val" / "ant" / "0.png", np.full((50, 70, 3), (200, 100, 0), np.uint8))
    x, y = one(data.test)
    assert (tuple(x.shape), y.tolist()) == ((4, 3, 32, 32), [0, 0, 1, 1])
    expected = standardised(np.array([200, 100, 0])).reshape(3, 1, 1)
    np.testing.assert_allclose(x[0].numpy(), np.broadcast_to(expected, (3, 32, 32)), atol=1e-5)


def test_a_test_image_is_the_middle_of_one_drawn_to_256_of_224(folder, rng):
    pixels = rng.integers(0, 256, (256, 400, 3), dtype=np.uint8)  # as high as it is drawn: nothing is resampled
    save_image(folder / "val" / "ant" / "0.png", pixels)
    x, _ = one(images(str(folder), workers=0).test, [torch.tensor([0])])
    np.testing.assert_allclose(x[0].numpy(), standardised(pixels[16:240, 88:312]).transpose(2, 0, 1), atol=1e-5)


def test_of_a_long_image_only_the_middle_is_drawn(folder, monkeypatch):
    drawn, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *more: drawn.append(size) or resize(self, size, *more))
    pixels = np.zeros((2, 4000, 3), np.uint8)
    pixels[:, 1990:2010] = 255
    save_image(folder / "val" / "ant" / "0.png", pixels)
    save_image(folder / "val" / "ant" / "1.png", pixels.transpose(1, 0, 2))
    x, _ = one(images(str(folder), workers=0).test, [torch.tensor([0, 1])])
    np.testing.assert_allclose(
        x.numpy(), np.broadcast_to(standardised(np.full(3, 255)).reshape(1, 3, 1, 1), x.shape), atol=1e-5
    )
    assert drawn == [(8 * 256, 256), (256, 8 * 256)]


def test_a_grey_image_and_one_with_transparency_have_three_channels(folder):
    save_image(folder / "val" / "ant" / "0.png", np.full((40, 40), 9, np.uint8))
    save_image(folder / "val" / "ant" / "1.png", np.full((40, 40, 4), 9, np.uint8))
    x, _ = one(images(str(folder), size=8, workers=0).test)
    np.testing.assert_allclose(x[:2].numpy(), np.full((2, 3, 8, 8), standardised(np.full(3, 9)).reshape(3, 1, 1)), atol=1e-5)


def test_greys_of_16_bits_are_scaled(folder):
    ramp = np.linspace(0, 65535, 40 * 40).astype(np.uint16).reshape(40, 40)
    save_image(folder / "val" / "ant" / "0.png", ramp)
    save_image(folder / "val" / "ant" / "1.png", (ramp >> 8).astype(np.uint8))
    x, _ = one(images(str(folder), size=8, workers=0).test)
    np.testing.assert_array_equal(x[0].numpy(), x[1].numpy())


def test_training_images_are_random_windows_that_the_seed_decides(folder):
    # red counts the columns and green the rows, so that a window shows where it was cut
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(100)[:, None]
    for path in (folder / "train").rglob("*.png"):
        save_image(path, ramp)
    data = images(str(folder), size=16, workers=0).train
    first, again, other = (one(data, augment=Augment(), seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(one(data)[0][0], one(data)[0][5])
    values = first * torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    columns, rows = values[:, 0].mean(1) * 255, values[:, 1].mean(2) * 255
    rising = columns[:, -1] > columns[:, 0]
    assert rising.any()
    assert not rising.all()
    assert (rows[:, -1] > rows[:, 0]).all()
    widths, heights = (columns[:, -1] - columns[:, 0]).abs() * 16 / 15, (rows[:, -1] - rows[:, 0]) * 16 / 15
    assert ((widths * heights > 0.07 * 20000) & (widths / heights > 0.7) & (widths / heights < 1.4)).all()
    assert len({round(float(width)) for width in widths}) > 4


def test_a_split_travels_to_processes_that_are_not_forked(folder):
    data = images(str(folder), size=8, workers=0).train
    copy = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert torch.equal(copy.sample(3, 5)[0], data.sample(3, 5)[0])


def test_what_a_model_must_know_of_images_is_known_from_the_folders(folder):
    assert DATASETS["images"].known(root=str(folder), size=64) == {"channels": 3, "classes": 2, "size": 64}


def png(width, height):
    """A PNG that says it is that large, and holds one line."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not an image", r"expected a JPEG, PNG, WebP, BMP, TIFF, GIF or PPM image"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            r"expected a JPEG, PNG, WebP, BMP, TIFF, GIF or PPM image",
        ),
        (b"", r"expected a JPEG, PNG, WebP, BMP, TIFF, GIF or PPM image"),
        (png(10_000, 10_000), r"expected at most 89478485 pixels, got 10000×10000"),
        (png(60_000, 60_000), r"cannot be read \(Image size \(3600000000 pixels\) exceeds limit"),
        (png(100, 100), r"cannot be read \("),
    ],
    ids=["text", "eps", "empty", "large", "bomb", "short"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_image_is_refused_by_its_path(content, reason, workers, folder):
    (folder / "train" / "cat" / "2.png").write_bytes(content)
    refused(lambda: one(images(str(folder), size=8, workers=workers).train), rf"train/cat/2\.png: .*{reason}")


def test_folders_that_are_no_data_set_are_refused(folder, tmp_path):
    refused(lambda: images(str(tmp_path / "none")), r"none/train: cannot be read \(No such file.*the layout <split>/<class>")
    refused(lambda: images(str(folder), test="test"), r"/test: cannot be read")
    refused(lambda: images(str(folder), size=0), "size=0 and smallest=0.08")
    (folder / "train" / "bee").mkdir()
    refused(lambda: images(str(folder)), r"train/bee: no images found; expected files ending in \.bmp, \.gif, \.jpeg, \.jpg")
    (folder / "train" / "bee").rmdir()
    save_image(folder / "val" / "dog" / "0.png", np.zeros((4, 4, 3), np.uint8))
    refused(lambda: images(str(folder)), r"val/dog: not one of the 2 classes of .*train;")


def test_images_of_any_suffix_and_in_subfolders_are_read_and_other_files_named(folder):
    cats = folder / "train" / "cat"
    for name in ("4.gif", "5.TIF", "deep/er/6.JPEG"):
        save_image(cats / name, np.full((40, 40, 3), 90, np.uint8))
    for name in ("._0.png", ".ipynb_checkpoints/0.png", "notes.txt", "7.heic", "deep/8.svg"):
        (cats / name).parent.mkdir(exist_ok=True)
        (cats / name).write_bytes(b"none")
    (folder / "val" / "loose.png").write_bytes(b"")
    (folder / "linked").symlink_to(folder / "train" / "ant", target_is_directory=True)
    (cats / "more").symlink_to(folder / "linked", target_is_directory=True)
    (cats / "deep" / "back").symlink_to(cats, target_is_directory=True)
    data = images(str(folder), size=8, workers=0)
    assert [path.name for path in data.train.paths] == ["0.png", "1.png", "2.png", "3.png"] * 2 + [
        "4.gif",
        "5.TIF",
        "6.JPEG",
        *(f"{k}.png" for k in range(4)),
    ]
    x, _ = one(data.train)
    assert torch.isfinite(x).all()
    train, test = data.left_out
    assert "train: 3 files left out, cat/7.heic, cat/deep/8.svg, cat/notes.txt: expected images in folders of classes" in train
    assert "val: 1 file left out, loose.png: expected images" in test
    assert images(str(folder), test="train", workers=0).to(torch.device("cpu")).left_out == (train, train)


# a square of four colours, as it lies in the file for each EXIF orientation
FOUR = np.array([[1, 2], [3, 4]])
STORED = {1: FOUR, 2: FOUR[:, ::-1], 3: FOUR[::-1, ::-1], 4: FOUR[::-1], 5: FOUR.T}
STORED |= {6: np.rot90(FOUR, 1), 7: FOUR[::-1, ::-1].T, 8: np.rot90(FOUR, -1)}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_as_their_camera_was_held(orientation, suffix, tmp_path):
    pixels = np.kron(STORED[orientation], np.ones((16, 16), int))[..., None] * np.array([50, 50, 50])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels.astype(np.uint8)).save(file, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    shown = np.asarray(decoded(file)).astype(float)[8::16, 8::16, 0] / 50
    np.testing.assert_allclose(shown, FOUR, atol=0.05)
    values = picture(file, (3, 32, 32), Preprocessing((0, 0, 0), (1, 1, 1), 32))
    np.testing.assert_allclose(values[0, 8::16, 8::16] * 255 / 50, FOUR, atol=0.05)


def test_an_image_with_broken_metadata_is_read(tmp_path):
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffbroken")
    assert decoded(tmp_path / "a.jpg").size == (8, 8)


# speech


def save_wav(path, sound, rate=8000, width=2, channels=1):
    scale = {1: 127, 2: 2**15 - 1, 3: 2**23 - 1, 4: 2**31 - 1}[width]
    values = np.rint(np.repeat(sound[:, None], channels, 1) * scale).astype(np.int64)
    raw = (values + 128).astype(np.uint8) if width == 1 else values.astype("<i8")[..., None].view(np.uint8)[..., :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(raw).tobytes())


def tone(hertz, seconds=0.3, rate=8000):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


TONES = {1: 300, 2: 700, 3: 1500, 4: 3000}


@pytest.fixture
def recordings(tmp_path):
    for digit, hertz in TONES.items():
        for index in range(8):
            save_wav(tmp_path / f"{digit}_ann_{index}.wav", tone(hertz, 0.2 + 0.05 * index))
    return tmp_path


def test_recordings_are_split_by_their_index_and_standardised(recordings):
    data = speech(str(recordings), frames=64)
    assert (data.classes, len(data.train), len(data.test)) == (10, 12, 20)
    assert data.train.y.tolist() == [digit for digit in TONES for _ in range(3)]
    assert data.train.x.shape == (12, 64, 40)
    assert data.train.x.dtype == torch.float32
    windows = data.train.x[data.train.x.abs().sum(2) > 0]
    assert windows.mean(0).abs().max() < 1e-5
    assert (windows.std(0, correction=0) - 1).abs().max() < 1e-4
    assert DATASETS["speech"].known(root="", bands=40) == {"inputs": 40, "classes": 10}


def test_a_short_recording_has_zeros_before_it_and_a_long_one_is_cut(recordings):
    data = speech(str(recordings), frames=40)
    first = data.test.x[0]  # 0.2 s: 1600 samples, 18 windows of 200 every 80
    assert first[:22].abs().max() == 0
    assert (first[22:].abs().sum(1) > 0).all()
    last = data.train.x[2]  # 0.55 s: 53 windows
    assert (last.abs().sum(1) > 0).all()
    whole = speech(str(recordings), frames=60).train
    assert (whole.x[2].abs().sum(1) > 0).sum() == 53


def test_a_tone_is_loudest_in_the_band_of_its_frequency(recordings):
    data = speech(str(recordings), bands=20)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 22) / 2595) - 1)
    middle = data.test.x[::5, -10].numpy()  # a window of each digit
    for digit, loud in zip(TONES, middle, strict=True):
        nearest = np.abs(edges[1:-1] - TONES[digit]).argmin()
        others = np.delete(middle, list(TONES).index(digit), 0)
        assert (loud[nearest] > others[:, nearest] + 1).all()


def test_cepstra_are_fewer_and_another_basis_of_the_same(recordings):
    data = speech(str(recordings), features="mfcc", coefficients=5)
    assert data.train.x.shape == (12, 64, 5)
    assert DATASETS["speech"].known(root="", features="mfcc", coefficients=5) == {"inputs": 5, "classes": 10}
    assert "mfcc 64×5, 12 training and 20 test recordings" in data.source


@pytest.mark.parametrize(("width", "channels", "tolerance"), [(1, 1, 0.2), (4, 1, 0.01), (2, 2, 0.0)])
def test_other_samples_of_the_same_sound_have_the_same_features(width, channels, tolerance, recordings):
    plain = speech(str(recordings)).test.x[0]
    save_wav(recordings / "1_ann_0.wav", tone(300, 0.2), width=width, channels=channels)
    found = speech(str(recordings)).test.x[0]
    loud = plain > plain.max() - 1  # what is not loud is the noise of rounding
    assert (found - plain)[loud].abs().max() <= tolerance


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "1_ann_3.wav").write_bytes(b"RIFF no wav"), r"1_ann_3\.wav: cannot be read .*expected a wav file"),
        (lambda f: (f / "1_ann_3.wav").write_bytes(b""), r"1_ann_3\.wav: cannot be read .*expected a wav file"),
        (lambda f: save_wav(f / "1_ann_3.wav", np.zeros(0)), r"1_ann_3\.wav: expected a recording .*, got 0 samples at 8000"),
        (
            lambda f: save_wav(f / "1_ann_3.wav", np.zeros(9), 2**31 - 1),
            r"up to 400000 samples per second, got .* samples at 2147483647",
        ),
        (lambda f: save_wav(f / "1_ann_3.wav", tone(300), width=3), r"expected 8, 16 or 32 bits per sample, got 24"),
        (lambda f: save_wav(f / "4_ann_9.wav", tone(300), rate=16000), r"4_ann_9\.wav: expected 8000 .*, got 16000"),
        (lambda f: save_wav(f / "seven.wav", tone(300)), r"seven\.wav: expected a file name such as 7_jackson_32\.wav"),
        (lambda f: [path.unlink() for path in f.glob("*_ann_[0-4].wav")], "found 12 training and 0 test recordings"),
    ],
)
def test_recordings_that_cannot_be_used_are_named(spoil, reason, recordings):
    spoil(recordings)
    refused(lambda: speech(str(recordings)), reason)


def test_recordings_in_capitals_and_subfolders_count_and_other_files_are_named(recordings):
    before = speech(str(recordings))
    (recordings / "1_ann_6.wav").rename(recordings / "1_ann_6.WAV")
    (recordings / "more").mkdir()
    (recordings / "1_ann_7.wav").rename(recordings / "more" / "1_ann_7.wav")
    (recordings / "._1_ann_5.wav").write_bytes(b"\0\5\x16\7")
    (recordings / "2_ann_0.mp3").write_bytes(b"")
    after = speech(str(recordings))
    assert (len(after.train), len(after.test)) == (len(before.train), len(before.test)) == (12, 20)
    assert sorted(after.train.y.tolist()) == sorted(before.train.y.tolist())
    assert before.left_out == ()
    assert "1 file left out, 2_ann_0.mp3: expected wav files" in after.left_out[0]
    save_wav(recordings / "more" / "2_ann_3.wav", tone(700))
    refused(lambda: speech(str(recordings)), r"more/2_ann_3.wav: is also .*/2_ann_3.wav; expected each recording once")


def test_features_that_cannot_be_are_refused(recordings, tmp_path):
    refused(lambda: speech(str(recordings), features="raw"), "unknown features 'raw'; expected one of logmel, mfcc")
    refused(lambda: speech(str(recordings), bands=400), "bands=400 is too many for 8000 samples per second")
    refused(lambda: speech(str(recordings), features="mfcc", bands=9), "bands=9, coefficients=13")
    refused(lambda: speech(str(tmp_path / "none")), r"none: cannot be read \(No such file.*expected a folder of wav files")


# video


def save_clip(folder, colours, size=(12, 16)):
    for k, colour in enumerate(colours):
        save_image(folder / f"{k:03}.png", np.full((*size, 3), colour, np.uint8))


@pytest.fixture
def ucf(tmp_path):
    for one_class, colour in (("biking", 10), ("diving", 200)):
        for group in range(1, 6):
            for clip in (1, 2):
                name = f"v_{one_class}_{group:02}"
                save_clip(
                    tmp_path / one_class / name / f"{name}_{clip:02}", [colour + k for k in range(2 * clip, 2 * clip + 4)]
                )
    return tmp_path


def group_of(path):
    return int(path.parent.name.rpartition("_")[2])


def test_clips_are_a_few_frames_in_the_middle_of_equal_parts(ucf):
    data = video(str(ucf), 0, frames=2, size=[6, 8], workers=0)
    x, _ = one(data.train, [torch.tensor([0])])
    assert x.shape == (1, 2, 6 * 8 * 3)
    values = x[0] * 0.225 * 255 + 0.45 * 255
    torch.testing.assert_close(values, torch.tensor([[13.0], [15.0]]).expand(2, 144), atol=1e-3, rtol=0)
    long = one(video(str(ucf), 0, frames=8, size=[6, 8], workers=0).train, [torch.tensor([0])])[0][0]
    assert [round(float(frame[0] * 0.225 * 255 + 0.45 * 255)) for frame in long] == [12, 12, 13, 13, 14, 14, 15, 15]
    assert DATASETS["video"].known(root=str(ucf), size=[6, 8]) == {"inputs": 144, "classes": 2}


@pytest.mark.parametrize("name", ["f{}", "{}", "a 7 b{:x<1}", "frame-{}-of-12"])
def test_frames_are_in_the_order_of_their_numbers(name, tmp_path):
    for one_class in ("run", "walk"):
        for clip in range(5):
            for k in range(12):
                path = tmp_path / one_class / f"clip{clip}" / f"{name.format(k)}.png"
                save_image(path, np.full((8, 10, 3), 20 * k, np.uint8))
    data = video(str(tmp_path), 0, frames=12, size=(4, 5), workers=0)
    assert data.train.x[0].reshape(12, -1)[:, 0].tolist() == [20 * k for k in range(12)]
    save_image(tmp_path / "run" / "clip3" / f"{name.format(7)}.jpg", np.zeros((8, 10, 3), np.uint8))
    refused(
        lambda: video(str(tmp_path), 0, frames=12, size=(4, 5), workers=0),
        r"clip3: .*\.jpg and .*\.png have the same number; expected each frame once",
    )


def test_a_clip_that_is_there_twice_is_refused_and_other_files_are_named(ucf):
    clip = ucf / "biking" / "v_biking_01" / "v_biking_01_01"
    (ucf / "readme.txt").write_text("")
    clip.with_suffix(".wmv").write_bytes(b"")
    (note,) = video(str(ucf), 0, frames=1, size=[6, 8], workers=0).left_out
    assert "2 files left out, readme.txt, biking/v_biking_01/v_biking_01_01.wmv: expected videos (.avi, " in note
    clip.with_suffix(".AVI").write_bytes(b"")
    refused(
        lambda: video(str(ucf), 0, frames=1, size=[6, 8], workers=0),
        r"v_biking_01_01: the same clip twice, v_biking_01_01 and v_biking_01_01\.AVI; keep one of them",
    )


def test_the_values_of_a_frame_are_its_rows_pixel_by_pixel(ucf, rng):
    pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    for k in range(4):
        save_image(ucf / "biking" / "v_biking_01" / "v_biking_01_01" / f"{k:03}.png", pixels)
    data = video(str(ucf), 0, frames=1, size=[6, 8], test_groups=[2], workers=0)
    np.testing.assert_array_equal(data.train.x[0, 0].numpy(), pixels.reshape(-1))


@pytest.mark.parametrize("memory", [True, False])
def test_no_group_is_on_both_sides(memory, ucf):
    chosen = video(str(ucf), 0, frames=2, size=[6, 8], test_groups=[2, 5], memory=memory, workers=0)
    assert (len(chosen.train), len(chosen.test)) == (12, 8)
    assert chosen.source.endswith("split by group; 12 training and 8 test clips")
    lazy = video(str(ucf), 0, frames=2, size=[6, 8], test_groups=[2, 5], memory=False, workers=0)
    assert {group_of(path) for path in lazy.test.paths} == {2, 5}
    assert {group_of(path) for path in lazy.train.paths} == {1, 3, 4}
    assert torch.equal(one(chosen.test)[0], one(lazy.test)[0])
    assert torch.equal(one(chosen.test)[1], lazy.test.y)


def test_the_seed_picks_groups_where_none_are_named(ucf):
    picked = [video(str(ucf), seed, frames=1, size=[6, 8], memory=False, workers=0).test.paths for seed in (0, 0, 1, 2, 3)]
    groups = [{group_of(path) for path in paths} for paths in picked]
    assert all(len(each) == 1 for each in groups)
    assert groups[0] == groups[1]
    assert len(set.union(*groups)) > 1


def test_groups_are_read_from_the_names_of_ucf101_and_flat_folders(tmp_path):
    for one_class in ("Biking", "Dive"):
        for group in (1, 2, 3):
            for clip in (1, 2):
                save_clip(tmp_path / one_class / f"v_{one_class}_g{group:02}_c{clip:02}", [1])
    data = video(str(tmp_path), 0, frames=1, size=[6, 8], test_groups=[3], memory=False, workers=0)
    assert [path.name for path in data.test.paths] == [f"v_{c}_g03_c{k:02}" for c in ("Biking", "Dive") for k in (1, 2)]


def test_clips_without_groups_are_split_by_class_and_seed(tmp_path):
    for one_class in ("run", "walk"):
        for k in range(10):
            save_clip(tmp_path / one_class / f"clip{k}", [k])
    first, again, other = (video(str(tmp_path), seed, frames=1, size=[6, 8], memory=False, workers=0) for seed in (0, 0, 1))
    assert first.test.y.tolist() == [0, 0, 1, 1]
    assert first.test.paths == again.test.paths != other.test.paths
    assert not set(first.test.paths) & set(first.train.paths)
    assert "split by clip; 16 training and 4 test clips" in first.source
    refused(lambda: video(str(tmp_path), 0, test_groups=[1]), r"test_groups expects clips named v_<class>_<group>")
    refused(lambda: video(str(tmp_path), 0, split=2), r"split 2 is that of published lists: give lists")


@pytest.fixture
def hmdb(tmp_path):
    """Two classes of five clips, one a file of a video and the others folders of frames, with the lists of two splits."""
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    for one_class in ("brush_hair", "cartwheel"):
        names = [f"Film_(1)_{one_class}_f_cm_np1.5_ba_med_{k}" for k in range(5)]
        for k, name in enumerate(names[:4]):
            save_clip(tmp_path / "hmdb51" / one_class / name, [10 * k])
        (tmp_path / "hmdb51" / one_class / f"{names[4]}.avi").write_bytes(b"")
        for number, marks in ((1, "11202"), (2, "21102")):
            lines = [f"{name}.avi {mark} " for name, mark in zip(names, marks, strict=True)]
            (lists / f"{one_class}_test_split{number}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "hmdb51", lists


def listed(root, lists, **arguments):
    return video(
        str(root), 0, **({"frames": 1, "size": [6, 8], "memory": False, "workers": 0, "lists": str(lists)} | arguments)
    )


def test_the_published_lists_of_hmdb51_say_what_is_trained_on_tested_and_left_out(hmdb):
    for number, train, test in ((1, "01", "24"), (2, "12", "04")):
        data = listed(*hmdb, split=number)
        for paths, expected in ((data.train.paths, train), (data.test.paths, test)):
            assert sorted(path.name.removesuffix(".avi")[-1] for path in paths) == sorted(expected * 2)
        assert data.train.y.tolist() == data.test.y.tolist() == [0, 0, 1, 1]
        assert f"split by its list {number}; 4 training and 4 test clips" in data.source


def test_the_published_lists_of_ucf101_say_what_is_trained_on_and_tested(tmp_path):
    lines = {"train": [], "test": []}
    for label, one_class in enumerate(("Biking", "Dive"), 1):
        for group in (1, 2, 3):
            name = f"v_{one_class}_g{group:02}_c01"
            save_clip(tmp_path / "ucf101" / one_class / name, [1])
            kind = "test" if group == 2 else "train"
            lines[kind].append(f"{one_class}/{name}.avi" + (f" {label}" if kind == "train" else ""))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    for kind, rows in lines.items():
        (lists / f"{kind}list01.txt").write_text("\r\n".join([*rows, rows[0]]), encoding="utf-8-sig")
    data = listed(tmp_path / "ucf101", lists)
    assert [path.name for path in data.test.paths] == ["v_Biking_g02_c01", "v_Dive_g02_c01"]
    assert len(data.train.paths) == 4


@pytest.mark.parametrize(
    ("spoil", "arguments", "reason"),
    [
        (
            lambda root, lists: None,
            {"split": 3},
            r"no lists of split 3 found; expected <class>_test_split3.txt \(HMDB51\), or train",
        ),
        (lambda root, lists: None, {"test_groups": [1]}, r"either lists or test_groups"),
        (lambda root, lists: None, {"test_fraction": 0.3}, r"either lists or test_fraction"),
        (lambda root, lists: save_clip(root / "cartwheel" / "new", [1]), {}, r"new: not in any list of split 1"),
        (
            lambda root, lists: next((root / "cartwheel").glob("*.avi")).unlink(),
            {},
            r"1 clips of split 1 are missing, such as cartwheel/Film_\(1\)_cartwheel_f_cm_np1.5_ba_med_4",
        ),
        (
            lambda root, lists: (lists / "cartwheel_test_split1.txt").write_text("a.avi 7"),
            {},
            r"lines of HMDB51 .*, got 'a.avi 7'",
        ),
        (lambda root, lists: (lists / "cartwheel_test_split1.txt").write_bytes(b"\xff"), {}, r"split1.txt: cannot be read"),
        (
            lambda root, lists: (lists / "trainlist01.txt").write_text(
                "cartwheel/Film_(1)_cartwheel_f_cm_np1.5_ba_med_4.avi 2"
            ),
            {},
            r"the lists of split 1 name cartwheel/Film_.*_4 twice, with other marks",
        ),
        (lambda root, lists: (lists / "testlist01.txt").write_text("a.avi"), {}, r"expected lines of UCF101 .*, got 'a.avi'"),
    ],
)
def test_lists_of_other_clips_are_refused(spoil, arguments, reason, hmdb):
    spoil(*hmdb)
    refused(lambda: listed(*hmdb, **arguments), reason)


@pytest.mark.parametrize(
    ("spoil", "arguments", "reason"),
    [
        (lambda f: save_clip(f / "diving" / "odd", [1]), {}, r"odd: has no group, but other clips have one"),
        (lambda f: None, {"test_groups": [9]}, r"test_groups: group 9 does not exist; expected some of 1, 2, 3, 4, 5"),
        (lambda f: None, {"test_groups": [1, 2, 3, 4, 5]}, r"the split leaves no training clip of 'biking'"),
        (lambda f: None, {"test_groups": []}, r"the split leaves no test clip"),
        (lambda f: (f / "zero").mkdir(), {}, r"zero: no clips found; expected the layout <class>/"),
        (lambda f: None, {"size": [6]}, r"expected frames ≥ 1, size \[height, width\] .*size=\[6\]"),
    ],
)
def test_clips_that_cannot_be_split_are_refused(spoil, arguments, reason, ucf):
    spoil(ucf)
    refused(lambda: video(str(ucf), 0, **({"frames": 1, "size": [6, 8], "workers": 0} | arguments)), reason)


def test_a_frame_that_is_no_image_is_named(ucf):
    (ucf / "biking" / "v_biking_01" / "v_biking_01_01" / "001.png").write_bytes(b"no image")
    refused(lambda: video(str(ucf), 0, frames=4, size=[6, 8], workers=0), r"v_biking_01_01/001\.png: cannot be read")


def test_a_video_file_needs_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for k in range(5):
        path = tmp_path / "run" / f"{k}.avi"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"RIFF")
    refused(
        lambda: video(str(tmp_path), 0, workers=0), r"needs PyAV: install the extra `video`, as in pip install '\.\[video\]'"
    )


def write_video(path, colours, size=(48, 64)):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), colour, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def videos(tmp_path):
    for one_class, base in (("run", 0), ("walk", 100)):
        for k in range(5):
            write_video(tmp_path / one_class / f"{k}.{'avi' if k % 2 else 'mp4'}", [base + 10 * j for j in range(10)])
    return tmp_path


def test_video_files_are_read_frame_by_frame(videos):
    data = video(str(videos), 0, frames=5, size=[12, 16], workers=0)
    assert (len(data.train), len(data.test)) == (8, 2)
    x, y = one(data.train)
    values = x.mean(2) * 0.225 * 255 + 0.45 * 255
    expected = torch.tensor([10.0, 30, 50, 70, 90]) + 100 * y[:, None]
    assert (values - expected).abs().max() < 4  # the codec's loss


@pytest.mark.parametrize(
    "content",
    [
        b"no video",
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile 0.mp4\n",
    ],
    ids=["text", "playlist", "list of files"],
)
def test_what_is_no_video_is_refused_by_its_path(content, videos):
    path = videos / "run" / "1.avi"
    path.write_bytes(content)
    refused(lambda: video(str(videos), 0, workers=0), r"run/1\.avi: cannot be read .*expected a video file")


# moving shapes


def test_generated_clips_follow_from_the_seed_and_are_balanced():
    made = [moving_shapes(seed, samples=22, test_samples=11, size=[12, 16]) for seed in (0, 0, 1)]
    assert made[0].train.x.shape == (22, 6, 12 * 16 * 3)
    assert made[0].train.x.dtype == torch.uint8
    assert torch.equal(made[0].train.x, made[1].train.x)
    assert not torch.equal(made[0].train.x, made[2].train.x)
    assert torch.bincount(made[0].train.y).tolist() == [2] * 11
    assert torch.bincount(made[0].test.y).tolist() == [1] * 11
    assert made[0].source.startswith("generated: 6 frames of 16×12")
    x, _ = one(made[0].train)
    assert abs(float(x.mean())) < 0.2
    assert abs(float(x.std()) - 1) < 0.2
    assert DATASETS["moving_shapes"].known(size=[12, 16]) == {"inputs": 576, "classes": 11}
    assert DATASETS["moving_shapes"].known() == {"inputs": 57600, "classes": 11}


def traced(data):
    """The centre of the bright pixels and their number, (N, frames) each, and the motion of each clip."""
    bright = data.x.float().reshape(-1, 6, 30, 40, 3).mean(4)
    bright = (bright > (bright.amax((2, 3), keepdim=True) + bright.amin((2, 3), keepdim=True)) / 2).float()
    area = bright.sum((2, 3))
    assert area.min() > 0
    x = (bright * torch.arange(40)).sum((2, 3)) / area
    y = (bright * torch.arange(30)[:, None]).sum((2, 3)) / area
    return x, y, area, np.array([MOTIONS[int(label) // len(SHAPES)] for label in data.y])


def test_shapes_move_as_their_class_says():
    classes = len(SHAPES) * len(MOTIONS)
    data = moving_shapes(0, samples=20 * classes, test_samples=classes, size=[30, 40], classes=classes, noise=0.0).train
    x, y, area, kinds = traced(data)
    ranges = {name: np.ptp(values.numpy(), axis=1) for name, values in (("x", x), ("y", y), ("area", area / area.mean()))}
    for kind, moving in (("across", "x"), ("upright", "y"), ("pulsing", "area"), ("resting", "")):
        for name, least, most in (("x", 5, 1), ("y", 4, 1), ("area", 0.4, 0.1)):
            own = ranges[name][kinds == kind]
            if name == moving:
                assert own.min() > least
            elif name != "area":  # which also changes where a shape reaches over the border
                assert own.max() < most
    angles = torch.atan2(y - 14.5, (x - 19.5) * 0.75)  # seen on the screen, where y points down
    turned = torch.remainder(angles.diff(dim=1) + torch.pi, 2 * torch.pi) - torch.pi
    assert (turned.sum(1)[kinds == "clockwise"] > 1).all()
    assert (turned.sum(1)[kinds == "counterclockwise"] < -1).all()


def test_single_frames_do_not_tell_the_sense_of_a_rotation():
    data = moving_shapes(1, samples=880, test_samples=8, size=[30, 40], classes=8, noise=0.0).train
    x, y, _, kinds = traced(data)
    for frame in (0, 5):
        for values in (x[:, frame], y[:, frame], (x * y)[:, frame]):
            ours, theirs = (values[kinds == kind].numpy() for kind in ("clockwise", "counterclockwise"))
            assert stats.ks_2samp(ours, theirs).pvalue > 0.01


def test_a_small_lstm_learns_them_by_their_order():
    torch.manual_seed(0)
    data = moving_shapes(0, samples=330, test_samples=110, size=[12, 16])
    model = LSTMClassifier(576, 64, 11)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for epoch in range(10):
        for x, y in data.train.batches(shuffled(330, 30, epoch)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        x, y = one(data.test)
        found, backwards = model(x).argmax(1), model(x.flip(1)).argmax(1)
    assert float((found == y).float().mean()) > 0.6  # of eleven classes
    turning = y < 8  # four shapes clockwise, and the same four counterclockwise
    assert float((backwards == (y + 4) % 8)[turning].float().mean()) > 0.6


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"classes": 25}, r"2 to 24 classes, got .*classes=25"),
        ({"size": [4, 4]}, r"size \[height, width\] of 8 or more.*size=\[4, 4\]"),
        ({"samples": 5}, r"samples and test_samples ≥ 11 .*samples=5, test_samples=300, noise=0.1"),
        ({"noise": 1.5}, r"noise in \[0, 1\), .*noise=1.5"),
    ],
)
def test_shapes_that_cannot_be_are_refused(arguments, reason):
    refused(lambda: moving_shapes(0, **arguments), reason)


# anybody's


class Drawn(torch.utils.data.Dataset):
    """Changes its samples by every generator there is."""

    classes = ("a", "b", "c")

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.full((2,), float(index)) + torch.rand(1) + np.random.rand() + random.random(), index % 3  # noqa: NPY002, S311


def test_a_data_set_that_draws_at_random_follows_the_seed_and_the_index():
    data, picks = Mapped(Drawn(), 3), shuffled(7, 3, 0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first, again, other = (one(data, picks, augment=Augment(), seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert torch.equal(one(Mapped(Drawn(), 3, workers=2), picks, augment=Augment(), seed=1)[0], first)
    shares = [list(data.batches(picks, Share(rank, 2), Augment(), 1)) for rank in (0, 1)]
    assert torch.equal(shares[1][0][0], first[:3][1::2])
    assert torch.equal(one(data)[0], one(data, seed=9)[0])


MODULE = """
import torch
from torch.utils.data import TensorDataset
from tensorrail_trainer.data import Dataset, InMemory

def part(count):
    return TensorDataset(torch.arange(2.0 * count).reshape(count, 2), torch.arange(count) % 3)

def triple(count: int, seed: int = 0):
    return part(count), part(4), 3

def named():
    train = part(6)
    train.classes = ["a", "b", "c"]
    return train, part(4)

def numbered():
    train = part(6)
    train.classes = 3
    return train, part(4)

def ready():
    split = InMemory(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    return Dataset("made by hand", 1, split, split)

def nothing():
    return None

def uncounted():
    return part(6), part(4)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_data"
    sys.modules.pop("own_data", None)


def test_a_function_of_ones_own_makes_a_data_set(own):
    source = source_of(f"{own}:triple")
    data = source.make(count=5)
    assert (data.classes, len(data.train), len(data.test)) == (3, 5, 4)
    assert data.source == "own_data:triple, 5 training and 4 test samples"
    assert source.known(count=5) == {}
    x, y = one(data.train)
    assert torch.equal(x, torch.arange(10.0).reshape(5, 2))
    assert y.tolist() == [0, 1, 2, 0, 1]
    assert data.to(torch.device("cpu")).example(3).shape == (3, 2)
    assert source_of(f"{own}:named").make().classes == source_of(f"{own}:numbered").make().classes == 3
    assert source_of(f"{own}:ready").make().source == "made by hand"


def test_a_function_keeps_its_arguments_names(own):
    import inspect

    assert list(inspect.signature(source_of(f"{own}:triple").make).parameters) == ["count", "seed"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cifar", r"unknown data set 'cifar'; expected one of cifar10, cifar100, digits, images, .* or module:function"),
        ("own_data:absent", "data set 'own_data:absent' cannot be imported"),
        ("no_such_module:load", "data set 'no_such_module:load' cannot be imported"),
        ("own_data:number", "data set 'own_data:number' is not a function"),
    ],
)
def test_a_data_set_that_is_not_there_is_refused(name, reason, own):
    refused(lambda: source_of(name), reason)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("nothing", "own_data:nothing: expected it to return a Dataset, .* got NoneType"),
        ("uncounted", "own_data:uncounted: expected the number of classes, or a list of them, .* got None"),
    ],
)
def test_what_is_no_data_set_is_refused(function, reason, own):
    refused(lambda: source_of(f"{own}:{function}").make(), reason)


class Listed(list):
    pass


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([(torch.zeros(2), 0.5)], "sample 0 of Listed: expected an integer label, got 0.5"),
        ([(torch.zeros(2), torch.tensor(0.5))], "sample 0 of Listed: expected an integer label, got 0.5"),
        ([(torch.zeros(2), 3)], "expected a label from 0 to 2 \\(3 classes\\), got 3"),
        ([("text", 1)], "expected a tensor, got a str; give the data set a transform"),
        ([torch.zeros(3)], r"sample 0 of Listed: cannot be read \(ValueError: too many values"),
    ],
)
def test_samples_that_are_none_are_named(entries, reason):
    refused(lambda: one(Mapped(Listed(entries), 3)), reason)


def test_arrays_and_numpys_numbers_are_samples_too():
    x, y = one(Mapped(Listed([(np.ones(2, np.float64), np.int64(1)), (np.ones(2), torch.tensor(2))]), 3))
    assert (x.dtype, y.tolist()) == (torch.float32, [1, 2])
    values = np.arange(6.0).reshape(2, 3)
    fixed = values.copy()
    fixed.flags.writeable = False
    given = [values[:, ::-1], values[::-1], values.astype(">f4"), values[:1][::-1], fixed, values.T]
    for array in given:  # another byte order, negative strides, read-only
        x, y = one(Mapped(Listed([(array, np.array([1], ">i2"))]), 3))
        np.testing.assert_array_equal(x[0].numpy(), np.asarray(array, np.float32))
        assert y.tolist() == [1]
    split = InMemory(values[::-1].astype(">f8"), np.array([2, 1], ">i8"), np.array(1.0, ">f4"), np.array(2.0, ">f4"))
    x, y = one(split)
    assert (x.tolist(), y.tolist()) == ([[1, 1.5, 2], [-0.5, 0, 0.5]], [2, 1])
    refused(lambda: one(Mapped(Listed([(np.array(["a"]), 1)]), 3)), "sample 0 of Listed: not an array of numbers")
    masked = np.ma.masked_array(np.ones(2), [True, False])
    refused(lambda: one(Mapped(Listed([(masked, 1)]), 3)), "sample 0 of Listed: .*masked; fill them first")
    with pytest.raises(DataError, match="expected a data set with samples, __getitem__ and __len__, got a Listed"):
        Mapped(Listed(), 3)
    assert len(Mapped(TensorDataset(torch.zeros(2, 1), torch.zeros(2)), 1)) == 2
