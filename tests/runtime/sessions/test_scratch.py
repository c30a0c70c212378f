"""Temporary folders go away, whenever a signal arrives."""

import shutil

import pytest

from tensorrail_runtime import scratch as module
from tensorrail_runtime.scratch import scratch


class Terminated(BaseException):
    """What a signal raises."""


def test_a_folder_is_there_for_its_owner_alone_and_goes(tmp_path):
    with scratch("a-", tmp_path) as folder:
        (made,) = tmp_path.iterdir()
        assert str(made) == folder
        assert made.name.startswith("a-")
        assert made.stat().st_mode & 0o077 == 0
        (made / "m.onnx").write_bytes(b"")
    assert list(tmp_path.iterdir()) == []
    assert module._left == {}


@pytest.mark.parametrize("when", ["after it is made", "while it is removed"])
def test_a_signal_at_a_bad_moment_leaves_the_folder_to_the_end_of_the_process(when, tmp_path, monkeypatch):
    owner, name = (module.os, "mkdir") if when == "after it is made" else (shutil, "rmtree")
    real = getattr(owner, name)

    def interrupted(*arguments, **options):
        if when == "after it is made":
            real(*arguments, **options)
            monkeypatch.setattr(shutil, "rmtree", interrupted_too)
        raise Terminated

    def interrupted_too(*_, **__):
        raise Terminated

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(Terminated), scratch(beside=tmp_path):
            pass
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    module._remove_all()
    assert list(tmp_path.iterdir()) == []
    assert module._left == {}
