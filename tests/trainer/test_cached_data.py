"""Training from a cache is the training from images."""

from __future__ import annotations

import json
import os
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ipadapter_trainer.cache.files import MANIFEST
from ipadapter_trainer.cache.read import CachedDataset
from ipadapter_trainer.cache.write import write_cache
from ipadapter_trainer.data.augmentation import SampleIndex
from ipadapter_trainer.data.buckets import BucketBatchSampler
from ipadapter_trainer.data.dataset import Batch, ImageDataset, loader
from ipadapter_trainer.data.from_config import (
    augmentation_from_config,
    buckets_from_config,
    examples_from_config,
)
from ipadapter_trainer.errors import CacheError, DataError
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.features import Features, encode_batch
from ipadapter_trainer.models.from_config import base_model_from_config, preprocessor_from_config
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.adapted_unet import TrainBatch, adapt_unet
from ipadapter_trainer.training.new_adapter import adapter_spec, new_adapter
from ipadapter_trainer.training.training_data import open_training_data

from .plans import plan_of
from .tiny_models import COLOURS


@pytest.fixture
def many(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Images of several shapes whose every pixel differs; some share a caption, some have other references."""
    folder = tmp_path / "many"
    (folder / "faces").mkdir(parents=True)
    rows = []
    for number in range(8):
        random = np.random.default_rng(number)
        size = ((90, 64), (64, 90), (70, 70), (100, 64))[number % 4]
        Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{number}.png")
        torch.save(torch.nn.functional.normalize(torch.randn(512), dim=0), folder / f"{number}.pt")
        row = {"file_name": f"{number}.png", "text": f"a {COLOURS[number % 3]} square", "id_embed_file": f"{number}.pt"}
        if number >= 5:
            row["reference"] = [f"faces/{number % 2}.png", "faces/2.png"]
        rows.append(row)
    for number in range(3):
        random = np.random.default_rng(100 + number)
        Image.fromarray(random.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(folder / "faces" / f"{number}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**settings, "data": str(folder), "cache": str(tmp_path / "cache"), "text_dropout": 0.3}


def cached(config: TrainConfig, base_model: BaseModel) -> CachedDataset:
    return CachedDataset(config, base_model, examples_from_config(config))


def uncached(config: TrainConfig, base_model: BaseModel) -> ImageDataset:
    examples = examples_from_config(config)
    return ImageDataset(
        examples,
        preprocessor_from_config(config, base_model),
        augmentation_from_config(config),
        buckets_from_config(config, examples),
    )


def batches(dataset: ImageDataset, config: TrainConfig, count: int = 4) -> list[Batch]:
    order = BucketBatchSampler(dataset.buckets.rows, config.batch_size, config.seed)
    loaded = loader(dataset, order, batch_size=config.batch_size, num_workers=config.num_workers)
    return list(islice(iter(loaded), count))


def losses(config: TrainConfig, base_model: BaseModel, drawn: list[Batch]) -> torch.Tensor:
    """Of an adapter that learns while it goes."""
    torch.manual_seed(0)
    adapter = new_adapter(base_model, config.train_kind)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    found = []
    with adapt_unet(base_model, adapter) as model:
        for batch in drawn:
            features = encode_batch(base_model, batch, adapter.spec)
            step = TrainBatch(features, batch["drop_image_embeds"], batch["noise"], batch["timesteps"])
            loss = model.sample_losses(step)
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.disable_adapter()
            found.append(loss.detach())
    return torch.cat(found)


def features(config: TrainConfig, base_model: BaseModel, drawn: list[Batch]) -> Features:
    spec = adapter_spec(base_model, config.train_kind)
    return Features.cat([encode_batch(base_model, batch, spec) for batch in drawn])


def test_the_losses_are_those_of_the_images(many: dict[str, Any], base_model: BaseModel, tmp_path: Path) -> None:
    """Bit for bit when nothing is rounded. (One image a batch, so that the encoders' sums have one order.)"""
    config = make_config({**many, "kind": "plus", "batch_size": 1})
    expected = losses(config, base_model, batches(uncached(config, base_model), config))
    write_cache(config, _dtype=torch.float32)
    assert torch.equal(losses(config, base_model, batches(cached(config, base_model), config)), expected)
    config = make_config({**many, "kind": "plus", "batch_size": 1, "cache": tmp_path / "half"})
    write_cache(config)
    half = losses(config, base_model, batches(cached(config, base_model), config))
    torch.testing.assert_close(half, expected, atol=1e-3, rtol=1e-3)
    assert not torch.equal(half, expected)


CASES: list[dict[str, Any]] = [
    {"text_dropout": 0.5},
    {"kind": "plus", "buckets": True, "bucket_step": 8},
    {"kind": "faceid-plusv2", "crop": "random", "flip": True, "cache_variants": 2},
    {"kind": "faceid", "flip": True, "num_workers": 1},
    {"kind": "full", "cache_image_features": "none", "crop": "random", "flip": True, "cache_variants": 2},
    {"kind": "plus", "cache_image_features": "none", "reference_crop": 0.4, "self_reference": 0.5},
    {"self_reference": 0.5, "flip": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_features_are_those_of_the_images(
    many: dict[str, Any], case: dict[str, Any], base_model: BaseModel
) -> None:
    """Eight images in batches of two: with variants, for as many epochs as there are."""
    config = make_config({**many, **case})
    count = 4 * config.cache_variants
    plain = batches(uncached(config, base_model), config, count)
    write_cache(config)
    kept = batches(cached(config, base_model), config, count)
    for one, other in zip(plain, kept, strict=True):
        drawn = ("noise", "posterior_noise", "timesteps", "drop_image_embeds", "face_id_embed", "crop_coords_top_left")
        for key in (*drawn, "original_size", "target_size"):
            assert torch.equal(one[key], other[key]) if key in one else key not in other, key
        assert "images" not in other
        assert "text_input_ids" not in other
        assert ("clip_images" in other) == (case.get("cache_image_features") == "none")
        expected, found = features(config, base_model, [one]), features(config, base_model, [other])
        torch.testing.assert_close(found.latents, expected.latents, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.text.states, expected.text.states, atol=2e-3, rtol=1e-3)
        for kept_feature, feature in zip(found.image_features, expected.image_features, strict=True):
            torch.testing.assert_close(kept_feature, feature, atol=2e-3, rtol=1e-3)


def test_sdxl_keeps_pooled_text_and_sizes(many: dict[str, Any], sdxl_folder: Path, sdxl_model: BaseModel) -> None:
    config = make_config({**many, "base_model": sdxl_folder, "buckets": True, "bucket_step": 16, "crop": "random"})
    write_cache(config, _dtype=torch.float32)
    plain, kept = batches(uncached(config, sdxl_model), config, 3), batches(cached(config, sdxl_model), config, 3)
    assert {batch["latents_mean"].shape for batch in kept} == {batch["noise"].shape for batch in plain}
    spec = new_adapter(sdxl_model, config.train_kind).spec
    for one, other in zip(plain, kept, strict=True):
        expected, found = encode_batch(sdxl_model, one, spec), encode_batch(sdxl_model, other, spec)
        assert torch.equal(found.time_ids, expected.time_ids)
        torch.testing.assert_close(found.text.pooled, expected.text.pooled)
        torch.testing.assert_close(found.text.states, expected.text.states)
        torch.testing.assert_close(found.latents, expected.latents)


def test_a_base_in_bfloat16_takes_the_kept_features(many: dict[str, Any]) -> None:
    config = make_config({**many, "kind": "plus", "mixed_precision": "bf16"})
    base_model = base_model_from_config(config)
    plain = features(config, base_model, batches(uncached(config, base_model), config, 2))
    write_cache(config)
    kept = features(config, base_model, batches(cached(config, base_model), config, 2))
    assert kept.text.states.dtype == kept.image_features[0].dtype == torch.bfloat16
    torch.testing.assert_close(kept.text.states, plain.text.states, atol=0.05, rtol=0.02)
    torch.testing.assert_close(kept.image_features[0], plain.image_features[0], atol=0.05, rtol=0.02)
    torch.testing.assert_close(kept.latents, plain.latents, atol=1e-3, rtol=1e-3)


def test_nothing_is_loaded_but_the_unet(many: dict[str, Any], model_folder: Path) -> None:
    config = make_config({**many, "kind": "plus"})
    write_cache(config)
    fresh = load_base_model(model_folder)
    drawn = batches(cached(config, fresh), config, 2)
    spec = new_adapter(fresh, config.train_kind).spec
    features = encode_batch(fresh, drawn[0], spec)
    assert features.text.states.dtype == features.image_features[0].dtype == torch.float32
    assert set(fresh._loaded) <= {"unet"}


def test_int8_is_near(many: dict[str, Any], base_model: BaseModel, tmp_path: Path) -> None:
    config = make_config({**many, "kind": "plus"})
    write_cache(config)
    small = make_config({**many, "kind": "plus", "cache": tmp_path / "small", "cache_image_features": "int8"})
    write_cache(small)
    for full, quantised in zip(cached(config, base_model), cached(small, base_model), strict=False):
        error = (quantised["image_features"] - full["image_features"]).float().norm()
        assert error < 0.01 * full["image_features"].float().norm()
        assert error > 0


def test_with_variants_the_epochs_take_turns(many: dict[str, Any], base_model: BaseModel) -> None:
    config = make_config({**many, "crop": "random", "flip": True, "cache_variants": 3})
    write_cache(config)
    dataset = cached(config, base_model)
    assert load_file(Path(many["cache"]) / "images" / "shard-00000.safetensors")["latents_mean"].shape[1] == 6
    crops = [dataset[SampleIndex(epoch, 0)]["latents_mean"] for epoch in range(6)]
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 3  # crops and mirror images


def test_shared_captions_and_references_are_kept_once(many: dict[str, Any]) -> None:
    config = make_config({**many, "kind": "plus"})
    write_cache(config)
    counts = dict.fromkeys(("captions", "references", "images"), 0)
    for file in Path(many["cache"]).glob("*/*.safetensors"):
        counts[file.parent.name] += len(load_file(file)["row"])
    assert counts == {"captions": 3 + 1, "references": 3, "images": 8}


def test_the_forecast_is_what_is_written(many: dict[str, Any], base_model: BaseModel, sdxl_folder: Path) -> None:
    for number, case in enumerate(
        ({}, {"kind": "plus", "cache_image_features": "int8", "flip": True}, {"base_model": sdxl_folder})
    ):
        config = make_config({**many, **case, "cache": f"{many['cache']}{number}"})
        forecast = plan_of(config).cache
        assert config.cache is not None
        folder = write_cache(config)
        found = 0
        for file in folder.glob("*/*.safetensors"):
            content = file.read_bytes()
            found += len(content) - 8 - int.from_bytes(content[:8], "little")
        assert forecast == found
        assert found > 8 * 2 * 4 * 8 * 8 * 2


# --- Broken images


def test_broken_images_are_replaced_and_named_as_without_cache(many: dict[str, Any], base_model: BaseModel) -> None:
    folder = Path(many["data"])
    (folder / "2.png").write_bytes(b"not an image")
    (folder / "faces" / "2.png").write_bytes(b"neither")
    config = make_config(many)
    lines: list[str] = []
    write_cache(config, say=lines.append)
    assert any("Could not be read and are left out: 2, such as" in line for line in lines)
    plain, kept = uncached(config, base_model), cached(config, base_model)
    assert [row for row in kept.stored.broken if row < 8] == [2]
    assert "2.png: a text file that begins with 'not an image'" in kept.stored.broken[2]
    for epoch in range(3):
        for row in range(8):
            one, other = plain[SampleIndex(epoch, row)], kept[SampleIndex(epoch, row)]
            assert [line.split(":")[0] for line in one["broken"]] == [line.split(":")[0] for line in other["broken"]]
            assert torch.equal(one["original_size"], other["original_size"])
            assert torch.equal(one["noise"], other["noise"])


def test_no_image_can_be_read(many: dict[str, Any]) -> None:
    for file in Path(many["data"]).glob("*.png"):
        file.write_bytes(b"not an image")
    with pytest.raises(DataError, match="None of the 8 images can be read"):
        write_cache(make_config(many))


def test_a_bucket_of_broken_images_is_left_out(many: dict[str, Any], base_model: BaseModel) -> None:
    config = make_config({**many, "buckets": True, "bucket_step": 8})
    examples = examples_from_config(config)
    sizes = buckets_from_config(config, examples)
    for row in sizes.rows[0]:
        Path(examples[row].name).write_bytes(Path(examples[row].name).read_bytes()[:60])  # the header is readable
    write_cache(config)
    dataset = cached(config, base_model)
    assert dataset.buckets.sizes == sizes.sizes[1:]
    assert all(not batch["broken"] for batch in batches(dataset, config, 8))


# --- What does not fit is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 128}, ["resolution was 64 and is now 128"]),
        ({"flip": True, "crop": "random"}, ["flip was False and is now True", "crop was 'center' and is now 'random'"]),
        ({"kind": "plus"}, ["image_feature (kind) was 'image_embeds' and is now 'penultimate_hidden_states'"]),
        ({"kind": "faceid"}, ["image_encoder was", "and is now None"]),
        ({"self_reference": 0.5}, ["own_references (self_reference > 0) was False and is now True"]),
    ],
    ids=str,
)
def test_another_setting_is_refused_by_name(
    many: dict[str, Any], change: dict[str, Any], words: list[str], base_model: BaseModel
) -> None:
    write_cache(make_config(many))
    with pytest.raises(CacheError, match="is the cache of other settings") as error:
        cached(make_config({**many, **change}), base_model)
    assert all(word in str(error.value) for word in words)
    assert "Set them back" in str(error.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "image_encoder"])
def test_another_model_is_refused_by_name(many: dict[str, Any], part: str, model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "other"
    other.mkdir()
    for folder in model_folder.iterdir():
        (other / folder.name).symlink_to(folder)
    (other / part).unlink()
    (other / part).mkdir()
    for file in (model_folder / part).iterdir():
        if file.suffix == ".safetensors":
            weights = {key: tensor + 0.5 for key, tensor in load_file(file).items()}
            save_file(weights, other / part / file.name, {"format": "pt"})
        else:
            (other / part / file.name).symlink_to(file)
    write_cache(make_config(many))
    config = make_config({**many, "base_model": other})
    name = {"text_encoder": "text_encoders"}.get(part, part)
    with pytest.raises(CacheError, match=f"settings: {name} was '[0-9a-f]{{16}}' and is now '[0-9a-f]{{16}}'"):
        cached(config, load_base_model(other))


def test_other_data_are_refused(many: dict[str, Any], base_model: BaseModel) -> None:
    write_cache(make_config(many))
    file = Path(many["data"]) / "metadata.jsonl"
    file.write_text(file.read_text().replace("a red square", "a big red square"))
    with pytest.raises(CacheError, match=r"settings: its 8 images had other file names or captions\. Set them back"):
        cached(make_config(many), base_model)
    file.write_text("\n".join(file.read_text().splitlines()[1:]))
    with pytest.raises(CacheError, match=r"settings: images was 8 and is now 7\. Set them back"):
        cached(make_config(many), base_model)


@pytest.mark.parametrize("name", ["3.png", "faces/2.png"])
def test_a_replaced_image_is_named_and_encoded_again(many: dict[str, Any], name: str, base_model: BaseModel) -> None:
    config = make_config({**many, "kind": "plus"})
    file, count = Path(many["data"]) / name, len(examples_from_config(config))
    write_cache(config)
    before = file.stat().st_size
    os.utime(file, (0, 0))  # as a copy on another machine
    assert len(cached(config, base_model)) == count
    Image.new("RGB", Image.open(file).size).save(file)
    now = f"had {before:,} bytes when it was cached and now has {file.stat().st_size:,}"
    with pytest.raises(CacheError, match=rf"^{file} {now}\. Run `ipadapter cache` with the same settings again\."):
        cached(config, base_model)
    drawn = batches(uncached(config, base_model), config)
    write_cache(config)
    expected, found = (features(config, base_model, b) for b in (drawn, batches(cached(config, base_model), config)))
    torch.testing.assert_close(found.latents, expected.latents, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.image_features[0], expected.image_features[0], atol=2e-3, rtol=1e-3)


def test_what_does_not_matter_is_no_difference(many: dict[str, Any], base_model: BaseModel) -> None:
    """The seed decides no crop, and there is a feature more than is needed."""
    write_cache(make_config({**many, "self_reference": 0.5}))
    changes = {"seed": 5, "kind": "base", "steps": 9, "batch_size": 4, "learning_rate": 1e-5, "text_dropout": 0.0}
    assert len(cached(make_config({**many, **changes}), base_model)) == 8


def test_a_seed_decides_random_crops(many: dict[str, Any], base_model: BaseModel) -> None:
    write_cache(make_config({**many, "crop": "random"}))
    with pytest.raises(CacheError, match="seed was 0 and is now 5"):
        cached(make_config({**many, "crop": "random", "seed": 5}), base_model)


def test_damaged_caches_are_refused(many: dict[str, Any], base_model: BaseModel) -> None:
    config, folder = make_config(many), Path(many["cache"])
    with pytest.raises(CacheError, match=r"holds no cache\. Run `ipadapter cache`"):
        cached(config, base_model)
    write_cache(config)
    shard = folder / "images" / "shard-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(CacheError, match=r"images/shard-00000.safetensors is damaged"):
        cached(config, base_model)
    shard.unlink()
    with pytest.raises(CacheError, match=r"images/shard-00000.safetensors is missing"):
        cached(config, base_model)
    shard.write_bytes(b"\xff" * len(content))
    with pytest.raises(CacheError, match=r"images/shard-00000.safetensors is damaged"):
        cached(config, base_model)
    shard.write_bytes(content)
    manifest = folder / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text[:-20])
    with pytest.raises(CacheError, match=r"manifest.json: not a cache's manifest"):
        cached(config, base_model)
    manifest.write_text(text.replace('"format": 5', '"format": 7'))
    with pytest.raises(CacheError, match="a cache of format 7, this version reads 5"):
        cached(config, base_model)


def test_a_shard_that_breaks_while_training_is_no_broken_image(many: dict[str, Any], base_model: BaseModel) -> None:
    """Else a training would go on with what is left."""
    config = make_config({**many, "num_workers": 1, "validation_images": 0})
    write_cache(config)
    from accelerate import Accelerator

    source = open_training_data(config, base_model, Accelerator(cpu=True))
    texts = Path(many["cache"]) / "captions" / "shard-00000.safetensors"
    texts.write_bytes(b"\xff" * texts.stat().st_size)
    with pytest.raises(CacheError, match=r"^\S*shard-00000.safetensors is damaged\. Run `ipadapter cache`"):
        next(source.batches(0))


# --- For workers


def test_a_dataset_travels_to_workers_without_what_it_mapped(many: dict[str, Any], base_model: BaseModel) -> None:
    config = make_config(many)
    write_cache(config)
    dataset = cached(config, base_model)
    expected = dataset[3]
    sent = pickle.dumps(dataset)
    assert len(sent) < 200_000
    again = pickle.loads(sent)[3]
    assert all(torch.equal(again[k], v) for k, v in expected.items() if isinstance(v, torch.Tensor))


def test_a_row_of_another_bucket_stands_in_for_none(many: dict[str, Any], base_model: BaseModel) -> None:
    config = make_config({**many, "buckets": True, "bucket_step": 8})
    write_cache(config)
    dataset = cached(config, base_model)
    first, second = (rows[0] for rows in dataset.buckets.rows[:2])
    dataset.stored.broken = dict.fromkeys(dataset.buckets.rows[0], "gone")
    with pytest.raises(DataError, match="None of the 8 images can be read"):
        dataset[first]
    assert dataset[second]["latents_mean"].shape == dataset.preprocessor.latent_shape(dataset.buckets.sizes[1])
