"""`tensorrail serve` as far as it goes without a server: its help, and how it ends on bad input."""

import os
import socket
import subprocess
import sys

import onnx
import pytest
from conftest import make_model
from onnx import helper
from typer.testing import CliRunner

import tensorrail.cli
from tensorrail_runtime.serve.http.options import ServeOptions


@pytest.fixture
def cli(cli):
    """Leave the environment, in which the command sets what Ray reads, as it was."""
    before = dict(os.environ)
    yield cli
    os.environ.clear()
    os.environ.update(before)


def test_help_says_where_it_listens_and_who_may_ask():
    result = CliRunner().invoke(tensorrail.cli.app, ["serve", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert "127.0.0.1" in result.output
    for option in (
        "--address",
        "--replicas",
        "--max-batch",
        "--batch-wait",
        "--shadow",
        "--fraction",
        "--timeout",
        "--max-mib",
    ):
        assert option in result.output


def test_ctrl_c_before_it_is_ready_is_no_success(cli, small_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tensorrail.verbs.serve.serve", interrupted)
    code, out, err = cli("serve", small_path, "--port", 0)
    assert (code, out, err) == (130, "", "tensorrail: interrupted\n")


@pytest.mark.parametrize("missing", ["ray", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(small_path, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import tensorrail_runtime, tensorrail_runtime.serve.protocol.request, tensorrail_runtime.serve.replicas.batch_axis\n"
        "from tensorrail.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "serve", small_path, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tensorrail: this command needs {missing}: install the extra `serve`, as in pip install '.[serve]'\n"


def test_bad_input_is_one_line_and_exit_code_2(cli, small_path, tmp_path):
    pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    other = tmp_path / "other.onnx"
    onnx.save(make_model([helper.make_node("Relu", ["x"], ["z"])], {}, {"x": ["n", 4]}, {"z": ["n", 4]}), other)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, reason in (
            ((garbage,), "garbage.onnx: ONNX Runtime cannot load it"),
            ((tmp_path / "none.onnx",), "none.onnx: cannot be read (No such file or directory): expected an ONNX model"),
            ((small_path, "--name", "a/b"), "expected a model name of letters, digits"),
            ((small_path, "--shadow", other, "--fraction", 0), "expected a share of shadowed requests above 0"),
            ((small_path, "--fraction", 0.5), "--fraction is the share of requests that a second model gets: give --shadow"),
            ((small_path, "--provider", "quantum"), "unknown provider 'quantum': expected one of cpu"),
            ((small_path, "--address", "ray://head:10001"), "expected `auto` or HOST:PORT of the cluster's head"),
            ((small_path, "--shadow", garbage), "garbage.onnx: ONNX Runtime cannot load it"),
            ((small_path, "--shadow", other), "cannot shadow the served model: expected outputs y (FP32), got z (FP32)"),
            (
                (small_path, "--port", port),
                f"cannot listen at 127.0.0.1:{port} (Address already in use): try another port",
            ),
            ((small_path, "--host", "no.such.host.invalid"), "host 'no.such.host.invalid': this name cannot be resolved"),
        ):
            code, out, err = cli("serve", *arguments)
            assert (code, out) == (2, ""), reason
            assert reason in err
            assert err.count("\n") == 1


def test_a_replica_on_a_gpu_reserves_one_unless_it_is_said():
    assert [ServeOptions("m", provider=provider).reserved_gpus for provider in ("cpu", "cuda", "tensorrt")] == [0, 1, 1]
    assert [ServeOptions("m", provider="cuda", gpus=gpus).reserved_gpus for gpus in (0, 0.5)] == [0, 0.5]
