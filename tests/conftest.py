"""What holds for all tests: the same inputs every time, and no GPU test where there is no GPU."""

from __future__ import annotations

import pytest
from hypothesis import settings

# Derandomized: a failure is there again in the next run. No deadline: the first import of torch takes seconds.
settings.register_profile("llmtailor", derandomize=True, deadline=None)
settings.load_profile("llmtailor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not for_gpu:
        return
    import torch  # only now: most test runs have no use for it this early

    if not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
