"""Plans without hope, and plans that do not do what they look like: a sentence each, before any time is spent."""

from __future__ import annotations

from ..settings.config import TrainConfig

# From scratch: the paper took 10 million images. On the bundled emoji model, a tiny one, 1,500 images are enough to see
# that the image is read; with a few hundred nothing but those images is learnt.
FEW_IMAGES = 1000
# The paper showed each image 6 times. The config sd15-plus-finetune shows each of 100 images 160 times and advises to
# stop earlier; several times that learns them by heart, whatever the learning rate.
MANY_EPOCHS = 500

FINE_TUNE = "sd15-plus-finetune"


def outlook(config: TrainConfig, size: int | None, held_out: int, steps: int, images_per_step: int) -> list[str]:
    """What is likely to disappoint in a training of `steps` steps on `size` images (None: unknown)."""
    found: list[str] = []
    if size is not None:
        epochs = steps * images_per_step / size
        if size < FEW_IMAGES and config.init_from is None:
            found.append(
                f"{size:,} images do not train an adapter from scratch; that takes {FEW_IMAGES:,} at the very least. "
                f"Start from a published adapter with init_from=..., as the config {FINE_TUNE} does."
            )
        if epochs > MANY_EPOCHS:
            found.append(
                f"{steps:,} steps of {images_per_step:,} show each of the {size:,} images {epochs:,.0f} times; beyond "
                f"{MANY_EPOCHS} times they are learnt by heart. The config {FINE_TUNE} takes 2,000 steps of 8."
            )
        if images_per_step > size:
            found.append(
                f"A step takes {images_per_step:,} images, but there are only {size:,}: it sees them more than once. "
                "Lower batch_size or gradient_accumulation_steps."
            )
    if config.save_every > steps:
        found.append(f"save_every={config.save_every:,} is more than the {steps:,} steps: a crash costs all of them.")
    if held_out and config.validate_every > steps:
        found.append(
            f"validate_every={config.validate_every:,} is more than the {steps:,} steps: the validation runs at the "
            "start and at the end only."
        )
    return found
