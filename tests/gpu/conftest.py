"""Without a GPU all of these are left out, and say why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.test_engines import why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    reason = why_not() if here else None
    if reason:
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))
