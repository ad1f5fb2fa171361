"""Makes the site's pictures again: follows the pages with pictures, and copies these to docs/assets.

    python scripts/site/gallery.py            # all; takes some minutes
    python scripts/site/gallery.py gallery.md # those of one page

Pages are followed as the tests follow them (tests/site/test_pages.py): a picture is what its page says.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "docs" / "assets"
WIDEST = 1100
"""Pixels; wider pictures are shrunk, so that a page loads quickly."""
DEMO = "index.md"
PICTURES: dict[str, dict[str, str]] = {
    DEMO: {"runs/demo/curves.png": "demo.png"},
    "gallery.md": {
        "runs/fedmr/figures/curves.png": "gallery/curves.png",
        "runs/fedmr/figures/clients.png": "gallery/clients.png",
        "runs/fedavg/figures/partition.png": "gallery/partition.png",
        "peeled/by_layer.png": "gallery/peel_layers.png",
        "peeled/relative_change.png": "gallery/peel_change.png",
        "inertia/heat_map.png": "gallery/inertia.png",
        "flat/random_line.png": "gallery/landscape.png",
    },
    "tutorials/paper-figure.md": {"runs/figure1/curves.png": "gallery/figure1.png"},
    "tutorials/your-diagnostic.md": {"drift.png": "gallery/drift.png"},
    "tutorials/your-model.md": {"by_layer.png": "gallery/peel_by_layer.png"},
}
"""Page -> what it draws, in its folder -> where that goes below `docs/assets/`."""


def follow(page: str, follower: dict[str, Any]) -> None:
    """Executes a page's blocks in the working directory."""
    if page == DEMO:  # whose command is the demonstration, which the tests run elsewhere
        follower["command"](["fedjax-sim", "sweep", str(ROOT / "experiments" / "demo.yaml"), "--together"])
        return
    scope: dict[str, Any] = {"__name__": "__main__"}
    for language, title, code in follower["blocks"](ROOT / "docs" / page):
        if title:
            Path(title).write_text(code)
        elif language == "python":
            exec(compile(code, page, "exec"), scope)
        elif language == "bash":
            for words in follower["commands_of"](code):
                follower["command"](words)


def keep(picture: Path, target: Path) -> None:
    """A picture in at most 256 colours and `WIDEST` pixels, which is a fourth of the bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(picture) as image:
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    if flat.width > WIDEST:
        flat = flat.resize((WIDEST, round(flat.height * WIDEST / flat.width)), Image.Resampling.LANCZOS)
    flat.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {flat.width} × {flat.height}, {target.stat().st_size // 1024} KiB")


def main(pages: list[str]) -> None:
    follower = runpy.run_path(str(ROOT / "tests" / "site" / "test_pages.py"))
    home = Path.cwd()
    for page in pages or PICTURES:
        known = set(sys.modules)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            sys.path.insert(0, folder)
            try:
                follow(page, follower)
                for drawn, target in PICTURES[page].items():
                    keep(Path(folder, drawn), ASSETS / target)
            finally:
                sys.path.remove(folder)
                os.chdir(home)
                for name in set(sys.modules) - known:
                    if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                        del sys.modules[name]


if __name__ == "__main__":
    main(sys.argv[1:])
