"""`ipadapter eval`: the protocol of the paper (arXiv 2308.06721, section 4.2) for any adapter, data set and CLIP.

For each image of the data set, several are generated with it as the image prompt. CLIP-I says how alike they are,
CLIP-T how well they fit the prompt's caption. In the paper: COCO val2017 (5,000 images), 4 each, no text, weight 1,
DDIM with 50 steps, guidance 7.5, CLIP ViT-L/14.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ipadapter_core import IPAdapter, check_compatible, export_state

from ..data.examples import Example, fingerprint
from ..data.face_embeds import face_id_embed, with_faces
from ..data.images import open_rgb, to_pil_images
from ..errors import EvaluationError
from ..files.opening import adapter_to_use
from ..models.base_model import BaseModel, load_base_model
from ..models.generate import check_numbers, generate, initial_latents
from ..models.image_features import encode_images
from ..runtime.folder_lock import lock_folder
from ..runtime.processes import inference_dtype
from .clip import ClipModel, clip_i, clip_t, load_clip
from .data import COCO_IMAGES, Prompt, Prompts, is_coco, open_prompts, read_examples
from .generate_images import parse_size
from .report import Evaluation, differences, gains_of, rows_of
from .saved_images import SavedImages
from .scores import Job, Score, ScoreFile
from .settings import EvalSettings

_DIGITS = 6  # of a score
_PATIENCE = timedelta(days=7)  # processes wait for each other at the end only, and some are slower


@dataclass(frozen=True, eq=False)
class _Parts:
    """All that takes part, loaded and fitting."""

    settings: EvalSettings
    base_model: BaseModel
    adapter: IPAdapter
    clip: ClipModel
    examples: Sequence[Example]
    size: tuple[int, int]


def evaluate(settings: EvalSettings, *, say: Callable[[str], None] = print, progress_bar: bool = False) -> Evaluation:
    """Generate what is not generated yet, measure it, and sum up, in the precision of `inference_dtype`.

    Every score is appended to `output`/scores.jsonl, and an image depends on its example and its number alone: the
    same call goes on where another was stopped, also with another batch size, a higher limit, more images for each
    caption or other weights. Several processes (accelerate launch) share the work if they share `output`.

    Raises TrainerError and AdapterError for parts that are wrong or do not fit.
    """
    state = processes()
    with lock_folder(settings.output, say):
        return _evaluate(settings, state, say, progress_bar)


def _evaluate(
    settings: EvalSettings, state: PartialState, say: Callable[[str], None], progress_bar: bool
) -> Evaluation:
    parts = _load(settings, state.device)
    prompts = open_prompts(
        parts.examples,
        parts.clip,
        limit=settings.limit,
        seed=settings.seed,
        caption_prefix=settings.caption_prefix,
        face_dim=parts.adapter.spec.face_dim,
        progress_bar=progress_bar and state.is_main_process,
    )
    digest = _digest(parts)
    file = ScoreFile(settings.output, digest, state.process_index)
    kept = SavedImages(settings.output, digest, list(prompts.chosen.values())[: settings.images])
    done = file.read()
    jobs = [
        Job(index, number, weight)
        for index in prompts.chosen
        for number in range(settings.images_per_caption)
        for weight in settings.all_weights
    ]
    if state.is_main_process:
        say(_plan(settings, len(prompts.chosen), len(jobs), sum(job in done for job in jobs), file.foreign))
    state.wait_for_everyone()
    own = set(list(prompts.chosen)[state.process_index :: state.num_processes])
    mine = [job for job in jobs if job.index in own]
    missing = [job for job in mine if job not in done]
    with tqdm(
        total=len(mine),
        initial=len(mine) - len(missing),
        desc="images",
        unit="image",
        disable=not (progress_bar and state.is_main_process),
    ) as bar:
        for batch in _batches(missing, settings.batch_size):
            file.append(_measure(parts, prompts, batch, kept))
            bar.update(len(batch))
    state.wait_for_everyone()
    scores = file.read()
    lacking = sum(job not in scores for job in jobs)
    if lacking:
        raise EvaluationError(
            f"{settings.output}: {lacking:,} of {len(jobs):,} images are not measured although all processes are "
            "done. All of them must write into one folder; run the same command again for what is missing."
        )
    grid = kept.grid(settings.all_weights, settings.images_per_caption) if state.is_main_process else None
    return _sum_up(parts, prompts, [scores[job] for job in jobs], grid)


def processes() -> PartialState:
    """This process among those that share the work; on the CPU unless there is a CUDA device."""
    # Accelerator reads this variable of Accelerate's launcher, PartialState does not.
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=on_cpu, timeout=_PATIENCE)


def seed_of(seed: int, index: int, number: int) -> int:
    """The seed of an image, 32 bits: of nothing but the evaluation's seed, the example and the image's number."""
    return random.Random(f"{seed}/{index}/{number}/evaluation").getrandbits(32)


def _load(settings: EvalSettings, device: torch.device) -> _Parts:
    size = None if settings.size is None else parse_size(settings.size)
    check_numbers(settings.weights, settings.guidance, settings.steps)
    examples = read_examples(settings.data, settings.root, require_caption=settings.text == "caption")
    adapter = adapter_to_use(settings.adapter, settings.shortcut)
    spec = adapter.spec
    if spec.face_dim is not None:
        examples = with_faces(examples, settings.face_embeds, settings.image_folder, spec.face_dim)
    elif settings.face_embeds is not None:
        raise EvaluationError(f"A {spec.kind} adapter takes no face embeddings; leave --face-embeds out.")
    base_model = load_base_model(
        settings.base_model,
        inference_dtype(device),
        device,
        settings.image_encoder,
        base_config=settings.base_config,
        prediction_type=settings.prediction_type,
        needs_image_encoder=spec.image_dim is not None,
    )
    check_compatible(spec, base_model.sites, settings.adapter.name)
    side = base_model.sample_size
    size = size or (side, side)
    initial_latents(base_model, 1, 0, size)  # refuses a size that is no whole number of latents
    clip = load_clip(settings.clip, device)
    # Fails now, not after all prompts have been read, when the image encoder is another one.
    faces = None if spec.face_dim is None else torch.zeros(1, spec.face_dim)
    features = encode_images(base_model, spec, [Image.new("RGB", (64, 64))], faces)
    adapter.to(device)
    adapter.encode(*(feature.to(device, torch.float32) for feature in features))
    return _Parts(settings, base_model, adapter, clip, examples, size)


def _digest(parts: _Parts) -> str:
    """16 hex digits of all that a score depends on besides its job."""
    settings, base_model, spec = parts.settings, parts.base_model, parts.adapter.spec
    weights = hashlib.sha256()
    for key, tensor in sorted(export_state(parts.adapter).items()):
        weights.update(key.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    of = {
        "adapter": [weights.hexdigest(), spec.kind, getattr(parts.adapter.projector, "shortcut", None)],
        "base_model": [base_model.fingerprint(), base_model.vae_fingerprint(), base_model.text_fingerprint()],
        "image_encoder": None if spec.image_dim is None else base_model.encoder_fingerprint(),
        "dtype": str(base_model.dtype),
        "clip": [parts.clip.fingerprint(), settings.caption_prefix],
        "data": fingerprint(parts.examples, settings.image_folder),
        "generation": [settings.text, settings.steps, settings.guidance, settings.seed, *parts.size],
    }
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def _plan(settings: EvalSettings, prompts: int, jobs: int, done: int, foreign: int) -> str:
    weights = len(settings.all_weights)
    text = f"{prompts:,} prompts x {settings.images_per_caption} images"
    text += f" x {weights} weights = {jobs:,} images" if weights > 1 else f" = {jobs:,} images"
    if done:
        text += f"; {done:,} are measured already"
    if foreign:
        text += f" ({foreign:,} other scores in {settings.output} are of other settings)"
    return text + "."


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    for start in range(0, len(jobs), size):
        yield list(jobs[start : start + size])


def _measure(parts: _Parts, prompts: Prompts, jobs: Sequence[Job], kept: SavedImages) -> list[Score]:
    """Generate a batch and measure it."""
    settings = parts.settings
    own = [prompts.chosen[job.index] for job in jobs]
    seeds = [seed_of(settings.seed, job.index, job.number) for job in jobs]
    weights = [job.weight for job in jobs]
    pixels = generate(
        parts.base_model,
        parts.adapter,
        prompts=[prompt.text if settings.text == "caption" else "" for prompt in own],
        image_features=_features(parts, own) if any(weights) else None,
        weight=weights,
        steps=settings.steps,
        guidance=settings.guidance,
        seed=seeds,
        size=parts.size,
    )
    if not pixels.isfinite().all():
        raise EvaluationError(
            f"{settings.adapter}: a generated image has values that are not finite. The adapter or the base model "
            "is broken, or overflows in this precision."
        )
    images = to_pil_images(pixels)
    for job, image in zip(jobs, images, strict=True):
        if kept.keeps(job):
            kept.save(job, image)
    embeds = parts.clip.embed_images(images)
    return [_score(prompts, *row) for row in zip(jobs, seeds, embeds, strict=True)]


def _features(parts: _Parts, prompts: Sequence[Prompt]) -> tuple[Tensor, ...]:
    """Of each row; a prompt that several rows share is encoded once."""
    distinct = list({prompt.index: prompt for prompt in prompts}.values())
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=parts.base_model.device)
    width, faces = parts.adapter.spec.face_dim, None
    if width is not None:
        faces = torch.stack([face_id_embed(prompt.example, width) for prompt in distinct])
    images = [open_rgb(prompt.image)[0] for prompt in distinct]
    features = encode_images(parts.base_model, parts.adapter.spec, images, faces)
    return tuple(feature[rows] for feature in features)


def _score(prompts: Prompts, job: Job, seed: int, embed: Tensor) -> Score:
    def beside(prompt: Prompt | None) -> tuple[float | None, float | None]:
        if prompt is None:
            return None, None
        image = round(float(clip_i(embed, prompt.image_embed)), _DIGITS)
        return image, None if prompt.text_embed is None else round(float(clip_t(embed, prompt.text_embed)), _DIGITS)

    prompt = prompts.chosen[job.index]
    own, other = beside(prompt), beside(prompts.others[job.index])
    return Score(*job, seed, prompt.name, *own, *other)


def _sum_up(parts: _Parts, prompts: Prompts, scores: Sequence[Score], grid: Path | None) -> Evaluation:
    settings, base_model, spec = parts.settings, parts.base_model, parts.adapter.spec
    weights, count = settings.all_weights, len(prompts.chosen)
    text = "their captions" if settings.text == "caption" else "no text"
    notes: list[str] = []
    if spec.image_dim is not None and base_model.encoder_fingerprint() == parts.clip.vision_fingerprint():
        notes.append(
            "The adapter reads its prompts with this same CLIP, so CLIP-I flatters it; another CLIP judges better."
        )
    return Evaluation(
        title=(
            f"{settings.adapter} ({spec.kind} for {spec.family_name}) on {base_model.name}\n{count:,} prompts x "
            f"{settings.images_per_caption} images of {parts.size[1]}x{parts.size[0]} with {text}, DDIM "
            f"{settings.steps} steps, guidance {settings.guidance:g}, seed {settings.seed}"
        ),
        clip=f"{parts.clip.name} ({settings.clip})",
        settings={key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()},
        parameters=sum(parameter.numel() for parameter in parts.adapter.parameters()),
        prompts=count,
        images=count * settings.images_per_caption,
        rows=rows_of(prompts, scores, weights),
        gains=gains_of(scores, weights),
        differs=differences(
            settings, parts.clip, is_coco(settings.data, parts.examples) and count == COCO_IMAGES, base_model.family
        ),
        notes=notes,
        skipped=prompts.broken,
        grid=None if grid is None else str(grid),
    )
