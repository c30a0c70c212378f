"""Whether a provider computes in fp16, as the graph that runs shows."""

import platform

import pytest

from tensorrail_runtime.sessions.halves import computes_in_fp16
from tensorrail_runtime.sessions.session import Session


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_gpus_compute_in_fp16(provider):
    assert computes_in_fp16(Session(provider=provider))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors may have kernels in fp16")
def test_the_cpu_provider_casts_around_products_on_x86():
    assert not computes_in_fp16(Session())
    assert not computes_in_fp16(Session(threads=1))
