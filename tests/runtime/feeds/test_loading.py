"""The one loader of inputs: types, names, batches along any axis, whole feeds, constants and states."""

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper
from stateful_graphs import HIDDEN, RATE, WIDTH, detector

from tensorrail_runtime import ModelError, open_session, random_inputs
from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.feeds.loading import known_values, load_batches
from tensorrail_runtime.feeds.rules import InputRules
from tensorrail_runtime.sessions.session import run

CARRIED = InputRules({"sr": RATE}, states={"state": "stateN"})


def opened(model, tmp_path):
    onnx.save(model, tmp_path / "m.onnx")
    return open_session(tmp_path / "m.onnx")


@pytest.fixture
def session(rng, tmp_path):
    return opened(detector(rng), tmp_path)


@pytest.fixture
def plain(rng, tmp_path):
    """One input x [n, 3, t]."""
    node = helper.make_node("Relu", ["x"], ["y"])
    return opened(make_model([node], {}, {"x": ["n", 3, "t"]}, {"y": ["n", 3, "t"]}), tmp_path)


def test_arrays_become_what_the_model_takes(plain, rng, tmp_path):
    x = rng.standard_normal((5, 3, 4))
    for given in (x, x.astype(">f8"), x.astype(">f4"), np.asarray(x, order="F"), x[::-1][::-1], x.astype(np.float16)):
        for source in ({"x": given}, {"any name": given}):
            (first, second) = load_batches(source, plain, batch=3).feeds
            for feed in (first, second):
                assert feed["x"].dtype == np.float32
                assert feed["x"].dtype.isnative
                assert feed["x"].flags.c_contiguous
            np.testing.assert_array_equal(np.concatenate([first["x"], second["x"]]), given.astype(np.float32))
    np.savez(tmp_path / "big.npz", x=x.astype(">f4"), labels=np.arange(5, dtype=">i4")[::-1])
    found = load_batches(tmp_path / "big.npz", plain, batch=9)
    np.testing.assert_array_equal(found.feeds[0]["x"], x.astype(np.float32))
    assert found.labels.dtype.isnative
    assert (found.labels.tolist(), min(found.labels.strides)) == ([4, 3, 2, 1, 0], 4)
    swapped = {"x": x.astype(">f4")[:, ::-1]}
    np.testing.assert_array_equal(run(plain, swapped)["y"], np.maximum(swapped["x"].astype(np.float32), 0))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4), np.uint8), "got bytes, such as raw pixels; scale them as in training first"),
        (np.full((2, 3, 4), np.nan), "contains NaN or infinite values; expected finite ones"),
        (np.full((2, 3, 4), 1e300), "contains NaN or infinite values"),  # too large for the model's type
        (np.zeros((2, 3, 4), complex), "got complex values"),
        (np.full((2, 3, 4), "a"), r"expects tensor\(float\), got values of type <U1"),
        (np.zeros((2, 4, 4)), r"inputs: input 'x' expects shape \[n, 3, t\], got an array of shape \[2, 4, 4\]"),
        (np.zeros((0, 3, 4)), "the array of input 'x' holds no data"),
        (np.ma.masked_array(np.zeros((2, 3, 4)), np.eye(3, 4) * np.ones((2, 1, 1))), "'x' is not an array .*masked; fill"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(array, reason, plain):
    with pytest.raises(ModelError, match=reason):
        load_batches({"x": array}, plain, batch=4)


def test_the_files_of_a_folder_are_of_one_kind_and_others_are_named(plain, rng, tmp_path, caplog):
    folder = tmp_path / "inputs"
    (folder / ".hidden").mkdir(parents=True)
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    with (folder / "B.NPZ").open("wb") as file:
        np.savez(file, x=x)
    np.savez(folder / "a.npz", x=-x)
    for name in ("._a.npz", ".hidden/c.npz", "notes.txt"):
        (folder / name).write_bytes(b"no array")
    (feed,) = load_batches(folder, plain, batch=9).feeds
    np.testing.assert_array_equal(feed["x"], np.concatenate([x, -x]))
    assert "inputs: 1 file left out, notes.txt: expected npz or npy files, or images" in caplog.text
    (folder / "d.PNG").write_bytes(b"")
    with pytest.raises(ModelError, match=r"expected files of one kind, got arrays, such as B.NPZ, and images, such as d.PNG"):
        load_batches(folder, plain, batch=9)
    for name in ("B.NPZ", "a.npz", "d.PNG"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"no inputs found; expected npz .*; found 1 other files, such as notes.txt"):
        load_batches(folder, plain, batch=9)


def test_integers_keep_their_values_or_are_refused(session, rng):
    frames = {"input": rng.standard_normal((2, WIDTH)), "state": np.zeros((2, 2, HIDDEN))}
    for rate in (np.int32(RATE), np.array(RATE, ">i2"), np.array([RATE], np.uint64)):
        (feed,) = load_batches({**frames, "sr": rate}, session, batch=4).feeds
        assert (feed["sr"].dtype, feed["sr"].shape, int(feed["sr"])) == (np.int64, (), RATE)
    with pytest.raises(ModelError, match=r"input 'sr' expects tensor\(int64\), got values of type uint64"):
        load_batches({**frames, "sr": np.uint64(2**63 + 1)}, session, batch=4)


def test_what_no_source_holds_is_named(session, plain):
    with pytest.raises(ModelError, match="no array for input 'state'; expected input, state, sr, got input, sr"):
        load_batches({"input": np.ones((2, WIDTH)), "sr": np.array(RATE)}, session, batch=4)
    with pytest.raises(UsageError, match=r"inputs: expected a path or arrays by input name, .* got ndarray"):
        load_batches(np.ones((2, 3, 4)), plain, batch=4)
    with pytest.raises(ModelError, match=r"inputs: 'x' is not an array .*; expected a NumPy array"):
        load_batches({"x": [[1.0], [2.0, 3.0]]}, plain, batch=4)
    with pytest.raises(ModelError, match="expected one or more sets of input arrays, got none"):
        load_batches([], plain, batch=4)


def test_samples_lie_along_the_batch_axis_of_each_input(session, rng):
    frames, states = rng.standard_normal((5, WIDTH)), rng.standard_normal((2, 5, HIDDEN))
    found = load_batches({"input": frames, "state": states, "labels": np.arange(5)}, session, InputRules({"sr": RATE}), batch=2)
    assert found.samples == [2, 2, 1]
    assert found.labels.tolist() == [0, 1, 2, 3, 4]
    assert not found.whole
    np.testing.assert_array_equal(found.feeds[1]["state"], states[:, 2:4].astype(np.float32))
    np.testing.assert_array_equal(found.feeds[1]["input"], frames[2:4].astype(np.float32))
    thinned = load_batches({"input": frames, "state": states}, session, InputRules({"sr": RATE}), batch=9, most=3)
    np.testing.assert_array_equal(thinned.feeds[0]["state"], states[:, [0, 2, 4]].astype(np.float32))
    with pytest.raises(ModelError, match=r"differ in length: {'input': 5, 'state': 4}; expected one row per sample in each"):
        load_batches({"input": frames, "state": states[:, :4]}, session, InputRules({"sr": RATE}), batch=2)


def test_an_input_without_a_batch_axis_is_shared(rng, tmp_path):
    node = helper.make_node("MatMul", ["x", "table"], ["y"])
    session = opened(make_model([node], {}, {"x": ["n", 3], "table": [3, "m"]}, {"y": ["n", "m"]}), tmp_path)
    x, table = rng.standard_normal((5, 3)), rng.standard_normal((3, 2))
    with pytest.raises(ModelError, match=r"differ in length: {'x': 5, 'table': 2}.* or none for an input that all samples"):
        load_batches({"x": x, "table": table}, session, InputRules(batch_axes={"table": 1}), batch=4)
    found = load_batches({"x": x, "table": table}, session, InputRules(batch_axes={"table": None}), batch=4)
    assert found.samples == [4, 1]
    assert all(np.array_equal(feed["table"], table.astype(np.float32)) for feed in found.feeds)


def test_constants_take_the_shape_of_the_run(rng, tmp_path):
    nodes = [helper.make_node("Mul", ["x", "mask"], ["masked"]), helper.make_node("Add", ["masked", "shift"], ["y"])]
    inputs = {"x": ["n", "t"], "mask": ["n", "t"], "shift": [4]}
    session = opened(make_model(nodes, {}, inputs, {"y": ["n", 4]}), tmp_path)
    found = load_batches(
        {"x": rng.standard_normal((3, 4))}, session, InputRules({"mask": 1, "shift": [1, 2, 3, 4]}, {"shift": None}), batch=2
    )
    np.testing.assert_array_equal(found.feeds[0]["mask"], np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(found.feeds[1]["mask"], np.ones((1, 4), np.float32))
    np.testing.assert_array_equal(found.feeds[1]["shift"], np.float32([1, 2, 3, 4]))
    shapes, values = known_values(session, InputRules({"mask": 1}, {"shift": None}), found, 3)
    assert shapes == {"x": (3, 4), "mask": (3, 4)}
    np.testing.assert_array_equal(random_inputs(session, 3, shapes=shapes, values=values)["mask"], np.ones((3, 4)))
    mask = helper.make_node("Add", ["x", "mask"], ["y"])
    alone = opened(make_model([mask], {}, {"x": ["n", 4], "mask": ["t"]}, {"y": ["n", 4]}), tmp_path)
    with pytest.raises(ModelError, match=r"constant 'mask': the size of axis 0 of shape \['t'\] is not known"):
        load_batches({"x": np.ones((3, 4))}, alone, InputRules({"mask": 1}, {"mask": None}), batch=2)


def saved(folder, parts):
    folder.mkdir()
    for k, part in enumerate(parts):
        np.savez(folder / f"{k}.npz", **part)
    return folder


def test_files_whose_shapes_differ_are_feeds_by_themselves(plain, rng, tmp_path):
    lengths = (7, 4, 9, 4)
    parts = [{"x": rng.standard_normal((1, 3, length)), "labels": np.array([k])} for k, length in enumerate(lengths)]
    found = load_batches(saved(tmp_path / "ragged", parts), plain, batch=25)
    assert found.whole
    assert [feed["x"].shape for feed in found.feeds] == [(1, 3, length) for length in lengths]
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert load_batches(parts, plain, batch=25).samples == [1, 1, 1, 1]  # as in memory
    some = load_batches(tmp_path / "ragged", plain, batch=25, most=2)
    assert [feed["x"].shape[2] for feed in some.feeds] == [7, 4]
    assert some.labels.tolist() == [0, 3]
    alike = load_batches(saved(tmp_path / "alike", parts[1::2]), plain, batch=25)
    assert (alike.whole, alike.samples, alike.labels.tolist()) == (False, [2], [1, 3])
    with pytest.raises(ModelError, match=r"1.npz: input 'x' expects shape \[n, 3, t\], got an array of shape \[1, 2, 5\]"):
        load_batches(saved(tmp_path / "wrong", [parts[0], {**parts[1], "x": np.ones((1, 2, 5))}]), plain, batch=25)
    with pytest.raises(ModelError, match=r"inputs\[1\]: expected labels of shape \[\] a sample, as in inputs\[0\], got none"):
        load_batches([parts[0], {"x": parts[1]["x"]}], plain, batch=25)


def test_a_file_may_hold_what_one_run_takes(rng, tmp_path):
    """A sequence of any length and one state: their first axes are no samples of each other."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "state"], ["y"])]
    weights = {"w": rng.standard_normal((3, 4)).astype(np.float32)}
    session = opened(make_model(nodes, weights, {"x": ["t", 3], "state": [1, 4]}, {"y": ["t", 4]}), tmp_path)
    parts = [{"x": rng.standard_normal((length, 3)), "state": rng.standard_normal((1, 4))} for length in (6, 2)]
    one = load_batches(parts[0], session, batch=25)
    assert one.whole
    assert one.feeds[0]["x"].shape == (6, 3)
    both = load_batches(saved(tmp_path / "both", parts), session, batch=25)
    assert [feed["x"].shape for feed in both.feeds] == [(6, 3), (2, 3)]
    np.testing.assert_array_equal(both.feeds[1]["state"], parts[1]["state"].astype(np.float32))


def test_states_are_those_of_the_model_along_each_sequence(session, rng):
    sequences = [rng.standard_normal((steps, WIDTH)).astype(np.float32) for steps in (3, 4)]
    found = load_batches([{"input": frames} for frames in sequences], session, CARRIED, batch=5)
    assert (found.samples, found.whole) == ([5, 2], False)
    assert found.sequences.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert load_batches([{"input": one} for one in sequences], session, CARRIED, batch=1, most=2).sequences.tolist() == [0, 1]
    states = np.concatenate([feed["state"] for feed in found.feeds], 1)
    expected = []
    for frames in sequences:
        state = np.zeros((2, 1, HIDDEN), np.float32)
        for frame in frames:
            expected.append(state)
            state = run(session, {"input": frame[None], "state": state, "sr": np.array(RATE)})["stateN"]
    np.testing.assert_allclose(states, np.concatenate(expected, 1), atol=1e-6)
    assert np.abs(states[:, 1]).max() > 0.1
    np.testing.assert_array_equal(states[:, 3], 0)  # the second sequence starts again
    start = rng.standard_normal((2, 1, HIDDEN))
    begun = load_batches({"input": sequences[0], "state": start}, session, CARRIED, batch=5)
    np.testing.assert_array_equal(begun.feeds[0]["state"][:, :1], start.astype(np.float32))


def test_sequences_that_cannot_run_are_refused(session, rng, tmp_path):
    frames = rng.standard_normal((3, WIDTH))
    with pytest.raises(ModelError, match="state 'state': expected the start of one sequence, got 3 along its batch axis"):
        load_batches({"input": frames, "state": np.zeros((2, 3, HIDDEN))}, session, CARRIED, batch=4)
    with pytest.raises(ModelError, match="no array for input 'sr'; expected input, sr, got input"):
        load_batches({"input": frames}, session, InputRules(states={"state": "stateN"}), batch=4)
    with pytest.raises(ModelError, match="expected one label per sample, got 3 samples and labels of shape"):
        load_batches({"input": frames, "labels": np.arange(4)}, session, CARRIED, batch=4)
    fixed = opened(detector(rng, batch=2, state_batch=2), tmp_path)
    with pytest.raises(ModelError, match="one step at a time, but the model takes batches of 2: expected a batch size"):
        load_batches({"input": frames}, fixed, CARRIED, batch=4)
    nodes = [helper.make_node("Add", ["x", "s"], ["t"]), helper.make_node("Mul", ["t", "t"], ["n"])]
    grows = opened(make_model(nodes, {}, {"x": ["b", 2], "s": ["b", 2]}, {"n": ["b", 2]}), tmp_path)
    with pytest.raises(ModelError, match="output 'n', which is state 's' of the next step, contains NaN or infinite values"):
        load_batches({"x": np.full((9, 2), 9.0)}, grows, InputRules(states={"s": "n"}), batch=4)
    nodes = [helper.make_node("Add", ["x", "s"], ["n"])]
    unknown = opened(make_model(nodes, {}, {"x": ["b", "w"], "s": ["b", "w"]}, {"n": ["b", "w"]}), tmp_path)
    with pytest.raises(ModelError, match="state 's' starts at zeros, but the model does not say its size"):
        load_batches({"x": np.ones((9, 2))}, unknown, InputRules(states={"s": "n"}), batch=4)


def test_a_model_of_fixed_batch_1_runs_along_sequences_too(rng, tmp_path):
    session = opened(detector(rng, batch=1, state_batch=1), tmp_path)
    rules = InputRules({"sr": RATE}, {"state": 1}, {"state": "stateN"})
    found = load_batches({"input": rng.standard_normal((3, WIDTH))}, session, rules, batch=25)
    assert (found.samples, found.fixed) == ([1, 1, 1], 1)
    assert np.abs(found.feeds[2]["state"]).max() > 0.1


def test_known_values_are_cut_or_repeated_to_the_shapes_of_a_run(plain, session, rng):
    frames = rng.standard_normal((2, WIDTH)).astype(np.float32)
    batches = load_batches({"input": frames}, session, CARRIED, batch=5)
    shapes, values = known_values(session, CARRIED, batches, 3)
    feed = random_inputs(session, 3, shapes=shapes, values=values)
    np.testing.assert_array_equal(feed["input"], frames[[0, 1, 0]])
    assert feed["state"].shape == (2, 3, HIDDEN)
    assert int(feed["sr"]) == RATE
    sounds = load_batches({"x": np.arange(24.0).reshape(2, 3, 4)}, plain, batch=5)
    shapes, values = known_values(plain, None, sounds, 1)
    assert shapes == {"x": (1, 3, 4)}  # the length is that of the inputs
    assert known_values(plain, None, sounds, 1, {"x": (2, 3, 5)})[0] == {"x": (2, 3, 5)}
    long = random_inputs(plain, shapes={"x": (1, 3, 5)}, values=values)["x"]
    np.testing.assert_array_equal(long[0, 0], [0, 1, 2, 3, 0])
    with pytest.raises(ModelError, match="values: unknown input 'y'; the model's inputs are x"):
        random_inputs(plain, values={"y": np.ones(1)})
    with pytest.raises(ModelError, match="is too large: at most"):
        random_inputs(plain, shapes={"x": (2**20, 3, 2**20)}, values=values)
