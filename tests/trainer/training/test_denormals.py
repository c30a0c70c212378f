"""Denormal numbers count as 0 while a recipe trains, in every thread that torch computes with."""

import subprocess
import sys

import torch

from tensorrail_trainer.training import denormals
from tensorrail_trainer.training.denormals import flushed

# The module alone: the rest of the package takes seconds to import, and may compute before the threads begin.
THREADS = """
import runpy, sys, torch
flushed = runpy.run_path(sys.argv[1])["flushed"]
torch.set_num_threads(2)
with flushed():
    small = torch.full((10**7,), 1.2e-38)  # enough for every thread to have its part
    print(int((small * 0.5).count_nonzero()))
"""


def half():
    return float(torch.tensor(1.2e-38) * 0.5)


def test_they_are_flushed_inside_and_not_after():
    assert half() > 0
    with flushed():
        assert half() == 0
        with flushed():
            pass
        assert half() == 0
    assert half() > 0


def test_other_defaults_of_torch_do_not_mislead_it():
    for kind in (torch.float64, torch.float16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        try:
            with flushed():
                with flushed():
                    pass
                assert float(torch.tensor(1.2e-38, dtype=torch.float32) * 0.5) == 0
            assert float(torch.tensor(1.2e-38, dtype=torch.float32) * 0.5) > 0
        finally:
            torch.set_default_dtype(before)


def test_every_thread_flushes_them():
    done = subprocess.run([sys.executable, "-c", THREADS, denormals.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
