"""The processes of the tests of torch.distributed: four, started once for each worker of pytest."""

from __future__ import annotations

import pytest

from helpers.pool import Pool


@pytest.fixture(scope="session")
def pool():
    made = Pool(4)
    yield made
    made.close()
