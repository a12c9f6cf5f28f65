"""What the ComfyUI registry will see: `comfy node validate` without a warning, and the right files in the archive.

    python .ci/check_registry.py path/to/comfy

comfy exits 0 whatever it finds, so its words are read. The archive of `comfy node pack` (files that git tracks, less
.comfyignore) is unpacked under a name of no meaning and the bundled adapter loaded from there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "node.zip"
FILES = {"__init__.py", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"}
FOLDERS = {"assets", "example_workflows", "ipadapter_core", "locales", "nodes", "subgraphs", "web"}
TRAINING_ONLY = {f"assets/{name}" for name in ("emoji/judges.safetensors", "emoji/pictures.zip", "emoji/quality.json")}
MOST_BYTES = 60_000_000
LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from ipadapter_core import load_adapter
from ipadapter_core.assets import emoji_folder
folder = emoji_folder()
assert str(folder).startswith(sys.argv[1]), folder
for name in ("adapter", "adapter_base"):
    print(load_adapter(folder / f"{name}.safetensors").spec.kind, "adapter loads from the archive")
"""


def run(*command: str) -> str:
    """What a command printed; CalledProcessError when it fails."""
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def check_validation(comfy: str) -> None:
    """Its warnings are errors here."""
    said = run(comfy, "--skip-prompt", "node", "validate")
    if "checks passed successfully" not in said or "warning" in said.lower() or "error" in said.lower():
        sys.exit(f"comfy node validate is not content:\n{said}")


def packed(comfy: str) -> zipfile.ZipFile:
    """The archive, read into this process's memory map and gone from the folder afterwards."""
    said = run(comfy, "--skip-prompt", "node", "pack")
    if not ARCHIVE.is_file():
        sys.exit(f"comfy node pack made no {ARCHIVE.name}:\n{said}")
    return zipfile.ZipFile(ARCHIVE)


def expected_names() -> set[str]:
    """The tracked files that a user of the nodes needs."""
    tracked = run("git", "ls-files").splitlines()
    wanted = {name for name in tracked if name in FILES or name.partition("/")[0] in FOLDERS}
    return wanted - TRAINING_ONLY


def check_names(archive: zipfile.ZipFile) -> None:
    """Exactly the files that a user of the nodes needs, and not too many bytes."""
    names = {name for name in archive.namelist() if not name.endswith("/")}
    expected = expected_names()
    missing_folders = FOLDERS - {name.partition("/")[0] for name in names}
    if names != expected or missing_folders:
        sys.exit(
            f"The archive lacks {sorted(expected - names)}, has no file of {sorted(missing_folders)}, "
            f"and should not hold {sorted(names - expected)}: see .comfyignore."
        )
    size = sum(entry.compress_size for entry in archive.infolist())
    if size > MOST_BYTES:
        sys.exit(f"The archive has {size:,} bytes; expected at most {MOST_BYTES:,}.")
    print(f"{len(names)} files, {size / 1e6:.1f} MB in the archive")


def check_loading(archive: zipfile.ZipFile) -> None:
    """What is in the archive is enough for the library and the bundled adapter."""
    with tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder)
        print(run(sys.executable, "-I", "-c", LOAD, str(Path(folder).resolve())).strip())


def main() -> None:
    comfy = sys.argv[1]
    check_validation(comfy)
    try:
        with packed(comfy) as archive:
            check_names(archive)
            check_loading(archive)
    finally:
        ARCHIVE.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
