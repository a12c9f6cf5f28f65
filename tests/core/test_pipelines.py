"""Whole diffusers pipelines: whatever they do to their batch, each row gets its own image prompt, as with diffusers'
own IP-Adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import ipadapter_core as ic

Embeds = Sequence[Tensor]


CONTEXT, IMAGE = 24, 20  # of the UNets and adapters of conftest


def noise(count: int, seed: int = 7, channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def image_embeds(count: int, seed: int = 5) -> Tensor:
    """Image embeddings [count, E], all different."""
    return torch.randn(count, IMAGE, generator=torch.Generator().manual_seed(seed))


def texts(count: int, seed: int = 4) -> Tensor:
    return torch.randn(count, 7, CONTEXT, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4).eval()


@pytest.fixture
def parts(unets: dict[str, Any], vae: Any) -> dict[str, Any]:
    """The parts of a pipeline. Texts are passed as embeddings, so there is no text encoder."""
    from diffusers import DDIMScheduler

    unet = deepcopy(unets["sd15"])
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return {"vae": vae, "unet": unet, "scheduler": scheduler, "requires_safety_checker": False, **nothing}


def call(pipeline: Any, prompts: int, images_per_prompt: int = 1, **arguments: Any) -> Tensor:
    """Latents [prompts * images_per_prompt, C, h, w] after two steps."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "prompt_embeds": texts(prompts),
        "negative_prompt_embeds": texts(1, seed=14).expand(prompts, -1, -1),
        "num_images_per_prompt": images_per_prompt,
        "latents": noise(prompts * images_per_prompt),
        "num_inference_steps": 2,
        "output_type": "latent",
        **arguments,
    }
    return pipeline(**{name: value for name, value in arguments.items() if value is not None})[0]


def ours(
    pipeline: Any, adapter: ic.IPAdapter, embeds: Tensor, positive: Sequence[int], *shape: int, **arguments: Any
) -> Tensor:
    """With `inject`; `positive`: the image prompt of all generated images, or of each, from 1 on."""
    tokens = torch.cat([adapter.negative_tokens(), adapter.encode(embeds)])
    with ic.inject(pipeline.unet, ic.AdapterApplication(adapter.keys_values(tokens), weight=0.8)):
        return call(pipeline, *shape, ip_adapter_image_embeds=ic.pipeline_rows(positive), **arguments)


def theirs(
    pipeline: Any,
    adapter: ic.IPAdapter,
    embeds: Tensor,
    positive: Sequence[int],
    prompts: int,
    images_per_prompt: int = 1,
    guidance: bool = True,
    **arguments: Any,
) -> Tensor:
    """With diffusers' own IP-Adapter. It takes one image prompt per call, so each of several has its own call."""
    state = {"image_proj": dict(adapter.projector.state_dict()), "ip_adapter": dict(adapter.layers.state_dict())}
    pipeline.unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    for processor in pipeline.unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.8]

    def embedding(number: int) -> list[Tensor]:
        chosen = embeds[number - 1].reshape(1, 1, -1)
        return [torch.cat([torch.zeros_like(chosen), chosen]) if guidance else chosen]

    if len(positive) == 1:
        out = call(pipeline, prompts, images_per_prompt, ip_adapter_image_embeds=embedding(positive[0]), **arguments)
    else:
        images = prompts * images_per_prompt
        arguments = {"prompt_embeds": texts(prompts), "latents": noise(images), **arguments}
        outs: list[Tensor] = []
        for image, number in enumerate(positive):
            one = dict(arguments)
            for name, value in arguments.items():
                if isinstance(value, (Tensor, list)):  # of each prompt, or of each image
                    place = image * len(value) // images
                    one[name] = value[place : place + 1]
            outs.append(call(pipeline, 1, ip_adapter_image_embeds=embedding(number), **one))
        out = torch.cat(outs)
    pipeline.unload_ip_adapter()
    return out


def again(unet: Any, **changes: Any) -> Any:
    """A UNet of the same shape, but for some changes."""
    torch.manual_seed(0)
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return type(unet)(**{**config, **changes}).eval().requires_grad_(False)


def assert_close(mine: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(mine, reference, atol=1e-5 * float(reference.abs().max()), rtol=0)


def assert_equal_and_not_blind(mine: Tensor, reference: Tensor, *others: Tensor) -> None:
    """Equal to 1e-5 of their scale (unguided latents of a random UNet reach 20), and unlike `others` in every image."""
    assert_close(mine, reference)
    for other in others:
        assert (mine - other).abs().amax(dim=(1, 2, 3)).min() > 1e-3  # in every image


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize(
    ("positive", "prompts", "images_per_prompt"),
    [((1,), 1, 1), ((1,), 2, 1), ((2, 1), 2, 1), ((1,), 1, 2), ((2, 1), 1, 2), ((1,), 2, 2), ((1, 2, 2, 1), 2, 2)],
)
def test_text_to_image(
    parts: Any,
    new_adapter: Any,
    guidance_scale: float,
    positive: tuple[int, ...],
    prompts: int,
    images_per_prompt: int,
) -> None:
    """1 or 2 prompts, 1 or 2 images per prompt, one image prompt for all or one each, with and without guidance."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(**parts)
    adapter, embeds, shape = new_adapter(pipeline.unet), image_embeds(2), (prompts, images_per_prompt)
    arguments = {"guidance_scale": guidance_scale}
    mine = ours(pipeline, adapter, embeds, positive, *shape, **arguments)
    reference = theirs(pipeline, adapter, embeds, positive, *shape, guidance=guidance_scale > 1, **arguments)
    other = ours(pipeline, adapter, embeds, [3 - number for number in positive], *shape, **arguments)
    assert_equal_and_not_blind(mine, reference, call(pipeline, *shape, **arguments), other)


def test_guidance_rescale(parts: Any, new_adapter: Any) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(**parts)
    adapter, embeds = new_adapter(pipeline.unet), image_embeds(2)
    arguments = {"guidance_scale": 5.0, "guidance_rescale": 0.7}
    mine = ours(pipeline, adapter, embeds, (1, 2), 2, **arguments)
    assert_equal_and_not_blind(
        mine,
        theirs(pipeline, adapter, embeds, (1, 2), 2, **arguments),
        ours(pipeline, adapter, embeds, (1, 2), 2, guidance_scale=5.0),
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("positive", [(1,), (2, 1)])
def test_perturbed_attention_guidance(
    parts: Any, new_adapter: Any, guidance_scale: float, positive: tuple[int, ...]
) -> None:
    """[negative, positive, perturbed]; without guidance [positive, perturbed]: two rows for one generated image."""
    from diffusers import StableDiffusionPAGPipeline

    pipeline = StableDiffusionPAGPipeline(**parts, pag_applied_layers=["down_blocks.0", "up_blocks.3"])
    adapter, embeds, count = new_adapter(pipeline.unet), image_embeds(2), len(positive)
    arguments = {"guidance_scale": guidance_scale, "pag_scale": 3.0}
    mine = ours(pipeline, adapter, embeds, positive, count, **arguments)
    reference = theirs(pipeline, adapter, embeds, positive, count, guidance=guidance_scale > 1, **arguments)
    no_pag = ours(pipeline, adapter, embeds, positive, count, **{**arguments, "pag_scale": 0.0})
    assert_equal_and_not_blind(mine, reference, no_pag)


@pytest.mark.parametrize("positive", [(1,), (2, 1)])
def test_latent_consistency(parts: Any, new_adapter: Any, positive: tuple[int, ...]) -> None:
    """Guidance is an input of the UNet, so that its batch has no negative rows whatever `guidance_scale` is."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    unet = again(parts["unet"], time_cond_proj_dim=16)
    names = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "requires_safety_checker")
    pipeline = LatentConsistencyModelPipeline(
        unet=unet, scheduler=LCMScheduler(clip_sample=False), **{name: parts[name] for name in names}
    )
    adapter, embeds, count = new_adapter(unet), image_embeds(2), len(positive)

    def arguments() -> dict[str, Any]:
        generator = [torch.Generator().manual_seed(i) for i in range(count)]
        return {"guidance_scale": 8.0, "negative_prompt_embeds": None, "generator": generator}

    mine = ours(pipeline, adapter, embeds, positive, count, **arguments())
    reference = theirs(pipeline, adapter, embeds, positive, count, guidance=False, **arguments())
    assert_equal_and_not_blind(mine, reference, call(pipeline, count, **arguments()))


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_image_to_image_and_inpainting(parts: Any, new_adapter: Any, task: str) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    pipeline = (StableDiffusionImg2ImgPipeline if task == "img2img" else StableDiffusionInpaintPipeline)(**parts)
    adapter, embeds = new_adapter(pipeline.unet), image_embeds(2)

    def arguments() -> dict[str, Any]:
        given = {"image": noise(2, seed=9, channels=3, size=16).clamp(-1, 1), "strength": 0.8, "guidance_scale": 4.0}
        given |= {"latents": None, "generator": [torch.Generator().manual_seed(i) for i in range(2)]}
        mask = torch.zeros(2, 1, 16, 16)
        mask[:, :, 4:] = 1
        return given if task == "img2img" else given | {"mask_image": mask, "height": 16, "width": 16}

    mine = ours(pipeline, adapter, embeds, (2, 1), 2, **arguments())
    reference = theirs(pipeline, adapter, embeds, (2, 1), 2, **arguments())
    assert_equal_and_not_blind(mine, reference, call(pipeline, 2, **arguments()))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_video_frames(parts: Any, new_adapter: Any, guidance_scale: float) -> None:
    """AnimateDiff makes each frame a row of the attention: two frames without guidance are not [negative, positive]."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    torch.manual_seed(0)
    motion = MotionAdapter(
        block_out_channels=(8, 16, 24, 24),
        motion_layers_per_block=2,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    names = ("vae", "text_encoder", "tokenizer", "feature_extractor")
    pipeline = AnimateDiffPipeline(
        unet=parts["unet"], motion_adapter=motion, scheduler=parts["scheduler"], **{n: parts[n] for n in names}
    )
    adapter, embeds = new_adapter(pipeline.unet), image_embeds(1)
    arguments = {
        "guidance_scale": guidance_scale,
        "num_frames": 2,
        "num_images_per_prompt": None,
        "latents": noise(4).reshape(1, 4, 4, 8, 8)[:, :, :2],
    }
    mine = ours(pipeline, adapter, embeds, (1,), 1, **arguments)
    reference = theirs(pipeline, adapter, embeds, (1,), 1, guidance=guidance_scale > 1, **arguments)
    assert_close(mine, reference)
    assert (mine - call(pipeline, 1, **arguments)).abs().max() > 1e-3


def test_over_diffusers_own_adapter(parts: Any, new_adapter: Any) -> None:
    """Both in one call: the embeddings go to theirs, the rows to ours."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(**parts)
    one, two, embeds = new_adapter(pipeline.unet), new_adapter(pipeline.unet, seed=8), image_embeds(1)
    applications = [
        ic.AdapterApplication(adapter.keys_values(torch.cat([adapter.negative_tokens(), adapter.encode(embeds)])))
        for adapter in (one, two)
    ]
    with ic.inject(pipeline.unet, applications):
        together = call(pipeline, 1, ip_adapter_image_embeds=ic.pipeline_rows())
    with ic.inject(pipeline.unet, applications[0]), ic.inject(pipeline.unet, applications[1]):
        nested = call(pipeline, 1, ip_adapter_image_embeds=ic.pipeline_rows())
    assert torch.equal(nested, together)
    state = {"image_proj": dict(one.projector.state_dict()), "ip_adapter": dict(one.layers.state_dict())}
    pipeline.unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    given = torch.cat([torch.zeros(1, 1, IMAGE), embeds[:, None]])
    with ic.inject(pipeline.unet, applications[1]):
        mixed = call(pipeline, 1, ip_adapter_image_embeds=[given, *ic.pipeline_rows()])
    assert_close(mixed, together)


def test_what_no_one_tells_is_refused(parts: Any, new_adapter: Any) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(**parts)
    adapter, embeds = new_adapter(pipeline.unet), image_embeds(2)
    tokens = torch.cat([adapter.negative_tokens(), adapter.encode(embeds[:1])])
    application = ic.AdapterApplication(adapter.keys_values(tokens), name="cat.safetensors")

    def switch_guidance_off(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": values["prompt_embeds"].chunk(2)[-1]}

    switch: dict[str, Any] = {
        "callback_on_step_end": switch_guidance_off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }

    with ic.inject(pipeline.unet, application):
        for count in (1, 2):  # one generated image with guidance and two without have the same batch
            for guidance_scale in (1.0, 5.0):
                with pytest.raises(ic.AdapterError, match=r"cat.safetensors: 2 rows of image keys, and nothing tells"):
                    call(pipeline, count, guidance_scale=guidance_scale)
        for positive, count in ((1, 1), 1), ((1, 1), 4), ((1, 1, 1), 2):
            with pytest.raises(ic.AdapterError, match=rf"has {len(positive)} rows, the pipeline makes {count} images"):
                call(pipeline, count, ip_adapter_image_embeds=ic.pipeline_rows(positive))
        with pytest.raises(ic.AdapterError, match=r"the rows are \[0, 2\]; expected 2 numbers below 2"):
            call(pipeline, 1, ip_adapter_image_embeds=ic.pipeline_rows([2]))
        for positive in ((1,), (1, 1)):
            rows, count = ic.pipeline_rows(positive), len(positive)
            with pytest.raises(
                ic.AdapterError, match=rf"{2 * count} rows, its batch has {count}.*Leave guidance on or off"
            ):
                call(pipeline, count, ip_adapter_image_embeds=rows, **switch)
        with pytest.raises(ic.AdapterError, match=r"holds 2 pipeline_rows"):
            call(pipeline, 1, ip_adapter_image_embeds=[*ic.pipeline_rows(), *ic.pipeline_rows()])
    assert not pipeline.unet._forward_pre_hooks
    for wrong in ([], [-1], [1.5], ["1"], None, 1):
        with pytest.raises(ic.AdapterError, match=r"expected rows of key_values"):
            ic.pipeline_rows(wrong)


@pytest.mark.parametrize("positive", [(1,), (2, 1)])
def test_stable_diffusion_xl(unets: dict[str, Any], new_adapter: Any, vae: Any, positive: tuple[int, ...]) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    more = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 34,
        "transformer_layers_per_block": (1, 1, 2),
    }
    unet = again(unets["sdxl"], **more)
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False, **nothing
    )
    adapter, embeds, count = new_adapter(unet), image_embeds(2), len(positive)
    pooled = torch.randn(count, 10, generator=torch.Generator().manual_seed(3))
    arguments = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled, "guidance_scale": 4.0}
    mine = ours(pipeline, adapter, embeds, positive, count, **arguments)
    reference = theirs(pipeline, adapter, embeds, positive, count, **arguments)
    assert_equal_and_not_blind(mine, reference, call(pipeline, count, **arguments))
