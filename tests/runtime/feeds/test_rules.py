"""What inputs are: constants, batch axes and states, as they are written and as a model has them."""

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper
from stateful_graphs import detector

from tensorrail_runtime import ModelError, open_session
from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.feeds.loading import load_batches
from tensorrail_runtime.feeds.rules import InputRules, deduced_axes, model_inputs, parse_rules


@pytest.fixture
def session(rng, tmp_path):
    onnx.save(detector(rng), tmp_path / "m.onnx")
    return open_session(tmp_path / "m.onnx")


def test_rules_are_written_as_texts():
    rules = parse_rules(["sr=16000", "scale=1,2.5", "on=true"], ["state=1", "table=none"], ["state:stateN", "h:0:hn:0"])
    assert rules.constants == {"sr": 16000, "scale": [1, 2.5], "on": True}
    assert rules.batch_axes == {"state": 1, "table": None}
    assert rules.states == {"state": "stateN", "h:0": "hn:0"}
    assert parse_rules() == InputRules()


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ((["sr"], [], []), "input: expected a constant such as sr=16000 or size=224,224, got 'sr'"),
        ((["sr=x"], [], []), "input: expected a constant .*, got 'sr=x'"),
        ((["sr=nan"], [], []), "input: expected a constant .*, got 'sr=nan'"),
        ((["=1"], [], []), "input: expected a constant .*, got '=1'"),
        ((["sr=1", "sr=2"], [], []), "input: 'sr' is given twice"),
        (([], ["state=-1"], []), "batch axis: expected a number from 0, such as state=1, or table=none, got 'state=-1'"),
        (([], ["state=" + "1" * 5000], []), "batch axis: expected a number from 0"),
        (([], [], ["state"]), "state: expected an input and an output, such as state:stateN, got 'state'"),
        (([], [], ["a:b:c"]), "state: expected an input and an output"),
        (([], [], [":b"]), "state: expected an input and an output"),
    ],
)
def test_rules_of_another_form_are_refused(texts, reason):
    with pytest.raises(UsageError, match=reason):
        parse_rules(*texts)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (InputRules({"rate": 1}), "constant: unknown input 'rate'; the model's inputs are input, state, sr"),
        (InputRules(batch_axes={"rate": 1}), "batch axis: unknown input 'rate'"),
        (InputRules(states={"rate": "stateN"}), "state: unknown input 'rate'"),
        (InputRules({"state": 0.0}, states={"state": "stateN"}), "input 'state' is both a constant and a state"),
        (InputRules(batch_axes={"state": 3}), "batch axis of input 'state': expected 0 to 2, got 3"),
        (InputRules(states={"state": "hn"}), "state 'state': unknown output 'hn'; the model's outputs are output, stateN"),
        (
            InputRules(states={"state": "output"}),
            r"expected an output like the input, .* got 'output', tensor\(float\) of shape",
        ),
        (InputRules({"sr": 0.5}), r"constant: input 'sr' expects tensor\(int64\), got values of type float64"),
        (InputRules({"sr": [1, 2]}), r"constant 'sr': expected shape \[\], got an array of shape \[2\]"),
        (InputRules({"input": [1.0, 2.0]}), r"input 'input' expects shape \[batch, 24\], got an array of shape \[1, 2\]"),
        (
            InputRules({"input": np.ones((2, 24))}),
            "constant 'input': expected one value for all samples, got 2 along",
        ),
        (InputRules({"sr": [[1], [1, 2]]}), "constant 'sr': expected a number or an array of numbers"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(rules, reason, session):
    with pytest.raises(ModelError, match=reason):
        model_inputs(session, rules)


def test_batch_axes_follow_the_names_of_axes(session):
    assert model_inputs(session).axes == {"input": 0, "state": 1, "sr": None}
    assert model_inputs(session, InputRules(batch_axes={"state": None})).axes["state"] is None
    assert model_inputs(session, InputRules({"sr": 16000})).fixed is None
    assert deduced_axes({"x": [None, None], "h": [2, None, 8], "s": []}) == {"x": 0, "h": 1, "s": None}
    assert deduced_axes({"ids": ["b", "t"], "places": ["t"], "m": ["b", "t"]}) == {"ids": 0, "places": 0, "m": 0}
    assert deduced_axes({"x": ["b", 3], "y": [4, "t"]}) == {"x": 0, "y": 0}  # another name is another axis
    assert deduced_axes({"x": [1, 3], "h": [2, 1, 8]}) == {"x": 0, "h": 0}


def test_the_size_of_a_constant_is_no_batch_size(tmp_path):
    nodes = [helper.make_node("Div", ["x", "size"], ["y"])]
    onnx.save(make_model(nodes, {}, {"x": ["batch", 3, "h", 2], "size": [2]}, {"y": ["batch", 3, "h", 2]}), tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx")
    rules = InputRules({"size": [4.0, 5.0]})
    assert model_inputs(session, rules).fixed is None
    images = np.zeros((5, 3, 8, 2), np.float32)
    (feed,) = load_batches({"x": images}, session, rules, batch=5).feeds
    assert feed["x"].shape == (5, 3, 8, 2)
