"""Times by layer, form and target: what is measured once, where it is kept, and what happens to a broken file.

No time is asserted here: the function that measures is replaced by one that returns known numbers, but for one test.
"""

import json
import os
from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper
from recurrent_graphs import recurrent_model

from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search import latency_table, layer_timing
from tensorrail_exporter.search.latency_table import LatencyTable, Target, cache_folder
from tensorrail_exporter.search.options import families, option_for, options_of, thinned
from tensorrail_exporter.search.timed_layers import Timed, key_of
from tensorrail_runtime.errors import CacheError
from tensorrail_runtime.sessions import machine
from tensorrail_runtime.sessions.session import Session

CPU = Session(threads=1)


def conv_layer(rng, batch=1, name="w", dtype=np.float32, **attributes):
    node = helper.make_node("Conv", ["x", name], ["y"], "n", pads=[1] * 4, **attributes)
    weights = {name: rng.standard_normal((32, 32, 3, 3)).astype(np.float32)}
    model = make_model([node], weights, {"x": ["n", 32, 8, 8]}, {"y": ["n", 32, None, None]})
    (layer,) = survey(model, batch)
    return replace(layer, dtype=np.dtype(dtype))


@pytest.fixture
def waits():
    """The shares of the time that the next measurements wait for a processor; a test appends to them."""
    return []


@pytest.fixture
def calls(monkeypatch, waits):
    """Replace the measuring by known numbers: 1 ms dense, a form's MACs in µs; return what was asked for."""
    asked = []

    def known(layer, options, how):
        asked.append((layer.name, [option.steps for option in options], how.seconds))
        found = [Timed(key=key_of(layer, None), layer=layer.describe(), form="dense", milliseconds=1.0)]
        for option in options:
            key = key_of(layer, option)
            found.append(Timed(key=key, layer=layer.describe(), form=option.steps, milliseconds=1e-3 * option.macs))
        return found, waits.pop(0) if waits else 0.0

    def known_dense(layers, settings, seconds, precision):
        keys = [key_of(layer, None) for layer in layers]
        return [Timed(key=key, layer="", form="dense", milliseconds=1.0) for key in keys], waits[0] if waits else 0.0

    monkeypatch.setattr(latency_table, "layer_times", known)
    monkeypatch.setattr(latency_table, "dense_times", known_dense)
    return asked


def test_times_are_kept_on_disk_and_measured_once(calls, rng, tmp_path):
    layer = conv_layer(rng)
    options = options_of(layer, ["auto"], 8)
    table = LatencyTable.open(CPU, tmp_path)
    assert table.missing(layer, options) == list(options)
    table.measure({layer: options}, CPU)
    assert table.milliseconds(layer) == 1.0
    assert [table.milliseconds(layer, option) for option in options] == [1e-3 * option.macs for option in options]
    again = LatencyTable.open(CPU, tmp_path)
    assert again.times == table.times
    assert again.missing(layer, options) == []
    again.measure({layer: options}, CPU)
    assert len(calls) == 1  # nothing was missing


def test_times_of_a_busy_machine_are_told_and_not_kept(calls, waits, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(latency_table, "BUSY", 0.1)
    layers = [conv_layer(rng), conv_layer(rng, dtype=np.float64), conv_layer(rng, batch=2)]
    options = {layer: options_of(layer, ["auto"], 8) for layer in layers}
    waits.extend([0.3, 0.4, 0.02])
    notes = []
    table = LatencyTable.open(CPU, tmp_path)
    table.measure(options, CPU, progress=lambda stage, share, detail="": notes.append(detail) if stage == "note" else None)
    assert all(table.missing(layer, forms) == [] for layer, forms in options.items())  # this run has them
    assert notes == [table.busy]
    assert "waited for a processor 30 % of the time; these times are not kept" in table.busy
    again = LatencyTable.open(CPU, tmp_path)
    assert again.times == {}
    again.measure(options, CPU)
    assert again.busy == ""
    assert LatencyTable.open(CPU, tmp_path).times == again.times != {}


@pytest.mark.parametrize("loaded", [2**29, 1])
def test_dense_layers_are_compared_by_times_in_turn(loaded, rng, monkeypatch):
    """The machine gets slower from one process to the next; the ratios of the layers stay right all the same."""
    monkeypatch.setattr(layer_timing, "_LOADED", loaded)
    layers = [conv_layer(rng), conv_layer(rng, batch=2), conv_layer(rng, batch=4)]
    pace, processes = [1.0], []

    def bursts(paths, settings, seconds, rounds=5, precision=0.0, most=0, of_all=0.0):
        processes.append(len(paths))
        slowness = pace[0]
        pace[0] *= 3
        models = [onnx.load(path) for path in paths]
        copies = [len([node for node in model.graph.node if node.op_type == "Conv"]) for model in models]
        batches = [model.graph.input[0].type.tensor_type.shape.dim[0].dim_value for model in models]
        times = [slowness * (0.5 + batch * count) for batch, count in zip(batches, copies, strict=True)]
        return np.array([[time] * 5 for time in times]), 0.0

    monkeypatch.setattr(layer_timing, "fresh_bursts", bursts)
    table = LatencyTable(Target.here(CPU))
    table.measure({layer: options_of(layer, ["auto"], 8)[:1] for layer in layers}, CPU)
    times = [table.milliseconds(layer) for layer in layers]
    assert processes[:1] == ([6] if loaded > 1 else [4])
    np.testing.assert_allclose(np.divide(times, times[0]), [1, 2, 4], rtol=1e-6)


def test_only_what_is_missing_is_measured(calls, rng, tmp_path):
    layer = conv_layer(rng)
    first, second, *_ = options_of(layer, ["auto"], 8)
    table = LatencyTable.open(CPU, tmp_path)
    table.measure({layer: [first]}, CPU)
    table.measure({layer: [first, second]}, CPU)
    assert [steps for _, steps, _ in calls] == [[first.steps], [second.steps]]


def test_forms_that_are_measured_later_are_as_much_faster_as_they_were_then(calls, rng, monkeypatch):
    layer = conv_layer(rng)
    first, second, *_ = options_of(layer, ["auto"], 8)
    table = LatencyTable(Target.here(CPU))
    table.measure({layer: [first]}, CPU)
    known = latency_table.layer_times

    def slower(*arguments):  # everything takes three times as long
        found, wait = known(*arguments)
        return [timed.model_copy(update={"milliseconds": 3 * timed.milliseconds}) for timed in found], wait

    monkeypatch.setattr(latency_table, "layer_times", slower)
    table.measure({layer: [first, second]}, CPU)
    assert table.milliseconds(layer) == 1.0
    assert table.milliseconds(layer, second) == pytest.approx(1e-3 * second.macs)


def test_times_of_a_busy_machine_are_not_kept_later_either(calls, waits, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(latency_table, "BUSY", 0.1)
    layer = conv_layer(rng)
    first, second, *_ = options_of(layer, ["auto"], 8)
    table = LatencyTable.open(CPU, tmp_path)
    waits.extend([0.4, 0.0])
    notes = []
    for options in ([first], [first, second]):
        table.measure({layer: options}, CPU, progress=lambda stage, _, text="": notes.append(text) if stage == "note" else None)
    assert len(notes) == 1
    assert LatencyTable.open(CPU, tmp_path).times == {}


def test_a_layer_without_options_is_measured_dense(calls, rng):
    layer = conv_layer(rng)
    table = LatencyTable(Target.here(CPU))
    table.measure({layer: []}, CPU)
    assert table.milliseconds(layer) == 1.0
    with pytest.raises(KeyError):
        table.milliseconds(layer, options_of(layer, ["svd"], 8)[0])


def test_layers_of_one_signature_are_measured_once_with_the_options_of_all(calls, rng):
    one, other = conv_layer(rng), conv_layer(rng, name="v")
    first, second, third, *_ = options_of(one, ["auto"], 8)
    table = LatencyTable(Target.here(CPU))
    table.measure({one: [first, second], other: [second, third]}, CPU)
    assert [sorted(steps) for _, steps, _ in calls] == [sorted([first.steps, second.steps, third.steps])]
    assert table.milliseconds(other, first) == table.milliseconds(one, first)
    assert table.missing(other, [first, second, third]) == []


def test_the_time_given_is_shared_out(calls, rng):
    one, other = conv_layer(rng), conv_layer(rng, strides=[2, 2])
    shares = []
    table = LatencyTable(Target.here(CPU))
    wanted = {one: options_of(one, ["tt"], 8)[:2], other: options_of(other, ["tt"], 8)[:1]}
    table.measure(wanted, CPU, seconds=10.0, progress=lambda _, share, text="": shares.append((share, text)))
    assert [seconds for _, _, seconds in calls] == [2.0, 2.0]  # two dense forms and three others
    assert shares == [(0.0, "2 dense layers in turn"), (0.0, one.describe()), (0.6, other.describe()), (1.0, "")]


def test_equal_steps_of_two_formats_are_one_measurement(calls, rng):
    layer = conv_layer(rng)
    (tt, *_), (tucker, *_) = options_of(layer, ["tt"], 8), options_of(layer, ["tucker"], 8)
    assert (tt.format, tucker.format, tt.steps) == ("tt", "tucker", tucker.steps)
    table = LatencyTable(Target.here(CPU))
    table.measure({layer: [tt]}, CPU)
    assert table.missing(layer, [tucker]) == []
    assert table.milliseconds(layer, tucker) == table.milliseconds(layer, tt)


def test_every_property_of_a_layer_that_changes_its_time_changes_the_key(rng):
    layers = [
        conv_layer(rng),
        conv_layer(rng, batch=2),
        conv_layer(rng, dtype=np.float16),
        conv_layer(rng, strides=[2, 2]),
        conv_layer(rng, dilations=[2, 2]),
    ]
    keys = {key_of(layer, None) for layer in layers}
    keys |= {key_of(layer, option) for layer in layers for option in options_of(layer, ["auto"], 8)}
    assert len(keys) == len(layers) + sum(len(options_of(layer, ["auto"], 8)) for layer in layers)
    assert key_of(conv_layer(rng, name="v"), None) in keys  # a name changes nothing


def test_modes_and_merge_of_a_chain_and_padding_are_part_of_the_form(rng):
    layer = conv_layer(rng)
    tt = options_of(layer, ["tt"], 8)[0]
    chain = tt.plan("w").model_copy(update={"modes": (4, 8, 9, 8, 4), "ranks": (1, 4, 8, 8, 4, 1), "merge": "none"})
    forms = [tt, replace(tt, block=8)]
    forms += [option_for(chain.model_copy(update={"merge": merge}), layer.spec) for merge in ("none", "sides", "input")]
    assert len({key_of(layer, option) for option in forms}) == len(forms)


def test_every_property_of_a_target_changes_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_gpu", lambda: None)
    settings = [
        CPU,
        replace(CPU, threads=2),
        replace(CPU, level="basic"),
        replace(CPU, arena=False),
        replace(CPU, provider="cuda"),
        replace(CPU, provider="cuda", tf32=True),
        replace(CPU, provider="cuda", nhwc=True),
        replace(CPU, provider="cuda", cuda_graph=True),
        replace(CPU, provider="cuda", conv_search="heuristic"),
    ]
    paths = {LatencyTable.open(one, tmp_path).path for one in settings}
    assert len(paths) == len(settings)
    assert LatencyTable.open(replace(CPU, linger=False), tmp_path).path in paths  # always off while times are taken
    monkeypatch.setattr("onnxruntime.__version__", "0.0.0")
    assert LatencyTable.open(CPU, tmp_path).path not in paths
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_processor", lambda: "another processor")
    assert LatencyTable.open(CPU, tmp_path).path not in paths


def test_what_another_process_wrote_meanwhile_is_kept(calls, rng, tmp_path):
    layer, other = conv_layer(rng), conv_layer(rng, strides=[2, 2])
    mine, theirs = LatencyTable.open(CPU, tmp_path), LatencyTable.open(CPU, tmp_path)
    theirs.measure({other: []}, CPU)
    mine.measure({layer: []}, CPU)
    both = LatencyTable.open(CPU, tmp_path)
    assert both.milliseconds(layer) == both.milliseconds(other) == 1.0
    assert mine.times == both.times
    assert [path.name for path in tmp_path.iterdir()] == [mine.path.name]  # no part of a file is left


def test_a_table_without_a_path_is_not_written(calls, rng, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORRAIL_CACHE", str(tmp_path))
    LatencyTable(Target.here(CPU)).measure({conv_layer(rng): []}, CPU)
    assert list(tmp_path.iterdir()) == []


def broken(stored):
    """Return texts that are no latency table, each with what is said of it."""
    first = {**stored, "times": [{**stored["times"][0], "milliseconds": -1.0}]}
    return {
        "{": "invalid JSON",
        "[]": "expected an object",
        json.dumps({**stored, "version": 2}): "version: expected 1",
        json.dumps({**stored, "more": 0}): "more: unknown key",
        json.dumps(first): "milliseconds: expected a value greater than 0",
        json.dumps({**stored, "target": {**stored["target"], "threads": 64}}): "the latency table of another target",
    }


def test_a_broken_file_is_named_in_one_line_and_never_overwritten(calls, rng, tmp_path):
    layer = conv_layer(rng)
    table = LatencyTable.open(CPU, tmp_path)
    table.measure({layer: []}, CPU)
    for text, reason in broken(json.loads(table.path.read_text())).items():
        table.path.write_text(text)
        with pytest.raises(CacheError) as caught:
            LatencyTable.open(CPU, tmp_path)
        assert str(table.path) in str(caught.value)
        assert reason in str(caught.value)
        assert "remove it to measure again" in str(caught.value)
        assert "\n" not in str(caught.value)
    table.path.write_bytes(b"\xff\x00")
    with pytest.raises(CacheError, match="not a latency table"):
        table.save()
    assert table.path.read_bytes() == b"\xff\x00"


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(calls, rng, tmp_path):
    (tmp_path / "file").write_text("")
    table = LatencyTable(Target.here(CPU), tmp_path / "file" / "table.json")
    with pytest.raises(CacheError, match=r"table.json: .*(cannot be read|cannot be written) \(Not a directory\)"):
        table.measure({conv_layer(rng): []}, CPU)
    closed = tmp_path / "closed"
    closed.mkdir()
    table = LatencyTable(Target.here(CPU), closed / "folder" / "table.json")
    closed.chmod(0o500)
    try:
        if not os.access(closed, os.W_OK):  # root may write everywhere
            with pytest.raises(CacheError, match=r"cannot be written \(Permission denied\): choose a writable folder, or set"):
                table.measure({conv_layer(rng): []}, CPU)
    finally:
        closed.chmod(0o700)
    assert calls == []


def test_a_folder_in_place_of_the_table_is_said(tmp_path):
    path = LatencyTable.open(CPU, tmp_path).path
    path.mkdir()
    with pytest.raises(
        CacheError, match=r"json: cannot be read \(Is a directory\): expected a readable latency table, or no file"
    ):
        LatencyTable.open(CPU, tmp_path)


def test_the_cache_folder_is_the_users_own_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TENSORRAIL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "tensorrail"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tensorrail"
    monkeypatch.setenv("TENSORRAIL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    table = LatencyTable.open(CPU)
    table.save()
    assert table.path.parent == tmp_path / "own"
    assert LatencyTable.open(CPU, tmp_path / "other").path.parent == tmp_path / "other"


def test_without_a_writable_home_times_are_measured_and_not_stored(calls, rng, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TENSORRAIL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    layer, notes = conv_layer(rng), []
    table = LatencyTable.open(CPU)
    table.measure({layer: []}, CPU, progress=lambda stage, _, detail="": notes.append(detail) if stage == "note" else None)
    assert table.path is None
    assert table.milliseconds(layer) == 1.0
    (note,) = notes
    assert f"{tmp_path / 'file' / '.cache' / 'tensorrail'} cannot be created (Not a directory)" in note
    assert "set the environment variable TENSORRAIL_CACHE to a writable folder" in note
    monkeypatch.setenv("TENSORRAIL_CACHE", str(tmp_path / "file" / "chosen"))  # a folder that the user chose must work
    with pytest.raises(CacheError, match="Not a directory"):
        LatencyTable.open(CPU).measure({layer: []}, CPU)


def test_a_failed_write_leaves_the_old_table(calls, rng, tmp_path, monkeypatch):
    table = LatencyTable.open(CPU, tmp_path)
    table.measure({conv_layer(rng): []}, CPU)
    before = table.path.read_bytes()

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latency_table, "write_text", full)
    with pytest.raises(CacheError, match="No space left on device"):
        table.save()
    assert table.path.read_bytes() == before


@pytest.mark.parametrize("strides", [[1, 1], [2, 2]])
def test_real_times_are_positive_and_finite(rng, tmp_path, strides):
    layer = conv_layer(rng, strides=strides)
    options = options_of(layer, ["auto"], 8)[:2]
    table = LatencyTable.open(CPU, tmp_path)
    table.measure({layer: options}, CPU, seconds=0.05)
    times = [table.milliseconds(layer), *(table.milliseconds(layer, option) for option in options)]
    assert np.isfinite(times).all()
    assert min(times) > 0
    assert LatencyTable.open(CPU, tmp_path).times == table.times


def test_times_between_two_that_were_measured_are_estimated_and_not_kept(calls, rng, tmp_path):
    layer = conv_layer(rng)
    options = options_of(layer, ("tt", "svd"), 1)
    few = thinned(options)
    assert len(families(options)) == 4
    assert 0 < len(few) <= 5 * len(families(options)) < len(options)
    table = LatencyTable.open(CPU, tmp_path)
    table.measure({layer: few}, CPU)
    before = table.path.read_bytes()
    estimated = table.with_estimates({layer: options})
    for family in families(options):
        assert {family[0], family[-1]} <= set(few)
        times = [estimated.milliseconds(layer, option) for option in family]
        assert times == pytest.approx([1e-3 * option.macs for option in family])  # as they would have been measured
    estimated.save()
    assert estimated.path is None
    assert table.path.read_bytes() == before
    assert table.missing(layer, options) == [option for option in options if option not in few]


def test_rough_times_are_kept_apart_and_give_way_to_others(calls, rng, tmp_path):
    layer = conv_layer(rng)
    options = options_of(layer, ("tt",), 16)
    rough = LatencyTable.open(CPU, tmp_path, rough=True)
    rough.measure({layer: options}, CPU)
    assert not LatencyTable.open(CPU, tmp_path).times
    assert LatencyTable.open(CPU, tmp_path, rough=True).times == rough.times
    exact = LatencyTable.open(CPU, tmp_path)
    exact.times = {key: timed.model_copy(update={"milliseconds": 7.0}) for key, timed in list(rough.times.items())[:2]}
    exact.save()
    again = LatencyTable.open(CPU, tmp_path, rough=True)
    assert again.times == rough.times | exact.times
    assert not again.missing(layer, options)


def test_a_sketch_has_rough_times_of_everything_and_is_not_kept(rng, tmp_path):
    layers = [conv_layer(rng), conv_layer(rng, batch=2)]
    options = {layer: options_of(layer, ["auto"], 8)[:2] for layer in layers}
    table = LatencyTable.open(CPU, tmp_path)
    assert table.lacks(options)
    rough = table.sketch(options, CPU, 60.0)
    assert not rough.lacks(options)
    assert rough.path is None
    assert table.times == {}
    assert list(tmp_path.iterdir()) == []


def test_layers_that_run_long_are_not_sketched(rng, monkeypatch):
    monkeypatch.setattr(layer_timing, "fresh_bursts", lambda *_: pytest.fail("something was timed"))
    layer = conv_layer(rng)
    assert LatencyTable(Target.here(CPU)).sketch({layer: options_of(layer, ["auto"], 8)}, CPU, 1e-6) is None


def recurrence(rng, inputs):
    """Return the recurrent weight of an LSTM, 64 → 16, whose input weight has 64 · inputs values."""
    return survey(recurrent_model("LSTM", "forward", 16, inputs, rng, bias=False), 1, {"x": (5, 1, inputs)})[1]


def test_a_sketch_of_a_recurrent_weight_runs_the_products_of_both_weights(rng, monkeypatch):
    monkeypatch.setattr(layer_timing, "fresh_bursts", lambda *_: pytest.fail("something was timed"))
    layer = recurrence(rng, 2000)
    options = {layer: options_of(layer, ["svd"], 8)[:1]}
    seconds = 20 * (4 + 1 + 4) * 5 * 64 * 2000 / 1e10  # of 9 nodes, by the products of their input weights alone
    assert LatencyTable(Target.here(CPU)).sketch(options, CPU, seconds) is None


@pytest.mark.parametrize(("loaded", "models"), [(2**29, [5]), (2 * 4 * 4 * 64 * 2000, [4, 2]), (1, [3, 2, 2])])
def test_fewer_forms_are_loaded_together_where_each_holds_another_weight(loaded, models, rng, monkeypatch):
    """Every form of a recurrent weight has the input weight beside it, 0.5 MB here, once in each of four copies."""
    loads = []

    def bursts(paths, *_):
        loads.append(len(paths))
        return np.array([[1.0 + k] * 3 for k in range(len(paths))]), 0.0

    monkeypatch.setattr(layer_timing, "_LOADED", loaded)
    monkeypatch.setattr(layer_timing, "fresh_bursts", bursts)
    layer = recurrence(rng, 2000)
    options = options_of(layer, ["svd", "ttm"], 2, most=50.0)[:3]
    table = LatencyTable(Target.here(CPU))
    table.measure({layer: options}, CPU)
    assert loads == models  # with the dense copies in each, and the single one in the first
    loads.clear()
    LatencyTable(Target.here(CPU)).sketch({layer: options}, CPU, 60.0)
    assert loads == [count + (k > 0) for k, count in enumerate(models)]  # with both in each


def test_layers_are_timed_in_the_precision_of_the_plan_and_kept_apart(rng, monkeypatch, tmp_path):
    timed = []

    def bursts(paths, settings, seconds, rounds=0, precision=0.0, most=0, of_all=0.0):
        timed.append([onnx.load(path).graph for path in paths])
        return [np.full(3, 1.0 + k) for k in range(len(paths))], 0.0

    monkeypatch.setattr(layer_timing, "fresh_bursts", bursts)
    layer = conv_layer(rng)
    tables = {precision: LatencyTable.open(CPU, tmp_path, precision=precision) for precision in ("fp32", "fp16", "int8")}
    assert len({table.path for table in tables.values()}) == 3
    for precision, table in tables.items():
        table.measure({layer: options_of(layer, ["svd"], 16)}, CPU)
        graphs = [graph for group in timed for graph in group]
        assert len(graphs) > 2
        for graph in graphs:
            ops = {node.op_type for node in graph.node}
            assert ("DequantizeLinear" in ops) == (precision == "int8")
            assert "Conv" in ops
            halves = {tensor.data_type for tensor in graph.initializer} == {onnx.TensorProto.FLOAT16}
            assert halves == (precision == "fp16")
        timed.clear()
        assert LatencyTable.open(CPU, tmp_path, precision=precision).times == table.times
    assert LatencyTable.open(CPU, tmp_path).path == tables["fp32"].path


def test_small_layers_are_timed_less_precisely(rng, monkeypatch):
    """A layer's times are as precise as the network needs them: within 0.2 % of its time."""
    precise = []

    def known(layer, options, how):
        precise.append(how.precise)
        return [Timed(key=key_of(layer, None), layer="", form="dense", milliseconds=1.0)], 0.0

    monkeypatch.setattr(latency_table, "layer_times", known)
    layer = conv_layer(rng)
    for whole in (None, 1.0, 5.0, 1000.0):
        table = LatencyTable(Target.here(CPU))
        table.times[key_of(layer, None)] = Timed(key=key_of(layer, None), layer="", form="dense", milliseconds=1.0)
        table.measure({layer: options_of(layer, ["auto"], 8)}, CPU, whole=whole)
    np.testing.assert_allclose(precise, [0.005, 0.005, 0.01, 0.03])


def pair(rng):
    weights = {
        "first": rng.standard_normal((64, 16, 3, 3)).astype(np.float32),
        "second": rng.standard_normal((32, 64, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "b"),
        helper.make_node("Conv", ["b", "second"], ["y"], "y", pads=[1] * 4),
    ]
    return survey(make_model(nodes, weights, {"x": ["n", 16, 8, 8]}, {"y": ["n", 32, 8, 8]}))


@pytest.fixture
def by_size(monkeypatch):
    """Each layer takes a microsecond for a thousand MACs; return the groups that were timed in turn, as they are described."""
    groups, pace = [], [1.0]

    def known(layers, how, precise):
        groups.append([layer.describe() for layer in layers])
        pace[0] *= 3  # the machine gets slower from one process to the next
        return [1e-6 * layer.macs * pace[0] for layer in layers], 0.0

    for module in (latency_table, layer_timing):
        monkeypatch.setattr(module, "timed_together", known)
    monkeypatch.setattr(latency_table, "layer_times", lambda *_: pytest.fail("there are no forms"))
    return groups


def test_a_narrower_layer_is_timed_with_those_before_it(by_size, rng, tmp_path):
    first, second = pair(rng)
    options = options_of(second, ["width"], 8)
    table = LatencyTable.open(CPU, tmp_path)
    assert table.missing(second, options) == list(options)
    table.measure({first: (), second: options}, CPU)
    assert by_size == [
        [first.describe(), second.describe()],
        [second.describe(), *(f"Conv 3×3 {n}→32 on 8×8" for n in (32, 40, 48, 56))],
        [first.describe(), *(f"Conv 3×3 16→{n} on 8×8" for n in (32, 40, 48, 56))],
    ]
    for option in options:
        share = option.ranks[0] / 64
        assert table.milliseconds(second, option) == pytest.approx(share * table.milliseconds(second))
        assert table.saved_before(second, option) == pytest.approx({"first": (1 - share) * table.milliseconds(first)})
    assert table.missing(second, options) == []
    assert not LatencyTable.open(CPU, tmp_path).lacks({second: options})
    table.measure({first: (), second: options}, CPU)
    assert len(by_size) == 3  # nothing was missing


def test_a_layer_that_could_form_a_chain_is_timed_as_its_narrower_ones_are(by_size, rng):
    weights = {name: rng.standard_normal((32, 32, 3, 3)).astype(np.float32) for name in ("first", "second")}
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Conv", ["a", "second"], ["y"], "y", pads=[1] * 4),
    ]
    first, second = survey(make_model(nodes, weights, {"x": ["n", 32, 8, 8]}, {"y": ["n", 32, 8, 8]}))
    options = options_of(second, ["width"], 8)
    table = LatencyTable(Target.here(CPU))
    table.measure({first: (), second: options}, CPU)
    key = key_of(replace(second, side_by_side=True, makers=()), None)
    assert key in table.times
    assert table.times[key].milliseconds != table.milliseconds(second)  # of another process
    for option in options:
        share = option.ranks[0] / 32
        assert table.milliseconds(second, option) == pytest.approx(share * table.milliseconds(second))
        assert table.saved_before(second, option)["first"] == pytest.approx((1 - share) * table.milliseconds(first))


def test_narrower_layers_between_two_that_were_timed_are_estimated(by_size, rng):
    first, second = pair(rng)
    options = options_of(second, ["width"], 8)
    table = LatencyTable(Target.here(CPU))
    table.measure({first: (), second: (options[0], options[-1])}, CPU)
    full = table.with_estimates({first: (), second: options})
    assert not full.lacks({second: options})
    for option in options:
        share = option.ranks[0] / 64
        assert full.milliseconds(second, option) == pytest.approx(share * table.milliseconds(second), rel=1e-6)
        assert full.saved_before(second, option)["first"] == pytest.approx((1 - share) * table.milliseconds(first), rel=1e-6)


def test_a_narrower_layer_is_sketched_with_those_before_it(rng):
    first, second = pair(rng)
    options = {first: (), second: options_of(second, ["width"], 8)[:2]}
    rough = LatencyTable(Target.here(CPU)).sketch(options, CPU, 60.0)
    assert not rough.lacks(options)
    assert all(rough.milliseconds(second, option) > 0 for option in options[second])
