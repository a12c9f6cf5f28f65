"""`ipadapter cache`: run the frozen models over a data set once and store their outputs.

Processes take the shards in turn. A shard is written whole or not at all, so a run that was stopped resumes with the
missing ones, with any number of processes that see the same folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.buckets import assign, read_sizes
from ..data.from_config import augmentation_from_config, buckets_from_config, examples_from_config
from ..errors import CacheError, ConfigError, DataError
from ..files.provenance import trainer_version
from ..models.from_config import base_model_from_config, preprocessor_from_config
from ..runtime.disk import show_bytes
from ..runtime.folder_lock import LOCK, NOTE, lock_folder
from ..runtime.processes import check_precision, launched_on_cpu
from ..settings.config import TrainConfig
from .encode import RowDataset, encode_shards
from .files import MANIFEST, Manifest, ShardFile, read_header, read_manifest, write_shard
from .plan import TABLES, CacheSettings, Shard, distinct_captions, distinct_references, plan_shards

Say = Callable[[str], None]

_TIMEOUT = timedelta(days=7)  # processes wait for each other only at the end, and some are slower


def write_cache(
    config: TrainConfig,
    *,
    say: Say = lambda line: None,
    progress_bar: bool = False,
    force: bool = False,
    _dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the cache of a training to the folder `config.cache`, or the shards that are missing in it; returns the
    folder.

    Processes that `accelerate launch` started share the work. `say` gets the lines for the user. `force` starts
    although the disk has less room than the cache needs.

    Raises ConfigError without a folder; CacheError when the folder holds something else, when the disk has no room and
    for values that float16 cannot hold; DiskError when the disk refuses a file; DataError when no image can be read.
    """
    if config.cache is None:
        raise ConfigError("Where shall the cache go? Name a folder with cache=...")
    state = PartialState(cpu=launched_on_cpu(), timeout=_TIMEOUT)
    assert state.device is not None
    check_precision(config.mixed_precision, state.device)
    say = say if state.is_main_process else lambda line: None
    with lock_folder(config.cache, say):
        _write_cache(config, config.cache, state, say, progress_bar and state.is_main_process, force, _dtype)
    return config.cache


def _write_cache(
    config: TrainConfig, folder: Path, state: PartialState, say: Say, progress: bool, force: bool, dtype: torch.dtype
) -> None:
    assert state.device is not None
    base_model, examples = base_model_from_config(config, state.device), examples_from_config(config)
    settings = CacheSettings.of(config, examples, base_model)
    found = _read_manifest_of(folder, settings)
    if found is None or not config.buckets:
        buckets = buckets_from_config(config, examples)
    else:  # the same ones, although another batch_size may give up others
        buckets = assign(read_sizes(examples), found.buckets)
    shards = plan_shards(settings, base_model, examples, buckets, dtype)
    missing = {shard.file: shard for shard in shards if not _is_written(folder, settings, shard)}
    if found is not None and found.complete and not missing:
        say(f"{folder} is complete: {len(examples):,} images. Train with cache={folder}")
        return
    dtypes = {"vae": base_model.vae_dtype, "text_encoders": base_model.dtype, "image_encoder": base_model.dtype}
    manifest = Manifest(
        complete=False,
        settings=asdict(settings),
        key=settings.digest,
        library=trainer_version(),
        base_model=base_model.name,
        encoded_in={part: str(dtype).removeprefix("torch.") for part, dtype in dtypes.items()},
        buckets=list(buckets.sizes),
        counts={table: sum(len(shard.rows) for shard in shards if shard.table == table) for table in TABLES},
        shards={name: file for name, file in (found.shards if found else {}).items() if name not in missing},
        broken={},
    )
    say(_summary(config, manifest, shards, missing))
    if state.num_processes > 1:
        say(f"{state.num_processes} processes share the work.")
    _check_room(folder, sum(shard.bytes for shard in missing.values()), force, say)
    state.wait_for_everyone()  # all processes have looked for shards before the first one writes
    if state.is_main_process:
        for leftover in folder.glob("*/.*.tmp*"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)
        manifest.save(folder)
    state.wait_for_everyone()
    dataset = RowDataset(
        examples,
        distinct_captions(examples),
        list(distinct_references(examples).values()),
        preprocessor_from_config(config, base_model),
        augmentation_from_config(config),
        settings,
    )
    written: list[tuple[str, ShardFile]] = []
    for table in TABLES:
        batch_size = config.batch_size if table == "captions" else max(1, config.batch_size // settings.variants)
        part = [shard for shard in missing.values() if shard.table == table]
        part = [shard for shard in part if shard.number % state.num_processes == state.process_index]
        with tqdm(total=sum(len(s.rows) for s in part), desc=table, unit="row", disable=not progress) as bar:
            for shard, tensors, broken in encode_shards(base_model, dataset, part, batch_size, config.num_workers, bar):
                written.append((shard.file, write_shard(folder / shard.file, tensors, settings.digest, broken)))
        if table == "captions":
            base_model.release("text_encoders")
    manifest = replace(manifest, shards=manifest.shards | dict(gather_object(written)))  # waits for all processes
    if state.is_main_process:
        _complete(folder, settings, manifest, shards, say)
    state.wait_for_everyone()


def _read_manifest_of(folder: Path, settings: CacheSettings) -> Manifest | None:
    """The manifest of this cache, once begun. Raises CacheError when something else is in the folder."""
    if not (folder / MANIFEST).is_file():
        if any(file.name not in (LOCK, NOTE) for file in folder.iterdir()):
            raise CacheError(f"cache {folder} is a folder with other files in it. Choose another folder.")
        return None
    manifest = read_manifest(folder)
    if differences := settings.differences(manifest.settings):
        raise CacheError(
            f"{folder} holds the cache of other settings: {'; '.join(differences)}. Choose another folder with "
            "cache=..., or delete this one."
        )
    return manifest


def _is_written(folder: Path, settings: CacheSettings, shard: Shard) -> bool:
    header = read_header(folder / shard.file)
    return header is not None and header.key == settings.digest and header.rows.tolist() == shard.rows.tolist()


def _summary(config: TrainConfig, manifest: Manifest, shards: Sequence[Shard], missing: Mapping[str, Shard]) -> str:
    counts, size = manifest.counts, show_bytes(sum(shard.bytes for shard in shards))
    lines = [
        f"Caching the outputs of the encoders of {manifest.base_model} in {config.cache}",
        f"  {counts['images']:,} images, {counts['captions']:,} distinct captions, {counts['references']:,} other "
        f"references: {size} in {len(shards)} shards",
    ]
    if len(missing) < len(shards):
        lines.append(f"Resuming: {len(shards) - len(missing)} of {len(shards)} shards are written already.")
    if config.crop == "random" and config.cache_variants == 1:
        lines.append("Every image keeps one random crop; cache_variants=4 would hold four of each.")
    return "\n".join(lines)


def _check_room(folder: Path, needed: int, force: bool, say: Say) -> None:
    free = shutil.disk_usage(folder).free
    if needed <= free:
        say(f"{show_bytes(needed)} to be written, {show_bytes(free)} free.")
    elif force:
        say(f"{show_bytes(needed)} to be written, but only {show_bytes(free)} free: continuing because of --force.")
    else:
        raise CacheError(
            f"The cache needs {show_bytes(needed)}, but the disk of {folder} has {show_bytes(free)} free. Choose a "
            "folder on another disk with cache=..., lower cache_variants, set cache_image_features=int8 or none, or "
            "start with --force."
        )


def _complete(folder: Path, settings: CacheSettings, manifest: Manifest, shards: Sequence[Shard], say: Say) -> None:
    """Save the manifest with the hashes of all shards and the rows that could not be read. Of shards, only those that
    an interrupted run wrote are read for their hashes.
    """
    files: dict[str, ShardFile] = {}
    broken: dict[str, dict[int, str]] = {}
    for shard in shards:
        header = read_header(folder / shard.file)
        if header is None or not _is_written(folder, settings, shard):
            raise CacheError(
                f"{folder / shard.file} is missing although all processes are done. All of them must write into one "
                "folder that every machine sees; run the same command again for what is missing."
            )
        broken.setdefault(shard.table, {}).update(header.broken)
        files[shard.file] = manifest.shards.get(shard.file) or ShardFile.of(folder / shard.file)
    images, count = broken["images"], manifest.counts["images"]
    if len(images) == count:
        raise DataError(f"None of the {count} images can be read. The first: {images[0]}")
    manifest = replace(manifest, shards=files, broken=broken, complete=True)
    manifest.save(folder)
    reasons = [reason for rows in broken.values() for reason in rows.values()]
    if reasons:
        say(f"Could not be read and are left out: {len(reasons):,}, such as {reasons[0]}")
    say(f"Cached {count:,} images: {show_bytes(manifest.size)}. Train with cache={folder}")
