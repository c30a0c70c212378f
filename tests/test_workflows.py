"""What keeps the project's habits: workflows, pre-commit hooks, the changelog, and the file names in CONTRIBUTING.md."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from pre_commit.commands.validate_config import validate_config

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
HOOKS = ROOT / ".pre-commit-config.yaml"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def workflow(name: str) -> dict:
    return yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))


def steps(name: str) -> list[dict]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def make_targets(script: str) -> list[str]:
    """Return the targets of the lines of a script that call make; options and variables are left out."""
    calls = re.findall(r"^\s*make\b([^\n;&|#]*)", script, re.MULTILINE)
    return [word for call in calls for word in call.split() if not word.startswith("-") and "=" not in word]


def targets_in_the_makefile() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", text_of("Makefile"), re.MULTILINE))


def test_the_workflows_are_those_of_tests_site_and_release():
    assert set(WORKFLOWS) == {"all", "ci", "docs", "release"}


def test_workflows_have_the_form_that_their_schema_asks_for():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        done = subprocess.run([*command, schema, *map(str, WORKFLOWS.values())], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", WORKFLOWS)
def test_make_targets_of_a_workflow_exist(name):
    called = [target for step in steps(name) for target in make_targets(step.get("run", ""))]
    assert called
    assert set(called) <= targets_in_the_makefile()


def test_ci_calls_what_the_local_check_calls():
    called = [target for step in steps("ci") for target in make_targets(step.get("run", ""))]
    assert called == make_targets(text_of(".ci/run")) == ["lint", "test"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_least_permissions_and_pinned_actions(name):
    flow = workflow(name)
    assert flow["permissions"] == {"contents": "read"}
    assert flow["concurrency"]["group"]
    for step in steps(name):
        assert "${{" not in step.get("run", ""), "an expression in a script would be run as text of the script"
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v\d+)", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert "secrets" not in json.dumps(flow["jobs"])


def test_only_the_jobs_that_publish_may_write():
    permissions = {
        (name, job): rights["permissions"]
        for name in WORKFLOWS
        for job, rights in workflow(name)["jobs"].items()
        if "permissions" in rights
    }
    assert permissions == {
        ("docs", "deploy"): {"pages": "write", "id-token": "write"},
        ("release", "publish"): {"id-token": "write"},
    }
    assert workflow("release")["jobs"]["publish"]["needs"] == "install"
    assert workflow("release")["jobs"]["install"]["needs"] == "build"


def test_every_python_of_the_matrix_is_one_that_the_package_supports():
    required = tomllib.loads(text_of("pyproject.toml"))["project"]["requires-python"]
    for name, job in (("ci", "check"), ("release", "install")):
        versions = workflow(name)["jobs"][job]["strategy"]["matrix"]["python"]
        assert versions == ["3.11", "3.12", "3.13"]
        assert required == f">={versions[0]}"


def test_pre_commit_hooks_have_the_form_that_pre_commit_asks_for(capsys):
    assert validate_config([str(HOOKS)]) == 0, capsys.readouterr().out


def test_pre_commit_hooks_run_the_ruff_of_the_constraints_and_make_targets_that_exist():
    repositories = yaml.safe_load(HOOKS.read_text(encoding="utf-8"))["repos"]
    revisions = {repository["repo"].rpartition("/")[2]: repository.get("rev") for repository in repositories}
    (ruff,) = re.findall(r"^ruff==(.+)$", text_of("constraints.txt"), re.MULTILINE)
    assert revisions["ruff-pre-commit"] == f"v{ruff}"
    entries = [hook["entry"] for repository in repositories if repository["repo"] == "local" for hook in repository["hooks"]]
    called = [target for entry in entries for target in make_targets(entry)]
    assert called == ["lint"]
    assert set(called) <= targets_in_the_makefile()


def test_the_changelog_has_a_dated_section_of_this_version():
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    sections = re.findall(r"^## (.+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", sections[1])


def test_files_that_contributing_names_exist():
    text = text_of("CONTRIBUTING.md")
    folders = "benchmarks|docs|exporter|recipes|results|runtime|tests|tools|trainer"
    named = re.findall(rf"[`(]((?:{folders})/[\w./-]*)[`)]", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("package", ["tools/tensorrail", *(f"{n}/tensorrail_{n}" for n in ("trainer", "exporter", "runtime"))])
def test_the_picture_of_the_house_shows_the_folders_that_are_there(package):
    floor = text_of("docs/assets/house.svg").partition(f">{package}<")[2].partition("</g>")[0]
    drawn = set(re.findall(r'class="folder"[^>]*>([\w.]+)<', floor))
    there = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert {name for name in drawn if not name.endswith(".py")} == there
    assert [name for name in drawn if not (ROOT / package / name).exists()] == []


def test_lines_of_the_project_documents_have_at_most_100_characters():
    long = [
        f"{name}:{number}"
        for name in ("CONTRIBUTING.md", "CHANGELOG.md")
        for number, line in enumerate(text_of(name).splitlines(), 1)
        if len(line) > 100
    ]
    assert long == []


def test_torch_does_not_take_a_folder_of_tests_for_triton():
    """Pytest puts a folder with tests on the path, and torch looks there for the package `triton`."""
    assert not list((ROOT / "tests" / "runtime").glob("test_*.py")), (
        "move these into a folder: tests/runtime/triton is no package"
    )
