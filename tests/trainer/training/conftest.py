"""A server from which test processes are forked: each of them would import for ten seconds otherwise."""

import multiprocessing.forkserver

import pytest

PRELOADED = [
    "tensorrail.cli",
    "tensorrail_trainer.run.pipeline",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch._dynamo",
]


@pytest.fixture(scope="session")
def forkserver():
    """Start the server, with what a training run imports; return the context whose processes are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context
