"""Set-up of every test: one thread a worker, no network, CUDA tests only where CUDA is.

Without CUDA the Triton kernels run in Triton's interpreter, on CPU tensors. Triton decides this when it is imported, so
the switch is set here, before any test module is.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # reads OMP_NUM_THREADS as it loads

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _give_back_gpu_memory(request: pytest.FixtureRequest):
    """What a test leaves in torch's cache is no use to the other workers on the same card."""
    yield
    if request.node.get_closest_marker("gpu"):
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
