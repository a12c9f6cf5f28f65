"""`ipadapter eval`: CLIP-I and CLIP-T by the protocol of the paper (arXiv 2308.06721, section 4.2).

Each image of the data set is the image prompt of several generated images. CLIP-I is their similarity to the prompt,
CLIP-T their similarity to its caption. The paper uses COCO val2017 (5,000 images), 4 images each, no text, weight 1,
50 DDIM steps, guidance 7.5 and CLIP ViT-L/14.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.face_embeds import face_id_embed
from ..data.images import open_rgb, to_pil_images
from ..errors import EvaluationError
from ..models.generate import generate
from ..models.image_features import encode_images
from ..runtime.disk import whole_file
from ..runtime.folder_lock import lock_folder
from ..runtime.processes import connect
from ..settings.eval_config import EvalConfig
from .clip import clip_i, clip_t
from .grid import image_file, save_grid
from .prompts import COCO_IMAGES, Prompt, is_coco
from .report import Evaluation, differences, gains_of, rows_of
from .scores import Job, Score, append_scores, read_scores, score_file
from .setup import Setup, load_setup

_DIGITS = 6  # of a score


def evaluate(config: EvalConfig, *, say: Callable[[str], None] = print, progress_bar: bool = False) -> Evaluation:
    """Generate and score the images that have no score yet, in the precision of `inference_dtype`, and sum up.

    Scores are appended to `output`/scores.jsonl. An image depends only on its example and its number, so the same call
    resumes, also with another batch size, a higher limit, more images per prompt or other weights. With more
    `sample_images`, images that have a score are generated again to be saved. Several processes (accelerate launch)
    share the work if they share `output`.

    Raises TrainerError and AdapterError for models and data that are wrong or do not fit together.
    """
    state = connect(cuda_or_cpu=True)
    progress_bar = progress_bar and state.is_main_process
    with lock_folder(config.output, say):
        setup = load_setup(config, torch.device(state.device or "cpu"), progress_bar)
        indices = list(setup.prompts.by_index)
        numbers = range(config.num_images_per_prompt)
        jobs = [Job(index, number, weight) for index in indices for number in numbers for weight in config.weights]
        scores, foreign = read_scores(config.output, setup.digest)
        if state.is_main_process:
            say(_plan(setup, jobs, scores.keys(), foreign))
        state.wait_for_everyone()  # all have read the scores before any are added
        mine = set(indices[state.process_index :: state.num_processes])
        _score(setup, [job for job in jobs if job.index in mine], scores.keys(), state.process_index, progress_bar)
        state.wait_for_everyone()
        scores, _ = read_scores(config.output, setup.digest)
        if lacking := sum(job not in scores for job in jobs):
            raise EvaluationError(
                f"{config.output}: {lacking:,} of {len(jobs):,} images have no score although all processes are done. "
                "All processes must write to the same folder; run the same command again for the missing images."
            )
        return _sum_up(setup, [scores[job] for job in jobs], save_grid(setup) if state.is_main_process else None)


def seed_of(seed: int, index: int, number: int) -> int:
    """The 32-bit seed of an image, from the seed of the evaluation, the index of the example and the image number."""
    return random.Random(f"{seed}/{index}/{number}/evaluation").getrandbits(32)


def _plan(setup: Setup, jobs: Sequence[Job], scored: Set[Job], foreign: int) -> str:
    config, prompts = setup.config, len(setup.prompts.by_index)
    weights = f" x {len(config.weights)} weights" if len(config.weights) > 1 else ""
    text = f"{prompts:,} prompts x {config.num_images_per_prompt} images{weights} = {len(jobs):,} images"
    if done := sum(job in scored for job in jobs):
        text += f"; {done:,} have scores already"
    if again := sum(job in scored for job in _left(setup, jobs, scored)):
        text += f", {again:,} of them are generated again for sample_images={config.sample_images}"
    if foreign:
        text += f" ({foreign:,} scores in {config.output} are for other settings)"
    return text + "."


def _left(setup: Setup, jobs: Sequence[Job], scored: Set[Job]) -> list[Job]:
    """The jobs without a score, or without an image that is to be saved."""
    saved = {prompt.index for prompt in setup.saved_prompts}

    def is_done(job: Job) -> bool:
        return job in scored and (job.index not in saved or image_file(setup.image_folder, job).is_file())

    return [job for job in jobs if not is_done(job)]


def _score(setup: Setup, jobs: Sequence[Job], scored: Set[Job], process: int, progress_bar: bool) -> None:
    """Generate, save and score the images of this process that are left."""
    config, left = setup.config, _left(setup, jobs, scored)
    saved = {prompt.index for prompt in setup.saved_prompts}
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(left), desc="images", unit="image", disable=not progress_bar
    ) as bar:
        for start in range(0, len(left), config.batch_size):
            batch = left[start : start + config.batch_size]
            images = dict(zip(batch, _generate(setup, batch), strict=True))
            for job, image in images.items():
                if job.index in saved:
                    with whole_file(image_file(setup.image_folder, job)) as temporary:
                        image.save(temporary)
            new = {job: image for job, image in images.items() if job not in scored}
            if new:
                embeds = setup.clip.embed_images(list(new.values()))
                scores = [_score_of(setup, job, embed) for job, embed in zip(new, embeds, strict=True)]
                append_scores(score_file(config.output, process), setup.digest, scores)
            bar.update(len(batch))


def _generate(setup: Setup, jobs: Sequence[Job]) -> list[Image.Image]:
    config = setup.config
    prompts = [setup.prompts.by_index[job.index] for job in jobs]
    weights = [job.weight for job in jobs]
    pixels = generate(
        setup.base_model,
        setup.adapter,
        prompts=[prompt.example.text if config.text == "caption" else "" for prompt in prompts],
        image_features=_features(setup, prompts) if any(weights) else None,
        weight=weights,
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        seed=[seed_of(config.seed, job.index, job.number) for job in jobs],
        size=setup.size,
    )
    if not pixels.isfinite().all():
        raise EvaluationError(
            f"{config.adapter}: a generated image has NaN or infinite values. The adapter or the base model is "
            f"damaged, or overflows in {setup.base_model.dtype}."
        )
    return to_pil_images(pixels)


def _features(setup: Setup, prompts: Sequence[Prompt]) -> tuple[Tensor, ...]:
    """The image features of each row; a prompt of several rows is encoded once."""
    distinct = list({prompt.index: prompt for prompt in prompts}.values())
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=setup.base_model.device)
    spec, faces = setup.adapter.spec, None
    if spec.face_dim is not None:
        faces = torch.stack([face_id_embed(prompt.example, spec.face_dim) for prompt in distinct])
    images = [open_rgb(prompt.example.prompt_image)[0] for prompt in distinct]
    return tuple(feature[rows] for feature in encode_images(setup.base_model, spec, images, faces))


def _score_of(setup: Setup, job: Job, embed: Tensor) -> Score:
    """The score of a generated image with CLIP embedding [D]."""
    prompt, different = setup.prompts.by_index[job.index], setup.prompts.different[job.index]
    image, text = _clip_scores(embed, prompt)
    other_image, other_text = (None, None) if different is None else _clip_scores(embed, different)
    return Score(
        **asdict(job),
        seed=seed_of(setup.config.seed, job.index, job.number),
        name=prompt.name,
        clip_i=image,
        clip_t=text,
        other_clip_i=other_image,
        other_clip_t=other_text,
    )


def _clip_scores(embed: Tensor, prompt: Prompt) -> tuple[float, float | None]:
    """CLIP-I and CLIP-T with a prompt."""
    image = round(float(clip_i(embed, prompt.image_embed)), _DIGITS)
    return image, None if prompt.text_embed is None else round(float(clip_t(embed, prompt.text_embed)), _DIGITS)


def _sum_up(setup: Setup, scores: Sequence[Score], grid: str | None) -> Evaluation:
    config, base_model, spec, count = setup.config, setup.base_model, setup.adapter.spec, len(setup.prompts.by_index)
    height, width = setup.size
    notes: list[str] = []
    if spec.image_dim is not None and base_model.encoder_fingerprint() == setup.clip.vision_fingerprint():
        notes.append("CLIP-I is biased: the adapter uses the image encoder of this same CLIP. Use another CLIP.")
    coco = is_coco(config.data, setup.examples) and count == COCO_IMAGES
    return Evaluation(
        title=(
            f"{config.adapter} ({spec.kind} for {spec.family_name}) on {base_model.name}\n{count:,} prompts x "
            f"{config.num_images_per_prompt} images of {width}x{height} with "
            f"{'their captions' if config.text == 'caption' else 'no text'}, DDIM {config.num_inference_steps} steps, "
            f"guidance {config.guidance_scale:g}, seed {config.seed}"
        ),
        clip=f"{setup.clip.name} ({config.clip})",
        settings=config.model_dump(mode="json"),
        parameters=sum(parameter.numel() for parameter in setup.adapter.parameters()),
        prompts=count,
        images=count * config.num_images_per_prompt,
        rows=rows_of(setup.prompts, scores, config.weights),
        gains=gains_of(scores, config.weights),
        differs=differences(config, setup.clip, coco, base_model.family),
        notes=notes,
        skipped=setup.prompts.skipped,
        grid=grid,
    )
