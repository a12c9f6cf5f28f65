"""The config files that come with this package: `sd15-base` is configs/sd15-base.toml."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports] - only installed on Python 3.10

# A wheel installs the folder `configs` of a checkout under another name.
_FOLDERS = ("ipadapter_configs", "configs")


def config_folder() -> Path:
    """The folder of the config files, in an installed wheel or in a checkout.

    Raises ConfigError if it is missing.
    """
    package = Path(__file__).resolve().parents[1]
    folders = [package.parent / name for name in _FOLDERS]
    for folder in folders:
        if (folder / "sd15-base.toml").is_file():
            return folder
    raise ConfigError(
        f"The config files are missing: looked in {' and '.join(map(str, folders))}. Reinstall ip-adapter-kit."
    )


def config_names() -> list[str]:
    """The names of the config files."""
    return sorted(file.stem for file in config_folder().glob("*.toml"))


def find_config(name: str) -> Path:
    """A config file by its path or, if there is no such file, by the name of one that comes with this package.

    Raises ConfigError with the nearest name for an unknown one.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parent in (Path(), Path("configs")) and path.name.removesuffix(".toml") in config_names():
        return config_folder() / f"{path.name.removesuffix('.toml')}.toml"
    if path.is_dir():
        raise ConfigError(f"{name} is a folder, not a config. If it holds the images, write data={name}.")
    near = difflib.get_close_matches(path.name.removesuffix(".toml"), config_names(), n=1)
    hint = f"Did you mean {near[0]}?" if near else "`ipadapter new` lists the configs that come with this package."
    raise ConfigError(f"{name}: no such config. {hint}")


def config_summary(name: str) -> str:
    """The first sentence of a config file: what it trains."""
    head = (config_folder() / f"{name}.toml").read_text(encoding="utf-8").split("\n#\n")[0]
    return " ".join(line.removeprefix("#").strip() for line in head.splitlines()).split(". ")[0].rstrip(".")


def read_config(file: Path) -> dict[str, Any]:
    """The settings in a config file, not validated. Raises ConfigError for a missing file or invalid TOML."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file. Give a .toml file, or only key=value settings.")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML ({error}).") from error


def write_config(name: str, out: Path) -> Path:
    """Copy a config for editing; the commands in its comments name the copy.

    Raises ConfigError for an unknown name, another suffix than .toml, and a file that exists.
    """
    file = find_config(name)
    if out.suffix != ".toml":
        raise ConfigError(f"{out}: a config ends in .toml. Write `ipadapter new {name} {out}.toml`.")
    command = "#     ipadapter train "
    text = file.read_text(encoding="utf-8-sig").replace(f"{command}{file.stem}", f"{command}{out}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{out} exists already. Choose another name, or delete it.") from error
    return out
