"""docs/cli.md is what the parser says."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_true():
    page = runpy.run_path(str(ROOT / "tools" / "cli_docs.py"))["page"]()
    assert (ROOT / "docs" / "cli.md").read_text() == page, "run `python tools/cli_docs.py > docs/cli.md`"
