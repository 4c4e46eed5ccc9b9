"""Going on with another batch size: the walk over the images neither repeats nor leaves out any."""

from itertools import islice

import numpy as np
from PIL import Image

from guided_diffusion.data.listing import list_records
from guided_diffusion.data.loader import make_batches


def walk(records, steps, **options):
    batches = make_batches(records, image_size=4, flip=False, **options)
    return [int(image[0, 0, 0]) for batch in islice(batches, steps) for image in batch.images]


def test_another_batch_size_goes_on_at_the_next_image(tmp_path):
    for k in range(12):
        Image.fromarray(np.full((4, 4, 3), 10 * k, np.uint8)).save(tmp_path / f"{k:02d}.png")
    records = list_records(tmp_path)
    whole = walk(records, 24, batch_size=1)
    before = walk(records, 3, batch_size=2)
    after = walk(records, 6, batch_size=3, start_step=3, start_image=6)
    assert before + after == whole and sorted(whole[:12]) == [10 * k for k in range(12)]
    # The same as two processes, each with its part of each batch.
    parts = [walk(records, 6, batch_size=4, rank=r, size=2, start_step=3, start_image=6)[:4] for r in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole[6:14])
