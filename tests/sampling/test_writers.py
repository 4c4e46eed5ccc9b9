"""Images to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from guided_diffusion.sampling import writers


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_picture_shows_every_channel_count(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    writers.write_grid(str(tmp_path / "grid.png"), np.zeros((5, 8, 8, channels), np.uint8), ["a"] * 5)
    assert Image.open(tmp_path / "grid.png").size == (3 * 66 + 2, 2 * 78 + 2)


def test_npz_of_wrong_length_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 images instead of 4"):
        writers.write_npz(str(tmp_path / "x.npz"), [np.zeros((3, 2, 2, 1), np.uint8)], (4, 2, 2, 1))
    assert list(tmp_path.iterdir()) == []


def test_writing_an_npz_reads_one_part_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    parts = (np.full((10, 64, 64, 3), k, np.uint8) for k in range(100))
    tracemalloc.start()
    writers.write_npz(str(tmp_path / "x.npz"), parts, (1000, 64, 64, 3), np.arange(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < 1000 * 64 * 64 * 3
    with np.load(tmp_path / "x.npz") as found:
        assert found["arr_0"][995, 0, 0, 0] == 99 and found["arr_1"][995] == 995
