"""The end of a training: its file is there whatever a third party makes of it, and the numbers are said in words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ipadapter_core import load_adapter
from ipadapter_trainer.errors import ExportError
from ipadapter_trainer.files.opening import checkpoint_folders
from ipadapter_trainer.report.verdict import read_verdict
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.train import train

from .test_cli import ipadapter, keys

FILE = "ip-adapter_context-32.safetensors"


def break_loader(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """diffusers' own loader as a version of it could be."""
    import diffusers.loaders
    from diffusers.loaders import IPAdapterMixin, unet

    if how == "raises":

        def refuse(*_: Any, **__: Any) -> None:
            raise AttributeError("'IPAdapterAttnProcessor2_0'\nhas no attribute 'to_k_ip'")

        monkeypatch.setattr(IPAdapterMixin, "load_ip_adapter", refuse)
    elif how == "moved":
        import sys

        monkeypatch.delattr(diffusers.loaders, "IPAdapterMixin")
        monkeypatch.delitem(diffusers.loaders._class_to_module, "IPAdapterMixin")  # it would be imported again
        monkeypatch.delitem(sys.modules, "ipadapter_trainer.files.diffusers_loader", raising=False)
    else:
        loader = unet.UNet2DConditionLoadersMixin
        original = loader._convert_ip_adapter_attn_to_diffusers

        def other(self: Any, *arguments: Any, **options: Any) -> Any:
            processors = original(self, *arguments, **options)
            for processor in processors.values():
                for part in getattr(processor, "to_k_ip", ()):
                    part.weight.data.mul_(2)
            return processors

        monkeypatch.setattr(loader, "_convert_ip_adapter_attn_to_diffusers", other)


@pytest.mark.usefixtures("model_folder")  # diffusers reads no adapter of few layers
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", r"does not load it \(AttributeError: 'IPAdapterAttnProcessor2_0' has no attribute 'to_k_ip'\)\."),
        ("moved", r"does not load it \(ImportError: cannot import name 'IPAdapterMixin' from 'diffusers\.loaders' "),
        ("differs", r": the keys of layer 1 differ by 100\.00% of their largest value between ipadapter_core and diff"),
    ],
)
def test_diffusers_cannot_take_the_file_away(
    how: str, words: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_loader(monkeypatch, how)
    settings["steps"] = 1
    code, out, err = ipadapter("train", *keys(settings))
    file, (checkpoint,) = Path(settings["output"]) / FILE, checkpoint_folders(Path(settings["output"]))
    assert code == 0, err
    (warning,) = [line for line in out.splitlines() if line.startswith(f"Warning: {file}")]
    assert re.search(words, warning)
    assert warning.startswith(f"Warning: {file}: ")
    again = f"ipadapter export {checkpoint} {file} --dtype=float32 --force"
    assert f"The file is kept, since ipadapter_core reads back what was written. `ipadapter inspect {file}`" in warning
    assert warning.endswith(f"`{again}` checks it again.")
    assert out.splitlines()[-1] == f"Saved {file}"
    assert load_adapter(file).spec.kind == "base"
    assert (Path(settings["output"]) / "report.html").is_file()
    # The command that the warning names is strict, and leaves the file that is there.
    content = file.read_bytes()
    code, _, err = ipadapter(*again.split()[1:])
    assert (code, bool(re.search(words, err))) == (2, True)
    assert file.read_bytes() == content
    code, _, err = ipadapter("export", checkpoint, tmp_path / "new.safetensors")
    assert (code, (tmp_path / "new.safetensors").exists()) == (2, False)


def test_a_healthy_end_warns_of_nothing(settings: dict[str, Any]) -> None:
    code, out, _ = ipadapter("train", *keys(settings, steps=1))
    assert code == 0
    assert not any(line.startswith("Warning: ") and FILE in line for line in out.splitlines())


def test_weights_that_float16_cannot_hold(settings: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint stays, and the command in the message makes a file of it."""
    settings |= {"steps": 1, "export_dtype": "float16", "learning_rate": 1e5, "max_grad_norm": 0}
    with pytest.raises(ExportError, match=r"has values up to .*, float16 holds at most 65504|6\.55e\+04") as raised:
        train(make_config(settings))
    output = Path(settings["output"])
    (checkpoint,) = checkpoint_folders(output)
    command = f"ipadapter export {checkpoint} {output / FILE} --dtype=float32"
    assert str(raised.value).endswith(f"The training is complete; its last checkpoint exports with `{command}`.")
    assert not (output / FILE).exists()
    code, _, err = ipadapter(*command.split()[1:])
    assert code == 0, err
    assert torch.isfinite(load_adapter(output / FILE).projector.get_parameter("proj.weight")).all()


def test_a_folder_in_place_of_the_file(settings: dict[str, Any]) -> None:
    """Such as a read-only output, it is the system that refuses."""
    (Path(settings["output"]) / FILE).mkdir(parents=True)
    (Path(settings["output"]) / "log.jsonl").touch()
    with pytest.raises(ExportError, match=rf"{FILE}: Is a directory\. .*`ipadapter export .*checkpoint-000001"):
        train(make_config({**settings, "steps": 1}))


def test_a_report_that_fails_costs_nothing(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A matplotlib that cannot draw."""
    from matplotlib.figure import Figure

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(Figure, "savefig", refuse)
    code, out, err = ipadapter("train", *keys(settings, steps=1))
    assert code == 0, err
    output = settings["output"]
    warning = f"Warning: the report was not written (RuntimeError: no font). `ipadapter report {output}` writes it."
    assert out.splitlines()[-2:] == [warning, f"Saved {Path(output) / FILE}"]


def more_images(settings: dict[str, Any]) -> None:
    folder = Path(settings["data"])
    for file in list(folder.glob("*.png")):
        for copy in ("a", "b", "c"):
            (folder / f"{copy}-{file.name}").write_bytes(file.read_bytes())
            (folder / f"{copy}-{file.stem}.txt").write_text(f"a {copy} square")


def test_the_terminal_shows_what_counts(settings: dict[str, Any]) -> None:
    more_images(settings)
    code, out, err = ipadapter("train", *keys(settings, steps=4, validate_every=2, sample_images=0))
    assert code == 0, err
    lines = [json.loads(line) for line in (Path(settings["output"]) / "log.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "validation/loss" in line]
    expected = [
        "Validation at step {step}: loss {validation/loss:.4f}, gap to another image {validation/gap_shuffled:.4f} "
        "(standard error {validation/gap_shuffled_error:.4f}), gap to no image {validation/gap_no_image:.4f}".format(
            **line
        )
        for line in validations
    ]
    assert [line["step"] for line in validations] == [0, 2, 4]
    assert [line for line in out.splitlines() if line.startswith("Validation")] == expected
    (verdict,) = [line for line in out.splitlines() if line.startswith("Verdict: ")]
    assert verdict == f"Verdict: {read_verdict(validations)[1]}"
    assert read_verdict(validations)[1] in (Path(settings["output"]) / "report.html").read_text().replace("&#x27;", "'")
    assert "No validation" not in out


@pytest.mark.parametrize("case", ["off", "few", "broken", "stream"])
def test_no_validation_says_why(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(settings["data"])
    changes: dict[str, Any] = {"steps": 1}
    if case != "few":
        more_images(settings)
    if case == "off":
        changes["validation_images"] = 0
    elif case == "broken":
        changes["validation_images"] = 1
        from ipadapter_trainer.data.from_config import examples_from_config, image_root
        from ipadapter_trainer.training.training_data import held_out_rows

        config = make_config(settings)
        examples = examples_from_config(config)
        (row,) = held_out_rows(examples, 1, image_root(config))
        Path(str(examples[row].image)).write_bytes(b"not an image")
    elif case == "stream":
        from .tiny_data import sample, write_shard

        write_shard(tmp_path / "a.tar", {f"{i:03}": sample(i) for i in range(12)})
        changes["data"] = tmp_path / "a.tar"
    code, out, err = ipadapter("train", *keys(settings, **changes))
    assert code == 0, err
    reasons = {
        "off": r"validation_images is 0\.",
        "few": r"a tenth of the data is held out at most, and there are 6 images; 10 would do\.",
        "broken": r"no held-out image can be read, such as .*\.png: .*",
        "stream": r"the shards are a stream\. Cache them \(`ipadapter cache`\) to have some of .*",
    }
    (line,) = [line for line in out.splitlines() if line.startswith("No validation: ")]
    assert re.fullmatch(f"No validation: {reasons[case]}", line)
    assert "Validation at" not in out
    assert folder.is_dir()
