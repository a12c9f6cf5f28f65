"""The keys of `ipadapter train` and `ipadapter cache`, with their defaults and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, get_args

from pydantic import Field

from .fields import (
    DataRoot,
    FaceTable,
    ModelConfig,
    PathOrUrl,
)
from .kinds import TRAIN_KINDS

KindName = Literal["base", "plus", "full", "faceid", "faceid-plus", "faceid-plusv2", "portrait"]
assert get_args(KindName) == tuple(TRAIN_KINDS)


class TrainOptions(ModelConfig):
    """Fields of `TrainConfig`. The defaults are those of the IP-Adapter paper (arXiv 2308.06721)."""

    command: ClassVar[str] = "train"

    # --- Adapter
    kind: KindName = Field(
        "base",
        description="Kind of adapter. " + ". ".join(f"{k.name}: {k.summary}" for k in TRAIN_KINDS.values()) + ".",
    )
    num_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of image tokens; default: as published. Most hosts only load the published number.",
    )
    init_from: Path | None = Field(
        None, description="Adapter file to fine-tune instead of a new adapter; use a learning rate of 1e-5 to 2e-5."
    )

    # --- Data
    data: PathOrUrl = Field(
        description="Images and captions: a folder (image.png with image.txt, or a metadata.jsonl or .csv), a "
        '.jsonl or .csv list, a JSON list [{"image_file": ..., "text": ...}], or WebDataset shards, local or by URL: '
        "images-{000..099}.tar or images-*.tar."
    )
    output: Path = Field(description="Folder for checkpoints, logs and the exported adapter.")
    data_root: DataRoot = None
    face_embeds: FaceTable = None
    cache: Path | None = Field(
        None,
        description="Folder that `ipadapter cache` wrote with these settings; training reads the encoder outputs from "
        "it.",
    )
    cache_variants: int = Field(
        1,
        ge=1,
        description="Number of random crops cached per image (and per reference, with reference_crop); epochs cycle "
        "through them. The cache grows in proportion.",
    )
    cache_image_features: Literal["float16", "int8", "none"] = Field(
        "float16",
        description="How the hidden states for plus, full and the faceid-plus kinds are cached: float16 (658 KB per "
        "image with ViT-H/14), int8 (half of that), or none to run the image encoder during training. The embeddings "
        "for base are always cached in float16.",
    )
    resolution: int = Field(
        512,
        ge=8,
        le=16384,  # as MAX_SIDE of `generate`
        multiple_of=8,
        description="Side of the training images in pixels; use the native resolution of the base model.",
    )
    buckets: bool = Field(
        False,
        description="Batches of one aspect ratio each, with about resolution x resolution pixels, instead of squares.",
    )
    bucket_step: int = Field(64, ge=8, multiple_of=8, description="Bucket sides are multiples of this.")
    crop: Literal["center", "random"] = Field(
        "center",
        description="Where images are cropped to the target aspect ratio. The image prompt is cropped alike if it is "
        "the image itself; other references are not cropped.",
    )
    flip: bool = Field(
        False, description="Mirror half of the images. Leave it off for lettering and left/right captions."
    )
    reference_crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Smallest share of the reference image kept by a random crop, against copying; 1 turns it off.",
    )
    self_reference: float = Field(
        0.0,
        ge=0,
        le=1,
        description="For rows with a reference: probability of using the image itself as the image prompt.",
    )
    text_dropout: float = Field(
        0.05, ge=0, le=1, description="Probability of dropping the caption, for guidance and image-only prompts."
    )
    image_dropout: float = Field(
        0.05, ge=0, le=1, description="Probability of dropping the image prompt, for classifier-free guidance."
    )
    both_dropout: float = Field(0.05, ge=0, le=1, description="Probability of dropping caption and image prompt.")
    num_workers: int = Field(
        4, ge=0, description="Processes that load and decode images; 0 loads them in the training process."
    )

    # --- Training
    steps: int | None = Field(
        None, ge=1, description="Total number of optimizer steps, including resumed ones. Or set epochs."
    )
    epochs: float | None = Field(None, gt=0, description="Total number of epochs. Or set steps.")
    batch_size: int = Field(8, ge=1, description="Images per device and batch.")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Batches per optimizer step: a larger effective batch for the same memory, in more time.",
    )
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree"] = Field(
        "adamw",
        description="adamw: PyTorch's fused AdamW. adamw8bit: 8-bit states (needs bitsandbytes). prodigy: adapts the "
        "learning rate (needs prodigyopt; set learning_rate=1). schedulefree: AdamW without a schedule (needs "
        "schedulefree).",
    )
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate; 1 for prodigy.")
    lr_scheduler: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="Learning rate schedule after the warm-up."
    )
    lr_warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from zero.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 turns clipping off.")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of an exponential moving average of the weights (0.9999 for long runs), which is then "
        "exported; 0 turns it off.",
    )
    noise_offset: float = Field(
        0.0, ge=0, description="Offset noise per channel, for darker and brighter images; SDXL was trained with 0.05."
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="Gamma of min-SNR loss weighting (arXiv 2303.09556), usually 5."
    )
    zero_terminal_snr: bool = Field(
        False,
        description="Rescale the noise schedule to zero terminal SNR (arXiv 2305.08891), for v-prediction base models "
        "trained with it.",
    )
    mixed_precision: Literal["no", "bf16", "fp16", "fp8"] = Field(
        "no",
        description="Precision of the frozen models; the adapter stays in float32. no: float32. bf16: half the memory "
        "and much faster on a GPU. fp16: the same with loss scaling, for GPUs without bfloat16 (before Ampere). fp8: "
        "the UNet is stored in 8 bit and computed in bfloat16, for a quarter of the memory.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: much less memory, about a third more time."
    )
    compile: bool = Field(
        False, description="Compile the UNet with torch.compile: minutes at the start, then faster steps."
    )
    cuda_graphs: bool = Field(
        True,
        description="On a GPU, record the kernels of a step once and launch them together, as a CUDA graph: faster "
        "steps, with the same results but for rounding. Left out with several GPUs, gradient_checkpointing, compile "
        "and fp16.",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,  # NumPy's largest
        description="Seed of the weights, the order of the data, crops, dropout and noise.",
    )

    # --- Output
    save_every: int = Field(1000, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(3, ge=1, description="Number of checkpoints to keep; the oldest are deleted.")
    log_every: int = Field(10, ge=1, description="Steps between lines of log.jsonl; losses are averaged over them.")
    log_with: Literal["tensorboard", "wandb", "trackio", "none"] = Field(
        "tensorboard", description="Tracker for metrics and images, besides log.jsonl and the report."
    )
    validation_images: int = Field(
        16, ge=0, description="Images held out for validation, at most a tenth of the data; 0 turns validation off."
    )
    validate_every: int = Field(
        1000,
        ge=1,
        description="Steps between validations: losses at fixed noise and timesteps with the right image, no image and "
        "another image; the share of image attention; and a grid of samples.",
    )
    sample_images: int = Field(4, ge=0, description="Rows of the sample grid; 0 turns it off.")
    sample_prompt: str = Field("", description="Text prompt for an additional column of the sample grid.")
    sample_steps: int = Field(20, ge=1, le=1000, description="DDIM steps of the samples.")
    export_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="Precision of the exported adapter. Checkpoints are float32."
    )
    resume: bool | Path = Field(
        True,
        union_mode="left_to_right",
        description="true: resume from the newest checkpoint in output. false: fail if output has checkpoints. A "
        "checkpoint folder such as runs/mine/checkpoint-000400: start from it if output has no checkpoints yet.",
    )
    accept_changes: bool = Field(
        False,
        description="Resume although the data or settings changed in a way that changes the batches (images added, "
        "crop, flip, seed, batch_size). Weights, optimizer and step count are kept.",
    )
