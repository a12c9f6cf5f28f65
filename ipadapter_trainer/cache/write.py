"""`ipadapter cache`: run the frozen models once over a data set and keep what they say.

Shards are dealt to processes (shard i to process i % P) and appear whole, so a run that was stopped goes on where it
was, with any number of processes that see the same folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from ..data.buckets import assign, read_sizes
from ..data.from_config import augmentation_from_config, buckets_from_config, data_fingerprint, examples_from_config
from ..errors import CacheError, ConfigError, DataError
from ..files.provenance import trainer_version
from ..models.from_config import base_model_from_config, preprocessor_from_config
from ..runtime.disk import show_bytes
from ..runtime.folder_lock import LOCK, NOTE, lock_folder
from ..runtime.processes import check_precision, launched_on_cpu
from ..settings.config import TrainConfig
from .encoding import Caching, write_table
from .files import MANIFEST, TABLES, UNFINISHED, Manifest, ShardEntry, read_header, read_manifest, sha256_of
from .plan import Rows, Shard, make_plan
from .settings import Settings, settings_of

Say = Callable[[str], None]

# Processes wait for each other at the end only, and some are slower: no reason to give up.
_PATIENCE = timedelta(days=7)


def write_cache(
    config: TrainConfig,
    *,
    say: Say = lambda line: None,
    progress_bar: bool = False,
    force: bool = False,
    _dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the cache of a training to the folder `config.cache`, or what is missing of it; returns the folder.

    Started by `accelerate launch`, the processes share the work. `force` starts although the forecast is more than
    the disk has room for.

    Raises ConfigError without a folder; CacheError when the folder holds something else,
    when the disk has no room, and for values that float16 cannot hold; DiskError when it refuses a file; DataError when
    no image can be read.
    """
    if config.cache is None:
        raise ConfigError("Where shall the cache go? Name a folder with cache=...")
    state = PartialState(cpu=launched_on_cpu(), timeout=_PATIENCE)
    check_precision(config.mixed_precision, state.device)
    say = say if state.is_main_process else lambda line: None
    with lock_folder(config.cache, say):
        return _write_cache(config, state, say, progress_bar, force, _dtype)


def _write_cache(
    config: TrainConfig, state: PartialState, say: Say, progress_bar: bool, force: bool, _dtype: torch.dtype
) -> Path:
    caching = _prepare(config, state, _dtype)
    missing = [shard for shard in caching.plan if not _is_written(caching.folder, shard)]
    if not missing and (caching.folder / MANIFEST).is_file():
        say(f"{caching.folder} is complete: {len(caching.examples):,} images. Train with cache={caching.folder}")
        return caching.folder
    say(_summary(caching, missing))
    if state.num_processes > 1:
        say(f"{state.num_processes} processes share the work.")
    _check_room(caching, missing, force, say)
    state.wait_for_everyone()  # nobody writes before all have looked
    if state.is_main_process:
        _start(caching)
    state.wait_for_everyone()
    for table in TABLES:
        mine = [s for s in missing if s.table == table and s.number % state.num_processes == state.process_index]
        if mine:
            write_table(caching, mine, progress_bar and state.is_main_process)
        if table == "texts":
            caching.base_model.release("text_encoders")
    state.wait_for_everyone()
    if state.is_main_process:
        manifest = _finish(caching, {shard.file for shard in missing})
        broken = [reason for reasons in manifest.broken.values() for reason in reasons.values()]
        if broken:
            say(f"Could not be read and are left out: {len(broken):,}, such as {broken[0]}")
        say(f"Cached {len(caching.examples):,} images: {show_bytes(manifest.size)}. Train with cache={caching.folder}")
    state.wait_for_everyone()
    return caching.folder


def _prepare(config: TrainConfig, state: PartialState, dtype: torch.dtype) -> Caching:
    assert config.cache is not None
    base_model = base_model_from_config(config, state.device)
    examples = examples_from_config(config)
    rows = Rows.of(examples)
    settings = settings_of(
        config, base_model, data_fingerprint(config, examples), len(examples), any_reference=bool(rows.references)
    )
    begun = _begun(config.cache, settings)
    if begun is None or not config.buckets:
        buckets = buckets_from_config(config, examples)
    else:  # the same ones, although another batch_size may give up others
        buckets = assign(read_sizes(examples), [(width, height) for width, height in begun.buckets])
    plan = make_plan(settings, base_model, rows, buckets, dtype.itemsize)
    return Caching(
        config=config,
        folder=config.cache,
        base_model=base_model,
        preprocessor=preprocessor_from_config(config, base_model),
        augmentation=augmentation_from_config(config),
        examples=examples,
        rows=rows,
        buckets=buckets,
        settings=settings,
        plan=plan,
        dtype=dtype,
    )


def _begun(folder: Path, settings: Settings) -> Manifest | None:
    """What is in the folder already. Raises CacheError when it is not a part of this cache."""
    if not folder.exists():
        return None
    found = [file for file in (folder / MANIFEST, folder / UNFINISHED) if file.is_file()]
    if not found and (not folder.is_dir() or any(f.name not in (LOCK, NOTE) for f in folder.iterdir())):
        what = "a folder with other files in it" if folder.is_dir() else "a file"
        raise CacheError(f"cache {folder} is {what}. Choose another folder.")
    for file in found[:1]:
        begun = read_manifest(file)
        differences = settings.differences(begun.settings)
        if differences:
            raise CacheError(
                f"{folder} holds the cache of other settings: {'; '.join(differences)}. Choose another folder with "
                "cache=..., or delete this one."
            )
        return begun
    return None


def _is_written(folder: Path, shard: Shard) -> bool:
    header = read_header(folder / shard.file)
    return header is not None and header.key == shard.key


def _summary(caching: Caching, missing: Sequence[Shard]) -> str:
    plan = caching.plan
    lines = [f"Caching what the frozen models of {caching.base_model.name} say in {caching.folder}"]
    names = {"texts": "distinct captions", "references": "other references", "images": "images"}
    for table, shards in plan.shards.items():
        rows = sum(len(shard.items) for shard in shards)
        if rows:
            each = f"{show_bytes(plan.bytes[table] / rows)} each"
            lines.append(f"  {rows:>10,} {names[table]:<18}{show_bytes(plan.bytes[table]):>12}  ({each})")
    total, done = sum(len(shards) for shards in plan.shards.values()), len(list(plan)) - len(missing)
    lines.append(f"  {'':>10} {'in all':<18}{show_bytes(sum(plan.bytes.values())):>12}  ({total} shards)")
    if done:
        lines.append(f"Going on: {done} of {total} shards are written already.")
    if caching.config.crop == "random" and caching.settings.cache_variants == 1:
        lines.append("Every image keeps one random crop; cache_variants=4 would hold four of each.")
    return "\n".join(lines)


def _check_room(caching: Caching, missing: Sequence[Shard], force: bool, say: Say) -> None:
    plan = caching.plan
    rows = {table: sum(len(shard.items) for shard in shards) for table, shards in plan.shards.items()}
    needed = sum(plan.bytes[shard.table] * len(shard.items) / rows[shard.table] for shard in missing)
    place = next(parent for parent in (caching.folder, *caching.folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed <= free:
        say(f"{show_bytes(needed)} to be written, {show_bytes(free)} free.")
    elif force:
        say(f"{show_bytes(needed)} to be written, but only {show_bytes(free)} free: going on, as asked.")
    else:
        raise CacheError(
            f"The cache needs {show_bytes(needed)}, but {place} has {show_bytes(free)} free. Choose a folder on "
            "another disk with cache=..., lower cache_variants, set cache_image_features=int8 or none, or start with "
            "--force."
        )


def _start(caching: Caching) -> None:
    caching.folder.mkdir(parents=True, exist_ok=True)
    for leftover in caching.folder.glob("*/.*.tmp*"):  # of a run that was killed while it wrote
        leftover.unlink(missing_ok=True)
    _manifest(caching).save(caching.folder / UNFINISHED)


def _finish(caching: Caching, written: set[str]) -> Manifest:
    manifest, folder = _manifest(caching), caching.folder
    known: dict[str, ShardEntry] = {}
    if (folder / MANIFEST).is_file():
        known = {e.file: e for entries in read_manifest(folder / MANIFEST).shards.values() for e in entries}
    for shard in caching.plan:
        header = read_header(folder / shard.file)
        if header is None or header.key != shard.key:
            raise CacheError(
                f"{folder / shard.file} is not there although all processes are done. All of them must write into one "
                "folder that every machine sees; run the same command again for what is missing."
            )
        manifest.broken.setdefault(shard.table, {}).update(header.broken)
        size = (folder / shard.file).stat().st_size
        entry = None if shard.file in written else known.get(shard.file)
        digest = sha256_of(folder / shard.file) if entry is None else entry.sha256
        manifest.shards[shard.table].append(ShardEntry(shard.file, shard.start, shard.stop, size, digest, shard.key))
    reasons = manifest.broken.get("images", {})
    if len(reasons) == len(caching.examples):
        raise DataError(f"None of the {len(reasons)} images can be read. The first: {reasons['0']}")
    manifest.save(folder / MANIFEST)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return manifest


def _manifest(caching: Caching) -> Manifest:
    base_model = caching.base_model
    names = {"vae": base_model.vae_dtype, "text_encoders": base_model.dtype, "image_encoder": base_model.dtype}
    return Manifest(
        settings=asdict(caching.settings),
        library=trainer_version(),
        base_model=base_model.name,
        encoded_in={part: str(dtype).removeprefix("torch.") for part, dtype in names.items()},
        stored_in=str(caching.dtype).removeprefix("torch."),
        buckets=[list(size) for size in caching.buckets.sizes],
        counts={table: sum(len(s.items) for s in shards) for table, shards in caching.plan.shards.items()},
        shards={table: [] for table in caching.plan.shards},
    )
