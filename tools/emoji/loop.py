"""The loop that trains every part of the stack: seeded, resumable at any checkpoint, with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

# Takes the model and a generator that decides everything random of the batch; returns named losses, "loss" among them.
LossFunction = Callable[[nn.Module, torch.Generator], dict[str, Tensor]]

Model = TypeVar("Model", bound=nn.Module)
WARM_UP = 3  # steps before a CUDA graph is recorded: libraries choose their kernels in them
Step = Callable[[], dict[str, Tensor]]


class Progress(NamedTuple):
    """How many steps, and images in them where they are counted, a part was trained for, all runs together."""

    step: int = 0
    images: int = 0


def fit(
    model: nn.Module,
    losses: LossFunction,
    *,
    checkpoint: Path,
    steps: int,
    minutes: float = float("inf"),
    batch_size: int = 0,
    learning_rate: float,
    weight_decay: float = 0.01,
    warmup: int = 100,
    seed: int = 0,
    save_every_s: float = 120.0,
    bfloat16: bool = True,
) -> nn.Module:
    """Train until ``steps`` in all (earlier runs count) or ``minutes`` of this run; returns the model with EMA weights.

    The learning rate is constant after the warm-up, the weights are averaged, and what is random in a step depends on
    the seed and the step alone. So a later, longer run continues from the checkpoint as if it had never stopped.
    Only parameters that require a gradient are trained, in ``bfloat16`` where the machine has it, unless the losses
    need more; on the GPU when there is one, as a CUDA graph, so ``losses`` must not wait for the GPU. ``batch_size`` is
    that of ``losses``, for the checkpoint's count of images; without it they are not counted.
    """
    device = training_device()
    place: dict[str, Any] = {"device": device, "memory_format": torch.channels_last}  # faster convolutions
    model.to(**place)
    parameters = [p for p in model.parameters() if p.requires_grad]
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=on_gpu, capturable=on_gpu
    )
    ema = _new_ema(parameters)
    begun = done = _resume(checkpoint, model, parameters, optimizer, ema)
    if on_gpu:
        for group in optimizer.param_groups:  # a tensor can change in a CUDA graph
            group.update(lr=torch.zeros((), device=device), fused=True, capturable=True)
    generator = torch.Generator(device)

    def take_step() -> dict[str, Tensor]:
        with mixed_precision(device, bfloat16):
            terms = losses(model, generator)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {name: value.detach() for name, value in terms.items()}

    step = graphed(take_step, generator) if on_gpu else take_step
    start = saved = time.monotonic()
    model.train()
    bar = tqdm(total=steps, initial=done.step, desc=checkpoint.stem, unit="step", dynamic_ncols=True, mininterval=5.0)
    while done.step < steps and time.monotonic() - start < 60 * minutes:
        current = learning_rate * min(1.0, (done.step + 1) / warmup)
        for group in optimizer.param_groups:
            if on_gpu:
                group["lr"].fill_(current)
            else:
                group["lr"] = current
        generator.manual_seed(seed + (done.step << 16))
        torch.manual_seed(seed + (done.step << 16))
        terms = step()
        ema.step(parameters)
        done = Progress(done.step + 1, done.images + batch_size)
        bar.update()
        if done.step % 20 == 0:
            bar.set_postfix({name: f"{value.item():.4f}" for name, value in terms.items()}, refresh=False)
        if time.monotonic() - saved > save_every_s:
            _save(checkpoint, model, parameters, optimizer, ema, done)
            saved = time.monotonic()
    bar.close()
    _save(checkpoint, model, parameters, optimizer, ema, done)
    print(_speed(checkpoint.stem, device, done, begun, time.monotonic() - start), flush=True)
    ema.copy_to(parameters)
    place = {"device": "cpu", "memory_format": torch.contiguous_format}
    return model.to(**place).eval()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it is faster there than float32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


@contextmanager
def mixed_precision(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Autocast to bfloat16 where it is faster. On a CPU, attention is plain matrix products then: they take half the
    time of PyTorch's fused kernel in bfloat16 (2.13).
    """
    with ExitStack() as stack:
        if enabled and multiplies_bfloat16(device):
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                # In bfloat16 as well: without this setting, which is the CPU's too, they would be in float32.
                before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
                stack.callback(torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, before)
                torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def graphed(step: Step, generator: torch.Generator) -> Step:
    """The step as a CUDA graph, recorded after a warm-up: Python asks for a small model's kernels more slowly than a
    GPU computes them. What ``generator`` and PyTorch's own give is as without a graph.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    calls, terms, eager = 0, dict[str, Tensor](), False

    def run() -> dict[str, Tensor]:
        nonlocal calls, terms, eager
        calls += 1
        if calls == WARM_UP + 1:
            try:
                with torch.cuda.graph(graph, stream=stream):
                    terms = step()
            except RuntimeError as error:
                print(f"Going on without a CUDA graph: {error}", flush=True)
                eager = True
        if calls <= WARM_UP or eager:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                terms = step()
            torch.cuda.current_stream().wait_stream(stream)
            return terms
        graph.replay()
        return terms

    return run


def _speed(name: str, device: torch.device, done: Progress, begun: Progress, seconds: float) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    steps, images = done.step - begun.step, done.images - begun.images
    speed = f", {images / seconds:,.0f} images/s" if images else ""
    return f"{name}: {steps:,} steps in {seconds:.0f} s{speed} ({where}); {done.step:,} steps in all"


def start_from(model: nn.Module, checkpoint: Path) -> None:
    """Write a checkpoint of step 0 that holds the model's weights, for ``fit`` to go on from."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    _save(checkpoint, model, parameters, torch.optim.AdamW(parameters), _new_ema(parameters), Progress())


def training_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_training_device(model: Model) -> Model:
    """The model, moved there."""
    nn.Module.to(model, training_device())
    return model


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def load_ema(model: nn.Module, checkpoint: Path) -> nn.Module:
    """Put the averaged weights of a checkpoint into ``model`` (whose trained parameters must be the same)."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} does not exist: train this part first")
    state = _load(checkpoint)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.load_state_dict(state["buffers"], strict=False)
    for parameter, value in zip(parameters, state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(value)
    return model.eval()


def progress(checkpoint: Path) -> Progress:
    """What a checkpoint has seen."""
    return _progress(_load(checkpoint))


def _load(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=True, map_location="cpu")


def _progress(state: dict[str, Any]) -> Progress:
    return Progress(state["step"], state["images"])


def _new_ema(parameters: list[nn.Parameter]) -> EMAModel:
    return EMAModel(parameters, decay=0.9995, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True)


def _save(
    file: Path,
    model: nn.Module,
    parameters: list[nn.Parameter],
    optimizer: Any,
    ema: EMAModel,
    done: Progress,
) -> None:
    state = {
        "buffers": dict(model.named_buffers()),
        "parameters": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        **done._asdict(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)  # a kill leaves the last good checkpoint


def _resume(file: Path, model: nn.Module, parameters: list[nn.Parameter], optimizer: Any, ema: EMAModel) -> Progress:
    if not file.is_file():
        return Progress()
    state = _load(file)
    model.load_state_dict(state["buffers"], strict=False)
    for parameter, value in zip(parameters, state["parameters"], strict=True):
        parameter.data.copy_(value)
    if state["step"] > 0:  # else there is nothing in it, and the settings are those of this run
        optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    ema.to(parameters[0].device)
    return _progress(state)
