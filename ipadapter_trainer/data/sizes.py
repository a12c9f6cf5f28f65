"""What the sizes of the images mean for a training: which are scaled up, and which buckets hold too few."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .buckets import assign, make_buckets, read_sizes
from .examples import Example
from .images import Size

SAMPLE = 500  # headers that are read before a training


def sample_sizes(examples: Sequence[Example], count: int = SAMPLE) -> list[Size | None]:
    """The sizes of some examples, the same ones each time, from their lists or their files' headers."""
    chosen = examples if len(examples) <= count else random.Random(0).sample(examples, count)
    return read_sizes(chosen)


def size_notes(
    sizes: Sequence[Size | None], images: int, resolution: int, bucket_step: int | None = None, batch_size: int = 1
) -> list[str]:
    """Sentences about images that are scaled up to their target, and about buckets that cannot fill a batch; none
    where all is well. `sizes` are those of all `images` or of a sample; without `bucket_step` the target is a square.
    """
    known = [size for size in sizes if size is not None]
    if not known:
        return []
    targets = ((resolution, resolution),) if bucket_step is None else make_buckets(resolution, bucket_step)
    buckets = assign(known, targets)
    target_of = {row: target for target, rows in zip(buckets.sizes, buckets.rows, strict=True) for row in rows}
    small = sum(w < target_of[row][0] or h < target_of[row][1] for row, (w, h) in enumerate(known))
    times = images / len(sizes)  # 1 unless they are a sample
    notes: list[str] = []
    if small:
        found = f"{small:,} of {images:,} images"
        if times > 1:
            found = f"about {small * times:,.0f} of {images:,} images ({small:,} of a sample of {len(sizes):,})"
        target = "their bucket" if bucket_step is not None else f"{resolution}x{resolution} pixels"
        notes.append(f"Smaller than {target}, so scaled up and blurred: {found}.")
    few = sum(len(rows) * times < batch_size for rows in buckets.rows)
    if bucket_step is not None and few and len(buckets.rows) > 1:
        guess = "" if times == 1 else f", by a sample of {len(sizes):,}"
        notes.append(
            f"Buckets with fewer than {batch_size} images, a batch: {few} of {len(buckets.rows)}{guess}; their images "
            "go to the next nearest one."
        )
    return notes
