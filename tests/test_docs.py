"""Every block of code on the pages of docs/ runs, every command names options that exist, and every link leads somewhere.

A page's blocks run in order in a folder with stand-ins for the user's files: Python in one namespace, `tensorrail` lines
through the command line in this process. A block may be preceded by one comment: `<!-- not run: reason -->` (its commands are
parsed) or `<!-- may fall short: reason -->` (exit code 1, measured and not held, is allowed).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from PIL import Image

import tensorrail
import tensorrail.cli
from tensorrail_exporter import FORMATS, LayerPlan, Plan, decompose_graph, factorize, save_cores
from tensorrail_exporter.graphs.io import save_model
from tensorrail_trainer.training.epochs import Epoch, TrainingLog

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
ELSEWHERE = {"ci.md", "serving.md", "triton.md"}  # their commands run in tests of their own, and are parsed here
BLOCK = re.compile(
    r"(?:^<!-- (?P<note>not run|may fall short): (?P<reason>[^\n]+?) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"\n]+)\")?[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# Added where a page does not say them itself: enough for the commands to go all the way, too little for a figure.
QUICK = {
    "plan": ("--seconds", "1", "--search-seconds", "0.5"),
    "compress": ("--seconds", "1", "--duration", "0.2", "--fit", "0.5", "--search-seconds", "0.5"),
    "bench": ("--duration", "0.2"),
    "quantize": ("--duration", "0.2"),
}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file that it is to be written to, and what the comment before it says."""

    language: str
    title: str | None
    code: str
    note: str | None
    reason: str | None


def blocks(path: Path) -> list[Block]:
    return [Block(**found.groupdict()) for found in BLOCK.finditer(path.read_text(encoding="utf-8"))]


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of every command of a shell block, comments left out and continued lines joined."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


RUN = [page for page in PAGES if page.name not in ELSEWHERE and any(b.note != "not run" for b in blocks(page))]
SHELL = [(path, block) for path in TEXTS for block in blocks(path) if block.language == "sh"]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """Write what the pages call the user's files: models, inputs, labelled inputs, images, a plan and cores."""
    folder = tmp_path_factory.mktemp("stand-ins")
    rng = np.random.default_rng(0)

    def low_rank(o, i):
        weight = rng.standard_normal((o, 4)) @ rng.standard_normal((4, i)) / 20
        return (weight + 0.002 * rng.standard_normal((o, i))).astype(np.float32)

    weights = {
        "0.weight": low_rank(32, 27).reshape(32, 3, 3, 3),
        "2.weight": low_rank(32, 32 * 9).reshape(32, 32, 3, 3),
        "6.weight": low_rank(10, 32),
    }
    helper = onnx.helper
    nodes = [
        helper.make_node("Conv", ["image", "0.weight"], ["a"], "0", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "1"),
        helper.make_node("Conv", ["b", "2.weight"], ["c"], "2", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"], "3"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], "4"),
        helper.make_node("Flatten", ["e"], ["f"], "5"),
        helper.make_node("Gemm", ["f", "6.weight"], ["logits"], "6", transB=1),
    ]
    made = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("image", ["batch", 3, 32, 32]), ("logits", ["batch", 10]))
    ]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "stand-in", made[:1], made[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    plan = Plan(layers=(LayerPlan(name="2", format="tt", modes=(32, 9, 32), ranks=(1, 16, 16, 1)),))
    cores = decompose_graph(model, plan)
    save_model(model, folder / "dense.onnx")
    save_model(factorize(model, plan, cores).model, folder / "model.onnx")
    plan.save(folder / "plan.json")
    save_cores(folder / "cores.safetensors", cores)
    images = rng.standard_normal((40, 3, 32, 32)).astype(np.float32)
    np.savez(folder / "inputs.npz", image=images)
    np.savez(folder / "test.npz", image=images, labels=rng.integers(0, 10, 40))
    (folder / "images").mkdir()
    for k in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / "images" / f"{k}.png")
    return folder


@pytest.fixture
def folder(stand_ins, tmp_path_factory, monkeypatch, in_this_process) -> Iterator[Path]:
    """Work in a copy of the stand-ins; what a page registers is taken back."""
    made = tmp_path_factory.mktemp("page") / "here"
    shutil.copytree(stand_ins, made)
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(str(made))
    monkeypatch.setenv("TENSORRAIL_CACHE", str(stand_ins / "cache"))
    formats = dict(FORMATS)
    yield made
    FORMATS.clear()
    FORMATS.update(formats)


def run_command(words: list[str], monkeypatch) -> int:
    """Return the exit code of one line of a page."""
    assert words[0] == "tensorrail", f"{shlex.join(words)}: only tensorrail runs here; mark the block as not run, and why"
    more = QUICK.get(words[1], ())
    known = {*words, *(() if "--calibration" in words else ("--search-seconds", "--fit"))}  # those have no effect without
    options = [word for pair in zip(more[::2], more[1::2], strict=True) if pair[0] not in known for word in pair]
    # What this machine reaches with layers timed for a second is not the page's business: where no model comes of it, the
    # lines that go on with it would fail.
    asked = [re.sub(r"^latency=[\d.]+$", "latency=1.05", word) for word in words]
    monkeypatch.setattr(sys, "argv", [*asked, *options])
    with pytest.raises(SystemExit) as ended:
        tensorrail.cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_code_of_a_page_runs(page, folder, monkeypatch, capsys):
    names: dict = {"__name__": "page"}
    for block in blocks(page):
        if block.note == "not run":
            continue
        if block.title:
            (folder / block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.code, name_of(page), "exec"), names)  # noqa: S102 - they are our own pages
        elif block.language == "sh":
            allowed = {0, 1} if block.note == "may fall short" else {0}
            for words in commands(block.code):
                code = run_command(words, monkeypatch)
                assert code in allowed, (shlex.join(words), code, capsys.readouterr())


@pytest.mark.parametrize(("path", "block"), SHELL, ids=lambda value: name_of(value) if isinstance(value, Path) else "")
def test_commands_name_options_that_exist(path, block):
    for words in commands(block.code):
        if "tensorrail" in words:
            parse(words[words.index("tensorrail") + 1 :])


def parse(words: list[str]) -> None:
    """Parse a command's words as the command line does, without running it."""
    command, name = tensorrail.cli.parser(), "tensorrail"
    while hasattr(command, "commands"):
        assert words, f"{name}: names no command"
        assert words[0] in command.commands, f"{name} has no command {words[0]!r}"
        command, name, words = command.commands[words[0]], f"{name} {words[0]}", words[1:]
    try:
        command.make_context(name, list(words))
    except Exception as error:  # noqa: BLE001 - click's classes, which typer may bring itself
        message = error.format_message() if hasattr(error, "format_message") else repr(error)
        pytest.fail(f"{name} {shlex.join(words)}: {message}", pytrace=False)


def test_a_command_with_an_unknown_option_is_found():
    with pytest.raises(pytest.fail.Exception, match="No such option"):
        parse(["bench", "a.onnx", "--fast"])
    with pytest.raises(AssertionError, match="no command 'benchmark'"):
        parse(["benchmark", "a.onnx"])


def test_options_named_in_the_text_exist():
    group = tensorrail.cli.parser()
    single = {name: command for name, command in group.commands.items() if not hasattr(command, "commands")}
    inner = {f"{g} {n}": c for g, one in group.commands.items() for n, c in getattr(one, "commands", {}).items()}
    every = single | inner
    known = {text for command in every.values() for one in command.params for text in (*one.opts, *one.secondary_opts)}
    for path in TEXTS:
        text = BLOCK.sub("", path.read_text(encoding="utf-8"))
        for span in re.findall(r"`(tensorrail [^`]+)`", text):
            words = span.split()[1:]
            command = every.get(" ".join(words[:2])) or every.get(words[0]) or group.commands.get(words[0])
            assert command is not None or words[0].isupper(), f"{name_of(path)}: no command in `{span}`"
            own = {o for one in getattr(command, "params", []) for o in (*one.opts, *one.secondary_opts)} | {"--help"}
            for word in words[1:]:
                if word.startswith("--"):
                    assert word.partition("=")[0] in own, f"{name_of(path)}: no {word} in `{span}`"
        for option in re.findall(r"`(--[a-z][a-z0-9-]+)", text):
            foreign = {"--help", "--latency-record", "--num_processes"}
            assert option in known | foreign, f"{name_of(path)}: no command has {option}"


def test_blocks_that_are_not_run_say_why():
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        marked = len(re.findall(r"^<!-- (?:not run|may fall short):", text, re.MULTILINE))
        found = [block for block in blocks(path) if block.note]
        assert len(found) == marked, f"{name_of(path)}: a comment does not stand right before a block"
        assert all(len(block.reason or "") > 8 for block in found), name_of(path)


def test_calls_of_the_front_door_name_parameters_that_exist():
    sources = {name_of(path): [b.code for b in blocks(path) if b.language == "python"] for path in TEXTS}
    sources |= {name_of(path): [path.read_text(encoding="utf-8")] for path in sorted((ROOT / "examples").glob("*.py"))}
    count = 0
    for name, codes in sources.items():
        for call in (node for code in codes for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
            text = ast.unparse(call.func)
            if not re.fullmatch(r"tr(\.\w+)+", text):
                continue
            value = tensorrail
            for attribute in text.split(".")[1:]:
                value = getattr(value, attribute)
            known = inspect.signature(value).parameters
            assert {word.arg for word in call.keywords} <= set(known), f"{name}: {ast.unparse(call)}"
            count += 1
    assert count > 50


def test_yaml_blocks_are_parts_of_a_recipe():
    from pydantic import TypeAdapter

    from tensorrail_trainer.recipes.recipe import Rule
    from tensorrail_trainer.recipes.schedules import Training

    count = 0
    for path in TEXTS:
        for block in blocks(path):
            if block.language != "yaml":
                continue
            found = yaml.safe_load(block.code)
            assert found, name_of(path)
            if isinstance(found, dict) and "train" in found:
                Training.model_validate(found["train"])
                count += 1
            for rule in found.get("plan", ()) if isinstance(found, dict) else ():
                TypeAdapter(Rule).validate_python(rule)
                count += 1
    assert count >= 2


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_lead_somewhere(path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.is_file(), f"{target}: no such file"
        if anchor and page.suffix == ".md" and "api/" not in file:
            assert anchor in anchors(page), f"{target}: no such heading; it has {sorted(anchors(page))}"


def anchors(page: Path) -> set[str]:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.replace("`", "")).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("package", ["tensorrail_runtime", "tensorrail_exporter", "tensorrail_trainer"])
def test_the_reference_has_every_public_name(package):
    page = ROOT / "docs" / "api" / f"{package.removeprefix('tensorrail_')}.md"
    listed = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    made = importlib.import_module(package)
    assert set(made.__all__) <= {name.rpartition(".")[2] for name in listed}
    assert len(listed) == len(set(listed))
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
        # The reference is made without running code: a module hides a function of its name.
        assert not (ROOT / Path(made.__path__[0]).parent / f"{name.replace('.', '/')}.py").exists(), name


def test_the_reference_of_the_front_door_has_every_verb_and_setting():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")}
    listed = {stem: re.findall(r"^::: (\S+)$", text, re.MULTILINE) for stem, text in pages.items()}
    described = {name.rpartition(".")[2] for names in listed.values() for name in names}
    assert set(tensorrail.__all__) - {"regress"} <= described
    for name in set(listed["tensorrail"]):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    named = set(re.findall(r"`(?:tr\.)?(\w+)`", pages["tensorrail"]))
    own = {name.rpartition(".")[2] for name in listed["tensorrail"]}
    assert set(tensorrail.__all__) - {"regress"} <= named | own


def test_pages_and_examples_import_the_front_door_alone():
    own_format = {"tensorrail_exporter", "tensorrail_exporter.formats"}  # what a format of one's own is made of
    for path in [*TEXTS, *sorted((ROOT / "examples").glob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        imported = re.findall(r"^\s*(?:from|import) (tensorrail_[\w.]*)", text, re.MULTILINE)
        allowed = own_format if path.name == "own-format.md" else set()
        assert set(imported) <= allowed, name_of(path)


def test_figures_of_the_performance_page_stand_in_results():
    results = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "results").glob("*.md")))
    figures = re.findall(r"\d+\.\d\d×", (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    assert figures
    assert not [figure for figure in figures if figure not in results]


def test_the_pictures_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = importlib.import_module("pictures")
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert pictures.with_table(page) == page, "run `python benchmarks/pictures.py`"
    drawn = (ROOT / "docs" / "assets" / "speed-accuracy.svg").read_text(encoding="utf-8")
    for row in pictures.forms(ROOT / "results" / "compress.json"):
        assert f"{row.network}, batch {row.batch}, {row.form}: {row.speed:.2f}×" in drawn, "run `python benchmarks/pictures.py`"


def test_trained_runs_are_read_as_runs_py_writes_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures, runs = (importlib.import_module(name) for name in ("pictures", "runs"))
    rows = [
        ("a", "cores, as cut", "30", "60.00 %", *["–"] * 5),
        (
            "a",
            "cores, fine-tuned",
            "40",
            "69.50 %",
            "2.00",
            "2.50",
            "1.80× [1.70, 1.90]",
            "2.10× [2.00, 2.20] at 32",
            "1.0e-07",
        ),
        ("a", "dense control", "40", "70.25 %", *["–"] * 5),
        ("b", "cores, fine-tuned", "40", "68.00 %", *["–"] * 5),  # trained, and not timed yet
    ]
    lines = [runs.HEAD, ["---"] * len(runs.HEAD), *rows]
    (tmp_path / "cifar100.md").write_text("# CIFAR-100\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    (tmp_path / "cifar100").mkdir()
    for run in ("a", "b"):
        epochs = [
            Epoch(phase=phase, epoch=1, lr=0.1, loss=1.0, train_accuracy=90.0, test_accuracy=accuracy, seconds=1.0)
            for phase, accuracy in (("dense", 65.0), ("admm", 64.0), ("finetune", 69.5), ("control", 70.25))
        ]
        TrainingLog(epochs=tuple(epochs)).save(tmp_path / "cifar100" / f"{run}.json")
    found = pictures.trained_runs(tmp_path / "cifar100.md", tmp_path / "cifar100")
    assert found == [pictures.TrainedRun("a", dense=70.25, factored=69.5, speed=1.8)]


@pytest.mark.parametrize("name", ["pipeline", "speed-accuracy", "house", "logo"])
def test_pictures_are_svg_that_loads_nothing(name):
    from xml.etree import ElementTree as Tree

    text = (ROOT / "docs" / "assets" / f"{name}.svg").read_text(encoding="utf-8")
    root = Tree.fromstring(text)  # noqa: S314 - our own file
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.search(r"(?:href|src)=\"(?:https?:)?//|url\((?!#)|@import|<script", text)
    if name != "logo":  # both schemes, by the system's wish and by hand
        assert "prefers-color-scheme: dark" in text
        assert "#only-dark:target" in text


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the site's own packages
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
        build(config)
    html = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r"<(?:script|img)[^>]+src=\"([^\"]+)\"|<link[^>]+rel=\"stylesheet\"[^>]+href=\"([^\"]+)\"", html)
    assert loaded
    assert not [one for pair in loaded for one in pair if "//" in one], "the site loads nothing from elsewhere"
