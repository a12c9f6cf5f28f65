"""Models that are downloaded: `ipadapter models`, Hub ids, and what a user sees without network or access."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import save_file

from ipadapter_trainer.errors import BaseModelError
from ipadapter_trainer.models.base_model import load_base_model
from ipadapter_trainer.models.hub import is_hub_id, refuse_missing
from ipadapter_trainer.models.published_models import PUBLISHED_MODELS, model_at, models_of
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import load_config
from ipadapter_trainer.settings.shipped import config_folder, config_names

from .hub_server import HubServer, serve_hub
from .warm_python import WarmPython, process_environment


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., list[Result]]
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
ENCODER = "h94/IP-Adapter/models/image_encoder"
SMALL = ("resolution=64", "steps=1", "batch_size=2", "num_workers=0", "log_with=none", "output=run")
ADVICE = "Run `ipadapter models stable-diffusion-v1-5 clip-vit-h --download` (6.8 GB)."


@pytest.fixture
def hub(small_folder: Path, clip_folder: Path, tmp_path: Path, warm_python: WarmPython) -> Iterator[HubServer]:
    """Tiny models under the published names, among files that nobody needs."""
    base = shutil.copytree(small_folder, tmp_path / "hub" / "base")
    shutil.rmtree(base / "image_encoder")
    (base / "feature_extractor").mkdir()
    (base / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    (base / "safety_checker").mkdir()
    for useless in ("v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors"):
        (base / useless).write_bytes(b"useless")
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"useless")
    index = '{"unet": ["diffusers", "x"], "vae": ["diffusers", "x"], "text_encoder": ["transformers", "x"], '
    (base / "model_index.json").write_text(index + '"tokenizer": ["transformers", "x"], "image_encoder": [null, null]}')
    tokens = json.loads((base / "tokenizer" / "tokenizer.json").read_text())["model"]
    (base / "tokenizer" / "vocab.json").write_text(json.dumps(tokens["vocab"]))
    (base / "tokenizer" / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tokens["merges"]))
    (base / "tokenizer" / "special_tokens_map.json").write_text("{}")
    adapter = tmp_path / "hub" / "adapter"
    shutil.copytree(small_folder / "image_encoder", adapter / "models" / "image_encoder")
    (adapter / "models" / "image_encoder" / "pytorch_model.bin").write_bytes(b"useless")
    save_file({}, adapter / "models" / "ip-adapter_sd15.safetensors")
    refused = {"some/gated": (403, "GatedRepo")}
    repositories = {SD15: base, "h94/IP-Adapter": adapter, "openai/clip-vit-large-patch14": clip_folder}
    with serve_hub(warm_python.environment["HF_ENDPOINT"], repositories, refused) as server:
        yield server


COMMANDS = """
import json, sys
from ipadapter_trainer.cli import app
from typer.testing import CliRunner
results = [CliRunner().invoke(app, command) for command in json.loads(sys.argv[1])]
print(json.dumps([(result.exit_code, result.stdout, result.stderr) for result in results]))
"""


@pytest.fixture
def run(hub: HubServer, tmp_path: Path, warm_python: WarmPython, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Commands in an empty folder, with that Hub and an empty cache, in a process that is told so when it starts."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.rmtree(warm_python.environment["HF_HOME"], ignore_errors=True)

    def commands(*lines: list[str | Path] | str, offline: bool = False) -> list[Result]:
        words = json.dumps([line.split() if isinstance(line, str) else list(map(str, line)) for line in lines])
        if offline:  # this, too, is read when a process imports the libraries
            environment = {**process_environment(), **warm_python.environment, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                [sys.executable, "-c", COMMANDS, words], env=environment, capture_output=True, text=True, check=False
            )
            status, out, err = done.returncode, done.stdout, done.stderr
        else:
            process = warm_python.start(COMMANDS, [words])
            out, err = process.communicate()
            status = process.returncode
        assert status == 0, err
        return [Result(*result) for result in json.loads(out.splitlines()[-1])]

    return commands


def test_models_downloads_what_the_config_names_and_no_more(run: Run, hub: HubServer, images: Path) -> None:
    train = ["train", "sd15-base", f"data={images}", "mixed_precision=no", "validation_images=0", *SMALL]
    download = "models sd15-base --download"
    before, done, trained, listed, again = run(train, download, train, "models sd15-base", download)
    assert before == (
        2,
        "",
        "ipadapter: models/stable-diffusion-v1-5: no such folder; models/IP-Adapter/models/image_encoder: no such "
        f"folder. {ADVICE}\n",
    )
    assert done.code == 0, done.err
    assert "models/IP-Adapter/models/image_encoder: found" in done.out
    assert trained.code == 0, trained.err
    assert listed.out.count(" found ") == 2
    assert (again.code, again.out.count("downloading")) == (0, 0)
    assert hub.downloaded == {file for model in models_of(["sd15-base"]) for file in model.files}


def test_hub_ids_train_and_then_need_no_network(run: Run, hub: HubServer, images: Path) -> None:
    models = [f"base_model={SD15}", f"image_encoder={ENCODER}", f"data={images}", *SMALL]
    dry, trained = run(["train", *models, "--dry-run"], ["train", *models])
    assert dry.code == 0, dry.err
    assert f"Downloading {SD15} from the Hugging Face Hub into its cache." in dry.err
    assert {file for file in hub.downloaded if not file.endswith((".json", ".txt"))} == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "models/image_encoder/model.safetensors",
    }
    assert (trained.code, SD15 in trained.out) == (0, True), trained.err
    named = [f"base_model={SD15}", f"image_encoder={ENCODER}", "adapter=run", "num_inference_steps=1"]
    reads = len(hub.requests)
    for result in run(
        ["cache", *models, "cache=cached"],
        ["generate", *named, f"image={images / 'red.png'}", "output=o.png"],
        offline=True,
    ):
        assert result.code == 0, result.err
    assert len(hub.requests) == reads
    few = ["limit=2", "num_images_per_prompt=1"]
    (measured,) = run(["eval", *named, f"data={images}", "clip=openai/clip-vit-large-patch14", *few])
    assert measured.code == 0, measured.err


NOWHERE = {
    "some/gated": "some/gated: no such folder, and some/gated is gated. Accept its terms at ",
    "some/absent": "some/absent: no such folder, and the Hugging Face Hub has no some/absent. If it is private, ",
    "h94/IP-Adapter/x": "h94/IP-Adapter/x: h94/IP-Adapter on the Hugging Face Hub has no folder 'x' with weights.",
    "nowhere": "nowhere: no such folder. Set base_model to a folder in the diffusers layout, a .safetensors ",
    "models/x": "models/x: no such folder. Set base_model to a folder",
}


def test_a_model_that_is_nowhere_is_a_sentence(run: Run) -> None:
    results = run(*(["train", f"base_model={base}", "data=x", *SMALL] for base in NOWHERE))
    for result, message in zip(results, NOWHERE.values(), strict=True):
        assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)
        assert result.err.startswith(f"ipadapter: {message}")


def test_without_network_there_is_a_sentence(run: Run, hub: HubServer) -> None:
    lines = (["train", f"base_model={SD15}", "data=x", *SMALL], "models clip-vit-h --download")
    starts = (f"{SD15}: no such folder, and", "models/IP-Adapter/models/image_encoder: not downloaded;")
    hub.stop()
    for result, start in zip(run(*lines), starts, strict=True):
        assert (result.code, len(result.err.splitlines())) == (2, 1)
        assert result.err.startswith(f"ipadapter: {start} the Hugging Face Hub cannot be reached (")


def test_a_repository_without_a_file_is_named(run: Run, hub: HubServer) -> None:
    folder = hub.repositories["h94/IP-Adapter"] / "models" / "image_encoder"
    for file in ("model.safetensors", "pytorch_model.bin"):
        (folder / file).unlink()
    done, listed = run("models clip-vit-h --download", "models clip-vit-h")
    assert done.code == 2
    assert "h94/IP-Adapter on the Hugging Face Hub has no models/image_encoder/model.safetensors." in done.err
    assert " incomplete " in listed.out and "without models/image_encoder/model.safetensors" in listed.out


def test_models_are_listed_with_their_commands(run: Run) -> None:
    every, one, mistyped, nameless, none = run(
        "models",
        "models models/IP-Adapter/models/image_encoder",
        "models clip-vit-j x",
        "models --download",
        "models emoji-base",
    )
    assert none.err == "ipadapter: emoji-base names none of the models that `ipadapter models` lists.\n"
    assert all(model.name in every.out and str(model.place) in every.out for model in PUBLISHED_MODELS)
    assert " download h94/IP-Adapter models/image_encoder/config.json models/image_encoder/model.saf" in one.out
    assert "--local-dir models/IP-Adapter\n" in one.out
    assert mistyped.err == "ipadapter: clip-vit-j: no such model or config. Did you mean clip-vit-h?\n"
    assert nameless.err == (
        "ipadapter: Name what to download, models or configs: `ipadapter models sd15-base --download`.\n"
    )


def test_the_configs_name_published_models_alone() -> None:
    needed = [models_of([name]) for name in config_names() if name != "emoji-base"]
    assert all(needed)
    assert (
        model_at(load_config(TrainConfig, config_folder() / "sd15-plus-finetune.toml").init_from or Path()) is not None
    )
    starts = [line for name in config_names() for line in _starts(name)]
    assert all(model_at(Path(start)) for start in starts if start.startswith("models/"))
    assert len({model.place for model in PUBLISHED_MODELS}) == len(PUBLISHED_MODELS)


def _starts(name: str) -> list[str]:
    lines = (config_folder() / f"{name}.toml").read_text().splitlines()
    return [line.split('"')[1] for line in lines if line.startswith("# init_from")]


def test_a_local_folder_wins_over_a_hub_id(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(model_folder, tmp_path / "owner" / "name")
    assert load_base_model(Path("owner/name")).name == "name"
    assert is_hub_id(Path("other/name"))
    for path in ("owner/other", "models/x", "name", "/a/b", "../a/b", "a/b.safetensors", "a/b/c.ckpt", "~/a"):
        assert not is_hub_id(Path(path)), path


def test_an_incomplete_model_is_named_with_its_command(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "models" / "stable-diffusion-v1-5"
    shutil.copytree(model_folder, place)
    refuse_missing(Path("models/stable-diffusion-v1-5"))  # without a feature extractor, which only pipelines need
    weights = place / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(place / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    refuse_missing(Path("models/stable-diffusion-v1-5"))
    (place / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (place / "vae" / "config.json").unlink()
    message = (
        r"^models/stable-diffusion-v1-5: incomplete, without unet/diffusion_pytorch_model.safetensors, "
        r"vae/config.json. Run `ipadapter models stable-diffusion-v1-5 --download` \(4.3 GB\).$"
    )
    with pytest.raises(BaseModelError, match=message):
        load_base_model(Path("models/stable-diffusion-v1-5"))


def test_a_missing_start_is_named_with_its_command(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipadapter_trainer.training.train import train

    monkeypatch.chdir(tmp_path)
    start = "models/IP-Adapter/models/ip-adapter_sd15.safetensors"
    message = rf"^{start}: no such file. Run `ipadapter models ip-adapter_sd15 --download` \(40 MB\).$"
    with pytest.raises(BaseModelError, match=message):
        train(
            load_config(
                TrainConfig, None, [f"{key}={value}" for key, value in {**settings, "init_from": start}.items()]
            )
        )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "ip-adapter-plus_sd15.safetensors",
            "ip-adapter-plus_sd15.safetensors: no such file. The published one is models/IP-Adapter/models/"
            "ip-adapter-plus_sd15.safetensors; `ipadapter models ip-adapter-plus_sd15 --download` (100 MB) downloads "
            "it.",
        ),
        (
            "/data/stable-diffusion-xl-base-1.0",
            "/data/stable-diffusion-xl-base-1.0: no such folder. The published one is "
            "models/stable-diffusion-xl-base-1.0; `ipadapter models stable-diffusion-xl-base-1.0 --download` (13.9 GB) "
            "downloads it.",
        ),
    ],
)
def test_a_published_name_at_another_place_is_told_its_place(path: str, message: str) -> None:
    with pytest.raises(BaseModelError) as error:
        refuse_missing(None, Path(path))
    assert str(error.value) == message
