"""One thread for torch: matrices this small only wait for more of them, and longest on a machine that is busy."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    try:
        import torch
    except ImportError:  # the tests that need it skip
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
