"""Build `build/types/expertwire`, a tree of links in which type checkers and editors find every module.

The installed package maps top-level folders to `expertwire.*` (`package-dir` in pyproject.toml), by code that only a
running interpreter follows. The links spell the same map out as files: a link for each mapped folder, beside a link
for each file of `expertwire/`. `make types` calls this program; run it again after a top-level folder or a file of
`expertwire/` was added.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "types"


def main() -> None:
    """Replace the tree of links."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "expertwire"
    package.mkdir(parents=True)
    for path in sorted((ROOT / "expertwire").iterdir()):
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name, folder in settings["package-dir"].items():
        if name != "expertwire":
            (package / name.removeprefix("expertwire.")).symlink_to(ROOT / folder)


if __name__ == "__main__":
    main()
