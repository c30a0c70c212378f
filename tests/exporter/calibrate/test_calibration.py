"""Calibration inputs from files, and what they look like at a layer: patches, moments, the best weight and bias."""

import pickle

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import TensorProto, helper
from PIL import Image

from tensorrail_exporter import GraphError
from tensorrail_exporter.calibrate.inputs import (
    BATCH,
    Calibration,
    Preprocessing,
    Sampler,
    Statistics,
    fits,
    load_calibration,
    rows_wanted,
    run_to,
)
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.sessions.session import Session

FLOAT32 = 1e-4  # relative: sums of products in single precision


def weight(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def image_model(rng, channels=3, size=32, batch="n"):
    node = helper.make_node("Conv", ["image", "w"], ["y"], "conv")
    shape = [batch, channels, size, size]
    return make_model([node], {"w": weight(rng, 4, channels, 3, 3)}, {"image": shape}, {"y": [batch, 4, None, None]})


def two_inputs(rng, batch="n"):
    nodes = [helper.make_node("MatMul", ["a", "w"], ["p"], "product"), helper.make_node("Add", ["p", "b"], ["y"], "add")]
    return make_model(nodes, {"w": weight(rng, 5, 4)}, {"a": [batch, 5], "b": [batch, 4]}, {"y": [batch, 4]})


def saved(model, tmp_path):
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


# --- files ---


def test_an_npz_file_by_input_name_with_labels(rng, tmp_path):
    a, b, labels = weight(rng, 60, 5), weight(rng, 60, 4), np.arange(60)
    np.savez(tmp_path / "data.npz", b=b, a=a, labels=labels, unused=np.zeros(3))
    found = load_calibration(tmp_path / "data.npz", saved(two_inputs(rng), tmp_path))
    assert [len(feed["a"]) for feed in found.feeds] == [BATCH] * (60 // BATCH)
    assert found.count == 60
    for name, whole in (("a", a), ("b", b)):
        np.testing.assert_array_equal(np.concatenate([feed[name] for feed in found.feeds]), whole)
    np.testing.assert_array_equal(found.labels, labels)
    assert set(found.feeds[0]) == {"a", "b"}


def test_at_most_so_many_samples_are_taken_evenly_spread(rng, tmp_path):
    rows = np.arange(1000, dtype=np.float32)[:, None]
    np.savez(tmp_path / "data.npz", a=rows + np.zeros(5), b=rows + np.zeros(4), labels=np.arange(1000), few=np.zeros(2))
    found = load_calibration(tmp_path / "data.npz", saved(two_inputs(rng), tmp_path), most=101)
    taken = np.concatenate([feed["a"][:, 0] for feed in found.feeds])
    assert found.count == 101
    assert (taken[0], taken[-1]) == (0, 999)
    assert set(np.diff(taken)) <= {9, 10}
    np.testing.assert_array_equal(found.labels, taken)
    np.testing.assert_array_equal(np.concatenate([feed["b"][:, 0] for feed in found.feeds]), taken)


def test_a_batch_of_fixed_size_is_kept(rng, tmp_path):
    np.savez(tmp_path / "data.npz", a=weight(rng, 64, 5), b=weight(rng, 64, 4))
    path = saved(two_inputs(rng, batch=8), tmp_path)
    assert [len(feed["a"]) for feed in load_calibration(tmp_path / "data.npz", path).feeds] == [8] * 8
    assert load_calibration(tmp_path / "data.npz", path, most=30).count == 24  # whole batches
    np.savez(tmp_path / "odd.npz", a=weight(rng, 12, 5), b=weight(rng, 12, 4))
    with pytest.raises(ModelError, match="the model takes batches of 8, got 12 samples: give a multiple"):
        load_calibration(tmp_path / "odd.npz", path)


def test_one_array_for_one_input_needs_no_name_and_other_floats_are_converted(rng, tmp_path):
    x = rng.standard_normal((7, 3, 32, 32))
    np.savez(tmp_path / "data.npz", x)
    found = load_calibration(tmp_path / "data.npz", saved(image_model(rng), tmp_path))
    assert found.feeds[0]["image"].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate([feed["image"] for feed in found.feeds]), x.astype(np.float32))
    assert found.labels is None


def test_a_folder_of_arrays(rng, tmp_path):
    path = saved(image_model(rng), tmp_path)
    parts = [weight(rng, count, 3, 32, 32) for count in (2, 1, 3)]
    plain, named = tmp_path / "npy", tmp_path / "npz"
    plain.mkdir()
    (named / "deeper").mkdir(parents=True)
    for k, part in enumerate(parts):
        np.save(plain / f"{k}.npy", part)
        np.savez(
            (named / "deeper" if k == 2 else named) / f"{'ab' if k < 2 else 'z'}{k}.npz",
            image=part,
            labels=np.full(len(part), k),
        )
    (plain / "readme.txt").write_text("nothing to load")
    for folder in (plain, named):
        found = load_calibration(folder, path)
        rows = np.concatenate([feed["image"] for feed in found.feeds])
        assert sorted(map(float, rows[:, 0, 0, 0])) == sorted(float(v) for part in parts for v in part[:, 0, 0, 0])
        if folder == named:
            expected = {float(v): k for k, part in enumerate(parts) for v in part[:, 0, 0, 0]}
            assert [expected[float(v)] for v in rows[:, 0, 0, 0]] == list(found.labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_images(channels, rng, tmp_path):
    folder = tmp_path / "images"
    (folder / "class").mkdir(parents=True)
    colour = (200, 100, 50)
    for name, size in (("b.png", (64, 48)), ("class/a.PNG", (40, 90)), ("c.bmp", (20, 20))):
        Image.new("RGB", size, tuple(value + (name == "c.bmp") for value in colour)).save(folder / name)
    found = load_calibration(folder, saved(image_model(rng, channels), tmp_path))
    (feed,) = found.feeds
    assert feed["image"].shape == (3, channels, 32, 32)
    assert feed["image"].dtype == np.float32
    grey = Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))
    pixel = np.array(colour if channels == 3 else [grey]) / 255
    how = Preprocessing()
    expected = (pixel - how.mean[:channels]) / how.std[:channels]
    np.testing.assert_allclose(feed["image"], np.broadcast_to(expected[:, None, None], feed["image"].shape), atol=0.02)


def test_images_are_cut_from_the_middle_and_scaled_as_asked(rng, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    values = np.zeros((32, 96, 3), np.uint8)
    values[:, 32:64] = 255  # the middle third is white
    Image.fromarray(values).save(folder / "a.png")
    how = Preprocessing(mean=(0.0,), std=(1.0,), resize=32)
    (feed,) = load_calibration(folder, saved(image_model(rng), tmp_path), images=how).feeds
    np.testing.assert_array_equal(feed["image"], np.ones((1, 3, 32, 32)))
    how = Preprocessing(mean=(0.5,), std=(0.5,), resize=64)
    (feed,) = load_calibration(folder, saved(image_model(rng), tmp_path), images=how).feeds
    np.testing.assert_array_equal(feed["image"], np.ones((1, 3, 32, 32)))


def test_greys_of_16_bits_are_scaled(rng, tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    how, found = Preprocessing(mean=(0.0,), std=(1.0,), resize=32), []
    for name, pixels in (("deep", ramp), ("flat", (ramp >> 8).astype(np.uint8))):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
        found.append(load_calibration(tmp_path / name, saved(image_model(rng), tmp_path), images=how).feeds[0]["image"])
    np.testing.assert_array_equal(found[0], found[1])


def test_data_that_nothing_follows_from_are_refused(rng, tmp_path):
    path = saved(image_model(rng, size=8), tmp_path)
    for array, reason in (
        (np.full((9, 3, 8, 8), 0.5, np.float32), "all 9 samples are identical"),
        (rng.integers(0, 256, (9, 3, 8, 8), np.uint8), "got bytes, such as raw pixels; scale them"),
        (np.ones((9, 3, 8, 8), np.complex64), "got complex values"),
    ):
        np.savez(tmp_path / "data.npz", image=array)
        with pytest.raises(ModelError, match=reason):
            load_calibration(tmp_path / "data.npz", path)


def test_integers_are_cast_where_nothing_is_lost(rng, tmp_path):
    node = helper.make_node("Gather", ["w", "ids"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 4])],
        [onnx.numpy_helper.from_array(weight(rng, 9, 4), "w")],
    )
    path = saved(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path)
    np.savez(tmp_path / "data.npz", ids=rng.integers(0, 9, (6, 3)).astype(np.int32))
    assert load_calibration(tmp_path / "data.npz", path).feeds[0]["ids"].dtype == np.int64
    np.savez(tmp_path / "data.npz", ids=rng.random((6, 3)))
    with pytest.raises(ModelError, match=r"expects tensor\(int64\), got values of type float64"):
        load_calibration(tmp_path / "data.npz", path)


def test_images_are_spread_over_the_folder(rng, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(20):
        Image.new("L", (32, 32), 10 * k).save(folder / f"{k:02}.png")
    how = Preprocessing(mean=(0.0,), std=(1 / 255,), resize=32)
    feeds = load_calibration(folder, saved(image_model(rng, 1), tmp_path), most=5, images=how).feeds
    np.testing.assert_allclose(np.concatenate([feed["image"][:, 0, 0, 0] for feed in feeds]), [0, 40, 90, 140, 190], atol=1e-3)


def wrong_files(rng, folder):
    """Write files that do not fit a model of inputs a (n, 5) and b (n, 4); return what is said of each."""
    a, b = weight(rng, 6, 5), weight(rng, 6, 4)
    nan = a.copy()
    nan[3, 2] = np.nan
    arrays = {
        "names": ({"a": a, "c": b}, r"no array for input 'b'; expected a, b, got a, c"),
        "lengths": ({"a": a, "b": b[:5]}, r"the arrays of the inputs differ in length: {'a': 6, 'b': 5}"),
        "long": ({"a": np.zeros((600, 5)), "b": np.zeros((700, 4))}, r"differ in length: {'a': 600, 'b': 700}"),
        "labels": (
            {"a": a, "b": b, "labels": np.arange(7)},
            r"expected one label per sample, got 6 samples and labels of shape \(7,\)",
        ),
        "scalar": ({"a": a, "b": b, "labels": np.array(3)}, r"got 6 samples and labels of shape \(1,\)"),
        "width": ({"a": b, "b": b}, r"input 'a' expects shape \[n, 5\], got an array of shape \[6, 4\]"),
        "axes": ({"a": a[0], "b": b}, r"input 'a' expects shape \[n, 5\], got an array of shape \[5\]"),
        "nan": ({"a": nan, "b": b}, r"the array of input 'a' contains NaN or infinite values"),
        "empty": ({"a": a[:0], "b": b[:0]}, r"holds no data"),
        "pickled": ({"a": np.array([{}, {}], object), "b": b}, r"not an npz file of plain arrays \(Object arrays cannot be"),
    }
    found = {}
    for name, (values, reason) in arrays.items():
        np.savez(folder / f"{name}.npz", **values)
        found[folder / f"{name}.npz"] = reason
    (folder / "text.npz").write_text("no archive")
    np.save(folder / "single.npy", a)
    found[folder / "text.npz"] = "not an npz file of plain arrays"
    found[folder / "single.npy"] = "expected an npz file of named arrays, got a single array"
    found[folder / "nowhere.npz"] = "cannot be read"
    return found


def test_files_that_do_not_fit_are_refused_in_one_line(rng, tmp_path):
    path = saved(two_inputs(rng), tmp_path)
    for file, reason in wrong_files(rng, tmp_path).items():
        with pytest.raises(ModelError, match=reason) as caught:
            load_calibration(file, path)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def wrong_folders(rng, root):
    """Write folders that do not fit a model of images (n, 3, 32, 32); return what is said of each."""
    x = weight(rng, 2, 3, 32, 32)
    found = {}

    def folder(name, reason):
        found[root / name] = reason
        (root / name).mkdir()
        return root / name

    folder("empty", "no inputs found; expected npz or npy files, or images")
    (folder("text", "no inputs found") / "a.txt").write_text("x")
    (folder("broken", r"a.png: not a readable image") / "a.png").write_text("no image")
    whole = folder("cut", r"a.png: not a readable image") / "a.png"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:2000])
    garbled = folder("garbled", r"a.png: not a readable image") / "a.png"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(garbled)
    data = garbled.read_bytes()
    garbled.write_bytes(data[:33] + b"\0" * 40 + data[73:])
    (folder("pickled", r"a.npy: not a plain npy array") / "a.npy").write_bytes(pickle.dumps([x]))
    np.save(
        folder("objects", r"a.npy: not a plain npy array \(Object arrays cannot be loaded") / "a.npy", np.array([{}], object)
    )
    (folder("nothing", r"a.npy: not a plain npy array") / "a.npy").write_bytes(b"")
    archive = (
        folder("archive", r"a.npy: expected a plain npy array, got several arrays in one file: rename it to .npz") / "a.npy"
    )
    with archive.open("wb") as file:
        np.savez(file, image=x)
    mixed = folder("mixed", r"b.npz holds picture; expected image as in a.npz")
    np.savez(mixed / "a.npz", image=x)
    np.savez(mixed / "b.npz", picture=x)
    sizes = folder("sizes", r"b.npy: input 'image' expects shape \[n, 3, 32, 32\], got an array of shape \[2, 3, 16, 16\]")
    np.save(sizes / "a.npy", x)
    np.save(sizes / "b.npy", x[:, :, :16, :16])
    np.save(folder("scalar", r"a.npy: input 'image' expects shape .*, got an array of shape \[\]") / "a.npy", np.float32(1))
    np.save(folder("one", r"input 'image' expects shape .*, got an array of shape \[3, 32, 32\]") / "a.npy", x[0])
    return found


def test_folders_that_do_not_fit_are_refused_in_one_line(rng, tmp_path):
    path = saved(image_model(rng), tmp_path)
    for folder, reason in wrong_folders(rng, tmp_path).items():
        with pytest.raises(ModelError, match=reason) as caught:
            load_calibration(folder, path)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_images_for_a_model_that_takes_none_are_refused(rng, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    with pytest.raises(ModelError, match="found images for a model with 2 inputs; provide an npz file"):
        load_calibration(folder, saved(two_inputs(rng), tmp_path))
    with pytest.raises(
        ModelError, match=r"found images for input 'image', tensor\(float\) of shape .*provide an npz file instead"
    ):
        load_calibration(folder, saved(image_model(rng, size="s"), tmp_path))
    with pytest.raises(ModelError, match=r"expected floats \(batch, 1 or 3, height, width\)"):
        load_calibration(folder, saved(image_model(rng, channels=4), tmp_path))


def test_the_first_batches_are_a_calibration_too(rng):
    feeds = tuple({"x": weight(rng, count, 3)} for count in (4, 4, 2))
    whole = Calibration(feeds, np.arange(10), sequences=np.arange(10) // 3)
    part = whole.first(5)
    assert (part.count, len(part.feeds)) == (8, 2)
    np.testing.assert_array_equal(part.labels, np.arange(8))
    np.testing.assert_array_equal(part.sequences, np.arange(8) // 3)
    assert whole.first(100).count == 10
    assert (Calibration(feeds).first(1).labels, Calibration(feeds).first(1).sequences) == (None, None)


# --- tensors of a graph ---


def test_tensors_of_a_graph_are_those_of_its_run(small_model, rng):
    x = weight(rng, 3, 16, 8, 8)
    tensors = ["d", "x", "a", "d"]
    pooled, same, convolved, again = run_to(small_model, tensors, Session())({"x": x})
    assert (pooled.shape, convolved.shape) == ((3, 32), (3, 32, 8, 8))
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(pooled, again)
    np.testing.assert_allclose(pooled, np.maximum(convolved, 0).mean((2, 3)), rtol=FLOAT32, atol=1e-5)
    assert run_to(small_model, ["x"], Session())({"x": x})[0] is x


def test_a_tensor_of_another_type_is_run_as_it_is(rng):
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "cast", to=TensorProto.FLOAT16),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
    ]
    nodes.append(helper.make_node("Cast", ["r"], ["y"], "back", to=TensorProto.FLOAT))
    model = make_model(nodes, {}, {"x": ["n", 4]}, {"y": ["n", 4]})
    (half,) = run_to(model, ["r"], Session())({"x": weight(rng, 2, 4)})
    assert half.dtype == np.float16


def test_unknown_tensors_and_wrong_inputs_are_refused(small_model, rng):
    with pytest.raises(GraphError, match="tensor 'nowhere' is not in the graph"):
        run_to(small_model, ["a", "nowhere"], Session())
    run = run_to(small_model, ["a"], Session())
    with pytest.raises(ModelError, match="expected inputs x, got none"):
        run({})
    with pytest.raises(ModelError, match="ONNX Runtime cannot run the model on these inputs") as caught:
        run({"x": weight(rng, 1, 3, 8, 8)})
    assert "\n" not in str(caught.value)


# --- patches ---


def conv_layer(rng, kernel, size, inputs=3, **attributes):
    nd = len(kernel)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", **attributes)
    outputs = {"y": ["n", 4, *[None] * nd]}
    model = make_model([node], {"w": weight(rng, 4, inputs, *kernel)}, {"x": ["n", inputs, *size]}, outputs)
    return survey(model, 2)[0], model


PATCHES = {
    "1d": ((3,), (11,), {"pads": [1, 2], "strides": [2]}),
    "1d dilated": ((3,), (11,), {"dilations": [2]}),
    "1d SAME_UPPER": ((4,), (11,), {"auto_pad": "SAME_UPPER", "strides": [2]}),
    "1d SAME_LOWER": ((4,), (11,), {"auto_pad": "SAME_LOWER", "strides": [2]}),
    "2d": ((3, 2), (7, 8), {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}),
    "2d VALID": ((3, 3), (7, 8), {"auto_pad": "VALID", "strides": [1, 2]}),
    "2d SAME_UPPER": ((2, 3), (7, 8), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "2d SAME_LOWER": ((2, 3), (7, 8), {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    "2d 1×1": ((1, 1), (7, 8), {"strides": [2, 2]}),
    "3d": ((2, 3, 1), (5, 4, 6), {"pads": [0, 1, 0, 1, 1, 0], "strides": [1, 2, 3]}),
    "3d SAME_LOWER": ((2, 2, 3), (5, 4, 6), {"auto_pad": "SAME_LOWER"}),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_times_the_weight_are_the_convolution(name, rng):
    kernel, size, attributes = PATCHES[name]
    layer, model = conv_layer(rng, kernel, size, **attributes)
    x = weight(rng, 2, 3, *size)
    (y,) = run_to(model, ["y"], Session())({"x": x})
    rows = Sampler(layer, [len(x)]).rows(x, 0)  # so many rows are wanted that every place is drawn
    values = onnx.numpy_helper.to_array(model.graph.initializer[0]).reshape(4, -1)
    assert rows.dtype == np.float32
    assert rows.shape == (y.size // 4, layer.spec.params // 4)
    expected = np.moveaxis(y, 1, -1).reshape(-1, 4)
    for image in range(2):  # drawn in a random order within an image
        half = len(rows) // 2
        mine = (rows[image * half : (image + 1) * half] @ values.T).astype(np.float64)
        wanted = expected[image * half : (image + 1) * half].astype(np.float64)
        nearest = np.abs(mine[:, None] - wanted[None]).max(-1)
        assert nearest.min(0).max() < FLOAT32 * np.abs(wanted).max()
        assert len(set(nearest.argmin(1))) == half


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 2), (1, 1)), ((1, 2), (2, 1), (2, 1))]
)
def test_patches_are_those_of_torch(stride, padding, dilation, rng):
    torch = pytest.importorskip("torch")
    attributes = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation)}
    layer, _ = conv_layer(rng, (3, 2), (7, 8), **attributes)
    x = weight(rng, 2, 3, 7, 8)
    unfolded = torch.nn.functional.unfold(torch.from_numpy(x), (3, 2), dilation, padding, stride).numpy()
    expected = np.swapaxes(unfolded, 1, 2)  # (B, places, I·K)
    rows = Sampler(layer, [len(x)]).rows(x, 0).reshape(expected.shape)
    for mine, wanted in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(np.unique(mine, axis=0), np.unique(wanted, axis=0))


def test_the_same_places_are_drawn_twice_and_others_of_another_batch(rng):
    layer, _ = conv_layer(rng, (3, 3), (20, 20), pads=[1] * 4)
    samples = [5, 9_995]
    sampler = Sampler(layer, samples)
    assert sampler.each == 2
    x = weight(rng, 5, 3, 20, 20)
    rows = sampler.rows(x, 0)
    assert rows.shape == (10, 27)
    np.testing.assert_array_equal(rows, Sampler(layer, samples).rows(x, 0))
    np.testing.assert_allclose(sampler.rows(2 * x, 0), 2 * rows)  # of other data at the same places
    assert not np.array_equal(rows, sampler.rows(x, 1))
    assert not np.array_equal(rows, Sampler(layer, samples, seed=1).rows(x, 0))


@pytest.mark.parametrize(
    ("op", "shape", "values", "attributes"),
    [
        ("Gemm", (6, 10), (10, 4), {}),
        ("Gemm", (10, 6), (10, 4), {"transA": 1}),
        ("MatMul", (2, 5, 10), (10, 4), {}),
        ("MatMul left", (2, 10, 5), (4, 10), {}),
    ],
)
def test_rows_of_a_matrix_are_its_tokens(op, shape, values, attributes, rng):
    left = op.endswith("left")
    node = helper.make_node(op.split()[0], ["w", "x"] if left else ["x", "w"], ["y"], "n", **attributes)
    w, x = weight(rng, *values), weight(rng, *shape)
    free = ["n", *shape[1:]] if not attributes else [shape[0], "n"]
    model = make_model([node], {"w": w}, {"x": free}, {"y": [None] * len(shape)})
    rows = Sampler(survey(model)[0], [len(x)]).rows(x, 0)
    (y,) = run_to(model, ["y"], Session())({"x": x})
    flat = w if left else w.T
    mine = rows @ flat.T
    wanted = (np.swapaxes(y, -1, -2) if left else y).reshape(-1, 4)
    np.testing.assert_allclose(mine, wanted, rtol=FLOAT32, atol=1e-5)


def test_a_batch_gives_its_share_of_the_rows(rng):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "n")
    model = make_model([node], {"w": weight(rng, 10, 4)}, {"x": ["n", 1000, 10]}, {"y": ["n", 1000, 4]})
    sampler = Sampler(survey(model)[0], [4, 4, 192])
    assert [len(sampler.rows(weight(rng, size, 1000, 10), k)) for k, size in enumerate((4, 4, 192))] == [400, 400, 19_200]


def test_images_of_several_frames_a_sample_share_its_patches(rng):
    layer, _ = conv_layer(rng, (3, 3), (20, 20), pads=[1] * 4)
    sampler = Sampler(layer, [5, 495])
    assert sampler.each == 40
    assert len(sampler.rows(weight(rng, 5, 3, 20, 20), 0)) == 200
    assert len(sampler.rows(weight(rng, 5 * 16, 3, 20, 20), 0)) == 240  # 40 · 5 / 80, rounded up, of each


def test_a_batch_without_any_images_adds_nothing(rng):
    """Such as the head of a detector on an image in which nothing was found."""
    layer, _ = conv_layer(rng, (3, 3), (20, 20), pads=[1] * 4)
    rows = Sampler(layer, [5]).rows(weight(rng, 0, 3, 20, 20), 0)
    assert rows.shape == (0, 27)
    found = Statistics(27, 4)
    found.add(rows, np.empty((0, 4), np.float32))
    assert found.count == 0


def test_how_many_rows_are_wanted_and_what_is_too_wide(rng):
    layer, _ = conv_layer(rng, (3, 3), (8, 8))
    assert rows_wanted(layer.spec) == 20_000
    assert fits(layer.spec)
    wide = type(layer.spec)("conv", (8, 1024, 3, 3))
    assert rows_wanted(wide) == 12 * 9216
    assert not fits(wide)


# --- statistics ---


def statistics_of(x, y, batches=4):
    found = Statistics(x.shape[1], y.shape[1])
    for rows, wanted in zip(np.array_split(x, batches), np.array_split(y, batches), strict=True):
        found.add(rows, wanted)
    return found


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_best_weight_and_bias_are_those_of_least_squares(centred, shift, rng):
    mixed = np.eye(12) + 0.2 * rng.standard_normal((12, 12))
    x = (rng.standard_normal((600, 12)) @ mixed + shift).astype(np.float32)
    true = weight(rng, 5, 3, 2, 2)
    y = (x @ true.reshape(5, -1).T + rng.standard_normal((600, 5)) + 2.0).astype(np.float32)
    found = statistics_of(x, y)
    best = found.best(np.zeros_like(true), found.moments(centred=centred), centred=centred, shrinkage=0.0)
    rows = np.column_stack([x, np.ones(len(x))]) if centred else x
    expected = np.linalg.lstsq(rows.astype(np.float64), y.astype(np.float64))[0]
    np.testing.assert_allclose(best.reshape(5, -1), expected[:12].T, atol=1e-3)
    assert best.shape == true.shape
    if centred:
        np.testing.assert_allclose(found.bias(best), expected[12], atol=5e-3)


def test_sums_of_rows_are_whole_matrices_whenever_they_are_asked_for(rng):
    x, y = rng.standard_normal((40, 600)).astype(np.float32), np.zeros((40, 1), np.float32)  # wider than two blocks
    first, second = statistics_of(x[:20], y[:20], 2), statistics_of(x[20:], y[20:], 1)
    np.testing.assert_allclose(first.xx, x[:20].T @ x[:20], atol=1e-4)
    both = first + second  # one of which was not asked for its sum yet
    np.testing.assert_allclose(both.xx, x.T @ x, atol=1e-4)
    first.add(x[20:], y[20:])
    np.testing.assert_allclose(first.xx, x.T @ x, atol=1e-4)


@pytest.mark.parametrize("centred", [True, False])
def test_what_is_lost_is_counted_on_the_rows(centred, rng):
    x = (rng.standard_normal((500, 6)) + 1.5).astype(np.float32)
    y = (x @ weight(rng, 6, 4) + 0.1 * rng.standard_normal((500, 4)) + 1).astype(np.float32)
    found = statistics_of(x, y)
    other = weight(rng, 4, 6)
    error = y - x @ other.T
    if centred:
        bias = found.bias(other)
        np.testing.assert_allclose(bias, error.mean(0), rtol=1e-4)
        error = error - bias
    expected = np.square(error).sum() / np.square(y - y.mean(0)).sum()
    assert found.lost(other, centred=centred) == pytest.approx(expected, rel=1e-3)
    assert found.count == 500
    if centred:
        expected = np.square(error + 0.3).sum() / np.square(y - y.mean(0)).sum()
        assert found.lost(other, centred=True, bias=bias - 0.3) == pytest.approx(expected, rel=1e-3)


def test_sums_over_two_sets_of_rows_add_up(rng):
    x, y = weight(rng, 300, 12), weight(rng, 300, 5)
    both, whole = statistics_of(x[:200], y[:200]) + statistics_of(x[200:], y[200:]), statistics_of(x, y)
    assert both.count == whole.count
    for name in ("xx", "xy", "x", "y", "yy"):
        np.testing.assert_allclose(getattr(both, name), getattr(whole, name), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("centred", [True, False])
def test_moments_are_numpys(centred, rng):
    x = (rng.standard_normal((400, 8)) + 2).astype(np.float32)
    gram = statistics_of(x, x[:, :1]).moments(centred=centred).gram
    expected = np.cov(x.T, bias=True) if centred else x.T @ x / len(x)
    np.testing.assert_allclose(gram, expected, atol=1e-4)


@pytest.mark.parametrize("centred", [True, False])
def test_shrunk_moments_are_those_of_rows_with_noise(centred, rng):
    """A share of noise rows, for which the dense weight gives the outputs, has the same moments and the same best weight."""
    x, true = weight(rng, 400, 6), weight(rng, 4, 6)
    y = (x @ true.T + weight(rng, 400, 4)).astype(np.float32)
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)  # so that noise does not change the means
    found = statistics_of(x, y)
    moments = found.moments(centred=centred).shrunk(0.25)
    size = np.sqrt(np.trace(found.moments(centred=centred).gram) / 6 * 6 * 400 / 3 / 6)
    noise = np.concatenate([size * np.eye(6), -size * np.eye(6)]) / np.sqrt(2)
    both, answers = np.concatenate([x, noise]), np.concatenate([y, noise @ true.T])
    np.testing.assert_allclose(moments.gram, both.T @ both * 0.75 / 400, rtol=1e-3, atol=1e-3)
    best = found.best(true, moments, centred=centred, shrinkage=0.25)
    np.testing.assert_allclose(best, np.linalg.lstsq(both, answers)[0].T, atol=1e-3)


def test_rows_that_are_all_alike_keep_the_weight(rng):
    """About their mean they are rounding alone, which a weight would be fitted to."""
    x = np.full((800, 12), 0.5, np.float32)
    true = weight(rng, 5, 12)
    found = statistics_of(x, (x @ true.T).astype(np.float32))
    best = found.best(true, found.moments(centred=True), centred=True, shrinkage=0.0)
    assert np.abs(best - true).max() < 0.1 * np.abs(true).max()


def test_moments_that_are_shrunk_completely_keep_the_weight(rng):
    x, y, true = weight(rng, 300, 12), weight(rng, 300, 5), weight(rng, 5, 12)
    found = statistics_of(x, y)
    best = found.best(true, found.moments(centred=True).shrunk(1.0), centred=True, shrinkage=1.0)
    np.testing.assert_allclose(best, true, atol=1e-5)
    near = found.best(true, found.moments(centred=True).shrunk(0.01), centred=True, shrinkage=0.01)
    assert np.abs(near - true).max() > 0.1


@pytest.mark.parametrize("centred", [True, False])
def test_inputs_that_are_never_on_keep_the_weight_there(centred, rng):
    x, true = weight(rng, 300, 12), weight(rng, 5, 12)
    x[:, 4:8] = 0
    found = statistics_of(x, x @ true.T)
    best = found.best(true, found.moments(centred=centred), centred=centred, shrinkage=0.0)
    np.testing.assert_allclose(best, true, atol=1e-3)
    nothing = statistics_of(0 * x, 0 * x @ true.T)
    same = nothing.best(true, nothing.moments(centred=centred).shrunk(0.01), centred=centred, shrinkage=0.01)
    np.testing.assert_allclose(same, true, atol=1e-5)
    assert nothing.lost(true, centred=centred) == 0


def test_a_model_without_inputs_has_no_calibration(tmp_path):
    node = helper.make_node("RandomNormal", [], ["y"], shape=[2, 3])
    onnx.save(make_model([node], {}, {}, {"y": [2, 3]}), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=np.ones((2, 3), np.float32))
    with pytest.raises(ModelError, match="takes no input"):
        load_calibration(tmp_path / "x.npz", tmp_path / "m.onnx")
