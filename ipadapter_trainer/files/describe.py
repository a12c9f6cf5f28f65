"""`ipadapter inspect`: an adapter file, described from its header after its weights were checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ipadapter_core import AdapterSpec, infer_spec, shortcut_hint

from .opening import adapter_files, open_checkpoint


@dataclass(frozen=True)
class Description:
    """An adapter file: its size in `bytes`, the `layout` of its keys, the distinct `dtypes`."""

    file: str
    bytes: int
    layout: str
    spec: AdapterSpec
    parameters: int
    dtypes: tuple[str, ...]
    metadata: Mapping[str, str]

    def as_json(self) -> dict[str, object]:
        """Plain values for `json.dumps`."""
        spec = self.spec
        return {
            "file": self.file,
            "bytes": self.bytes,
            "layout": self.layout,
            "kind": spec.kind,
            "family": spec.family,
            "cross_attention_dim": spec.cross_attention_dim,
            "encoder": spec.encoder,
            "feature": spec.feature,
            "image_dim": spec.image_dim,
            "face_dim": spec.face_dim,
            "num_tokens": spec.num_tokens,
            "layers": len(spec.layer_dims),
            "layer_dims": list(spec.layer_dims),
            "lora_rank": spec.lora_rank,
            "shortcut": spec.shortcut,
            "parameters": self.parameters,
            "dtypes": list(self.dtypes),
            "metadata": dict(self.metadata),
        }

    def as_text(self) -> str:
        """A table for the terminal."""
        spec = self.spec
        rows = [
            ("file", f"{self.file} ({self.bytes / 1e6:.1f} MB, {self.layout} layout)"),
            ("kind", spec.kind + self._version()),
            *([("or", spec.lookalike)] if spec.lookalike else []),
            ("for", f"{spec.family_name} (text of {spec.cross_attention_dim})"),
            ("encoder", f"{spec.encoder}: {spec.feature}"),
            ("tokens", str(spec.num_tokens)),
            ("layers", f"{len(spec.layer_dims)} cross-attention layers, {_runs(spec.layer_dims)} wide"),
            ("LoRA", "none" if spec.lora_rank is None else f"rank {spec.lora_rank}"),
            ("parameters", f"{self.parameters / 1e6:.2f} M in {', '.join(self.dtypes)}"),
        ]
        rows += [(key, value) for key, value in sorted(self.metadata.items())]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _version(self) -> str:
        if self.spec.kind != "faceid-plus":
            return ""
        if self.spec.shortcut is not None:
            return " v2" if self.spec.shortcut else " v1"
        hint = shortcut_hint(self.file)
        guess = "" if hint is None else f"; the name suggests {'v2' if hint else 'v1'}"
        return f" (v1 or v2: the file does not say{guess})"


def describe(path: Path) -> Description:
    """Describe the adapter at `path`, a file or a folder, see `opening.adapter_files`.

    Raises AdapterError for another file, saying what it is, and for weights that no host can use, such as NaN;
    ExportError for a folder without an adapter.
    """
    checkpoint = open_checkpoint(path)
    files = adapter_files(path)
    parts = (checkpoint.image_proj, checkpoint.ip_adapter)
    spec = infer_spec(checkpoint)
    for part in parts:
        for _ in part.values():  # a weight is checked when it is read
            pass
    return Description(
        file=str(files[0] if len(files) == 1 else path),
        bytes=sum(file.stat().st_size for file in files),
        layout=checkpoint.layout,
        spec=spec,
        parameters=sum(math.prod(shape) for part in parts for shape in part.shapes.values()),
        dtypes=tuple(sorted({str(d).removeprefix("torch.") for part in parts for d in part.dtypes.values()})),
        metadata=checkpoint.metadata,
    )


def _runs(widths: tuple[int, ...]) -> str:
    """(320, 320, 640) -> "2x320, 1x640", in id order."""
    return ", ".join(f"{len(list(run))}x{width}" for width, run in groupby(widths))
