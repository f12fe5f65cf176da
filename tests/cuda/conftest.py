"""These tests pretend that there is a CUDA device: `--pretend-cuda`, in an environment with a CUDA build of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests out unless they are asked for. Raises `UsageError` where this torch can't pretend."""
    if not config.getoption("--pretend-cuda"):
        return True if collection_path.name.startswith("test_") else None
    if torch.version.cuda is None:
        raise pytest.UsageError("--pretend-cuda needs a CUDA build of torch (no driver): pip install torch==2.14.1")
    return None
