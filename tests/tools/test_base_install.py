"""The base install: the package, and of this environment exactly what its metadata ask for without an extra.

Nothing is downloaded. The distributions that `Requires-Dist` names, and those that they name, are found by their metadata and
linked, file by file, into an environment that sees nothing else. So what is absent there is what the metadata do not ask for.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_action import run_step, source

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "matplotlib", "tensorly", "onnx_graphsurgeon", "safetensors", "sklearn", "accelerate", "yaml", "onnxscript")
IN_ONE_PROCESS = """
import json, pathlib, sys
from tensorrail.cli import main
for arguments in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    sys.argv = ["tensorrail", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("ended with", ended.code or 0, flush=True)
print([name for name in ("torch", "tensorly", "onnx_graphsurgeon") if name in sys.modules])
"""


def closure(requirements):
    """Return the distributions that requirements lead to, extras only where one is asked for by name."""
    found, left = {}, [Requirement(text) for text in requirements]
    seen = set()
    while left:
        asked = left.pop()
        extras = asked.extras or {""}
        for extra in extras:
            if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
                continue
            key = (canonicalize_name(asked.name), extra)
            if key in seen:
                continue
            seen.add(key)
            one = found[key[0]] = metadata.distribution(asked.name)
            assert asked.specifier.contains(one.version, prereleases=True), f"{asked} is not met by {one.version}"
            for text in one.requires or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    needed.marker = None
                    left.append(needed)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The Python of a base install, made by the install step of the action itself.

    pip has no network there: it and the build's tools are those of this environment, and what the package needs is left out,
    to be linked afterwards.
    """
    folder = tmp_path_factory.mktemp("base")
    (folder / "action").mkdir()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@" --without-pip\n')  # called once, as `-m venv FOLDER`
    python.chmod(0o755)
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_CONFIG_FILE": os.devnull}
    offline["PIP_NO_BUILD_ISOLATION"] = "0"  # pip reads it the other way round: this is `--no-build-isolation`
    offline["PYTHONPATH"] = sysconfig.get_path("purelib")
    inputs = {"model": "m", "baseline": "b", "python": str(python)}
    done, _, _ = run_step("install", inputs, folder, action=source(folder / "action"), **offline)
    assert done.returncode == 0, done.stderr
    (added,) = (folder / "GITHUB_PATH").read_text().splitlines()
    (packages,) = Path(added).parent.glob("lib/python*/site-packages")
    assert {path.name.partition("-")[0].partition("_")[0] for path in packages.iterdir()} == {"tensorrail"}
    files = [
        (packages / file, one.locate_file(file)) for one in closure(requires(packages)).values() for file in one.files or []
    ]
    links = [(link, target) for link, target in files if ".." not in link.parts]  # no scripts, which the base does not need
    for folder in {link.parent for link, _ in links}:
        folder.mkdir(parents=True, exist_ok=True)
    for link, target in links:
        link.symlink_to(target)
    return Path(added) / "python"


def requires(packages):
    """Return what the installed package asks for."""
    (one,) = metadata.distributions(name="tensorrail", path=[str(packages)])
    return one.requires


def call(base, *arguments, cwd=None):
    """Run Python there; isolated, so that no variable and no folder of this environment is seen."""
    return subprocess.run([str(base), "-I", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd)


def cli(base, *arguments, cwd=None):
    return call(base, "-m", "tensorrail", *arguments, cwd=cwd)


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_packages_are_not_there(name, base):
    done = call(base, "-c", f"import {name}")
    assert done.returncode == 1
    assert f"No module named '{name}'" in done.stderr


def test_the_runtime_imports_alone(base):
    code = "import sys, tensorrail_runtime; print(tensorrail_runtime.__file__, *sys.path, sep='\\n')"
    done = call(base, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(base.parents[1]) for line in done.stdout.splitlines() if "site-packages" in line)


def test_commands_of_the_runtime_work(base, small_path, tmp_path, rng):
    """In one process, since importing takes longer than most of them; the gate starts more of its own."""
    data = tmp_path / "data.npz"
    np.savez(data, x=rng.standard_normal((20, 16, 8, 8)).astype(np.float32), labels=np.zeros(20, np.int64))
    quick = ("--processes", 2, "--seconds", 0.05, "--max-slowdown", "900%")
    commands = [
        (("check", small_path, small_path), "within tolerance"),
        (("bench", small_path, small_path, "--duration", 0.1), "speed-up"),
        (("inspect", small_path), "whole graph"),
        (("inspect", small_path, "--placement"), "on CPU"),
        (("accuracy", small_path, small_path, "--data", data), "McNemar"),
        (("regress", "check", small_path, small_path, *quick), "no regression"),
        (("package", small_path, "--triton", tmp_path / "repository"), "batches up to 8"),
    ]
    (tmp_path / "commands.json").write_text(json.dumps([list(map(str, arguments)) for arguments, _ in commands]))
    done = call(base, "-c", IN_ONE_PROCESS, tmp_path / "commands.json")
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("ended with ")
    assert len(parts) == len(commands) + 1
    for k, (arguments, printed) in enumerate(commands):
        assert parts[k + 1].startswith("0\n"), (arguments, done.stderr)
        assert printed in " ".join(parts[k].split()), arguments  # wherever a long path broke the line
    assert parts[-1] == "0\n[]\n"


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("train", ROOT / "recipes" / "digits.yaml"), "train"),
        (("run", ROOT / "recipes" / "digits.yaml"), "train"),
        (("plan", "small.onnx", "-o", "p.json", "--target", "latency=2"), "export"),
        (("export", "small.onnx", "--plan", "p.json", "-o", "o.onnx"), "export"),
    ],
)
def test_what_needs_an_extra_names_it_in_one_line(arguments, extra, base, tmp_path):
    done = cli(base, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    advice = rf"install the extra `{extra}`, as in pip install '\.\[{extra}\]'\n"
    assert re.fullmatch(rf"tensorrail: this command needs \w+: {advice}", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "extra"), [("ADMM", "train"), ("Plan", "export")])
def test_a_name_of_the_library_says_which_extra_it_needs(name, extra, base):
    code = f"import tensorrail; print(tensorrail.Session().provider, tensorrail.ModelError.exit_code); tensorrail.{name}"
    done = call(base, "-c", code)
    assert (done.returncode, done.stdout) == (1, "cpu 2\n")
    advice = rf"install the extra `{extra}`, as in pip install '\.\[{extra}\]'\n"
    assert re.search(rf"MissingExtraError: tensorrail\.{name} needs \w+: {advice}$", done.stderr)


def test_help_imports_nothing_heavy(base):
    """What `tensorrail --help` imports decides how fast it answers, on every machine."""
    done = call(base, "-X", "importtime", "-m", "tensorrail", "--help")
    assert done.returncode == 0
    assert "package" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"typer", "tensorrail"} <= imported
    assert not imported & {"numpy", "onnxruntime", "onnx", "pydantic", "scipy", "matplotlib", "google", *HEAVY}
    assert "tensorrail_runtime" not in imported


def test_the_script_is_the_command_line(base):
    done = subprocess.run([base.with_name("tensorrail"), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
