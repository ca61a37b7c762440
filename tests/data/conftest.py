from pathlib import Path

import pytest

from tests.data.shards import make_sample, write_shards

NUM_IMAGES = 23


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """23 images with 0 to 3 boxes, portrait and landscape, in four uneven shards. Read only."""
    folder = tmp_path_factory.mktemp("sets") / "whole"
    samples = [make_sample(1000 + n, boxes=n % 4, height=40 + 3 * n, width=60) for n in range(NUM_IMAGES)]
    return write_shards(folder, samples)
