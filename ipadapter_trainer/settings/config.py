"""The settings of a training. Reading and refusing them is in `config_file`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .combinations import CHECKS
from .kinds import TRAIN_KINDS, TrainKind

KindName = Literal["base", "plus", "full", "faceid", "faceid-plus", "faceid-plusv2", "portrait"]
assert get_args(KindName) == tuple(TRAIN_KINDS)


class TrainConfig(BaseModel):
    """One training. The defaults are the recipe of the IP-Adapter paper (arXiv 2308.06721)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    # --- Models
    base_model: Path = Field(
        description="The base model, SD1.5, SD2 or SDXL: a folder in the diffusers layout (unet, vae, text_encoder, "
        "tokenizer, scheduler), a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, or a single .safetensors "
        "checkpoint. The adapter fits every fine-tune of the same family, best the one it was trained on."
    )
    base_config: Path | None = Field(
        None,
        description="For a single-file base_model: a diffusers folder of the same family, for its configs and "
        "tokenizers; default: the ones that diffusers downloads.",
    )
    image_encoder: Path | None = Field(
        None,
        description="Folder or .safetensors file of a CLIPVisionModelWithProjection, or its Hub id such as "
        "h94/IP-Adapter/models/image_encoder; default: image_encoder inside base_model. Users of the adapter need the "
        "same encoder. faceid and portrait need none.",
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None,
        description="What the base model predicts; default: what its scheduler says. Refused when a diffusers folder "
        "says otherwise; a single file often does not say.",
    )
    kind: KindName = Field(
        "base",
        description="Kind of adapter. " + ". ".join(f"{k.name}: {k.summary}" for k in TRAIN_KINDS.values()) + ".",
    )
    num_tokens: int | None = Field(
        None,
        ge=1,
        description="Image tokens; default: as published. Most hosts read the published number only.",
    )
    init_from: Path | None = Field(
        None,
        description="An adapter file to start from instead of a new one; choose a learning rate of 1e-5 to 2e-5 with "
        "it.",
    )

    # --- Data
    data: str = Field(
        description="Images and captions: a folder (image.png with image.txt, or a metadata.jsonl or .csv), a "
        '.jsonl or .csv, a JSON list [{"image_file": ..., "text": ...}], or WebDataset shards, local or by URL: '
        "images-{000..099}.tar or images-*.tar."
    )
    output: Path = Field(description="Folder of the checkpoints, the logs and, at the end, the adapter.")
    data_root: Path | None = Field(
        None, description="Folder that file names in a list are relative to; default: the list's folder."
    )
    face_embeds: Path | None = Field(
        None,
        description="For the faceid kinds: a .safetensors or .npz file with one face embedding an image, by file "
        "name. Rows of a list may name a file each instead (id_embed_file).",
    )
    cache: Path | None = Field(
        None, description="Folder that `ipadapter cache` wrote with these settings: the frozen encoders are not run."
    )
    cache_variants: int = Field(
        1,
        ge=1,
        description="Random crops of each image (and of its reference, with reference_crop) that the cache holds and "
        "grows with; the epochs take turns with them.",
    )
    cache_image_features: Literal["float16", "int8", "none"] = Field(
        "float16",
        description="How the cache holds the patches that plus, full and the faceid-plus kinds read: float16 (658 KB a "
        "image with ViT-H/14), int8 (half of it), or none: the image encoder runs while training. The embedding that "
        "base reads is small, and always float16.",
    )
    resolution: int = Field(
        512,
        ge=8,
        multiple_of=8,
        description="Side of the training images in pixels; use what the base was made for.",
    )
    buckets: bool = Field(
        False,
        description="Keep each image's shape: batches of one aspect ratio, with the area of resolution squared, "
        "instead of squares.",
    )
    bucket_step: int = Field(64, ge=8, multiple_of=8, description="Sides of the buckets are multiples of it.")
    crop: Literal["center", "random"] = Field(
        "center",
        description="Where an image that is too long is cut. An image that is its own reference is cut alike, "
        "another reference never.",
    )
    flip: bool = Field(
        False, description="Mirror half of the images: more variety, but lettering and left/right are lost."
    )
    reference_crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Smallest share of the reference image that is kept by a random crop, so that copying it is no "
        "way out; 1 keeps all.",
    )
    self_reference: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Where a row names a reference: share of the draws that take the image itself instead.",
    )
    text_dropout: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of images without caption; guidance and image-only prompts need it.",
    )
    image_dropout: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of images whose image prompt is dropped: the negative image of guidance.",
    )
    both_dropout: float = Field(0.05, ge=0, le=1, description="Share of images without caption and image prompt.")
    num_workers: int = Field(4, ge=0, description="Processes that decode images; 0 decodes in the training process.")

    # --- Training
    steps: int | None = Field(
        None, ge=1, description="Optimizer steps in all, resumed runs counted in. Or give epochs."
    )
    epochs: float | None = Field(None, gt=0, description="Passes over the data in all. Or give steps.")
    batch_size: int = Field(8, ge=1, description="Images on each device at once; decides the memory.")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Batches per step: a larger effective batch at no memory, in proportionally more time.",
    )
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree"] = Field(
        "adamw",
        description="adamw: PyTorch's, fused. adamw8bit: its states in 8 bit (bitsandbytes). prodigy: finds the "
        "learning rate (prodigyopt; learning_rate=1). schedulefree: AdamW that needs no schedule (schedulefree).",
    )
    learning_rate: float = Field(1e-4, gt=0, description="The optimizer's learning rate; 1 for prodigy.")
    lr_scheduler: Literal["constant", "cosine", "linear", "cosine_with_restarts", "polynomial"] = Field(
        "constant", description="How the learning rate goes on after the warm-up, until the last step."
    )
    lr_warmup_steps: int = Field(0, ge=0, description="Steps in which the learning rate rises from zero.")
    weight_decay: float = Field(0.01, ge=0, description="The optimizer's weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Longer gradients are shortened to this, which tames outliers; 0 turns it off."
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Also average the weights over the steps, with this decay (0.9999 for long runs), and export the "
        "average; 0 turns it off.",
    )
    noise_offset: float = Field(
        0.0, ge=0, description="Noise that shifts a whole channel, for darker and brighter images; SDXL used 0.05."
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="Weigh easy timesteps down (min-SNR, arXiv 2303.09556), usually 5."
    )
    zero_terminal_snr: bool = Field(
        False,
        description="Let the last timestep be pure noise (arXiv 2305.08891), for a v-prediction base that was trained "
        "so.",
    )
    mixed_precision: Literal["no", "bf16", "fp16", "fp8"] = Field(
        "no",
        description="no: all in float32. bf16: the frozen base in bfloat16, half the memory and much faster on a "
        "GPU. fp16: the same in float16, with a loss scale, for GPUs without bfloat16 (before Ampere). fp8: its UNet "
        "stored in 8 bit and computed in bfloat16, a quarter of the memory. The adapter stays in float32.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: far less memory, a third more time."
    )
    compile: bool = Field(False, description="torch.compile the UNet: minutes at the start, then faster steps.")
    seed: int = Field(
        0,
        ge=0,
        description="Decides weights, order, crops, dropout and noise: the same seed gives the same adapter.",
    )

    # --- Output
    save_every: int = Field(1000, ge=1, description="Steps between checkpoints; a crash costs at most these.")
    keep_checkpoints: int = Field(3, ge=1, description="Newest checkpoints to keep; older ones are deleted.")
    log_every: int = Field(
        10, ge=1, description="Steps between lines of log.jsonl; the loss in a line is the mean over them."
    )
    log_with: Literal["tensorboard", "wandb", "trackio", "none"] = Field(
        "tensorboard", description="Where the numbers and images go besides log.jsonl and the report."
    )
    validation_images: int = Field(
        16,
        ge=0,
        description="Images held out for the validation, at most a tenth of the data; 0 turns it off.",
    )
    validate_every: int = Field(
        1000,
        ge=1,
        description="Steps between validations: the loss at fixed noise and timesteps with the right image, no image "
        "and another image, how strong the image attention is beside the text's, and a grid of samples.",
    )
    sample_images: int = Field(4, ge=0, description="Rows of the grid of samples; 0 draws none.")
    sample_prompt: str = Field("", description="A text for one more column of the grid, beside each caption.")
    sample_steps: int = Field(20, ge=1, description="DDIM steps of a sample.")
    export_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="Precision of the exported adapter, float16 as published. Checkpoints are in float32."
    )
    resume: bool | Path = Field(
        True,
        union_mode="left_to_right",
        description="true: resume from the newest checkpoint in output. false: refuse an output that has some. A "
        "checkpoint, such as runs/mine/checkpoint-000400: where an output without checkpoints starts; later "
        "checkpoints stay in their own output.",
    )
    accept_changes: bool = Field(
        False,
        description="Resume although other data or settings change which images the steps see (images added, another "
        "crop, flip, seed or batch_size): weights, optimizer and step count are kept.",
    )

    @property
    def train_kind(self) -> TrainKind:
        """The kind's table entry."""
        return TRAIN_KINDS[self.kind]

    @property
    def from_shards(self) -> bool:
        """Whether the data are WebDataset shards."""
        path = self.data.split("?")[0] if "://" in self.data else self.data  # else it may be a pattern, a-?.tar
        return path.endswith((".tar", ".tar.gz", ".tgz"))

    @property
    def streams(self) -> bool:
        """Whether the data are a stream of unknown length: shards, of which no cache says what is in them."""
        return self.from_shards and self.cache is None

    @model_validator(mode="before")
    @classmethod
    def _expand_home(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = {
            k: str(Path(v).expanduser()) if isinstance(v, str) and v.startswith("~") else v for k, v in values.items()
        }
        if isinstance(values.get("data"), Path):  # a path or a URL, so kept as text
            values["data"] = str(values["data"])
        return values

    @field_validator("resume", mode="before")
    @classmethod
    def _check_resume(cls, value: Any) -> Any:
        if not isinstance(value, (bool, str, Path)):  # pydantic would name the parts of the union
            raise ValueError(f"resume = {value!r}: expected true, false or the folder of a checkpoint")
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> TrainConfig:
        problems = [problem for check in CHECKS if (problem := check(self)) is not None]
        if problems:
            raise ValueError("; ".join(problems))
        return self
