"""The picture of TensorBoard in README.md: the first screen over the tour's runs, as a browser shows it.

    python scripts/screenshot.py                                  # runs the tour, then writes docs/tensorboard.png
    python scripts/screenshot.py FOLDER --page text --output text.png

Needs Chromium. TensorBoard runs on loopback, and nothing else is asked for.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from browser import Browser, find
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "tensorboard.png"
# What is on each page when it is there, of a sweep.
PAGES = {
    "timeseries": ("at_a_glance", "Pin cards"),
    "custom_scalars": ("Which run was hurt, and by how much", "loss of safe and unsafe runs"),
    "hparams": ("verdict, 0 upheld to 4 broken",),
    "images": ("at_a_glance/runs", "gradients/cosines"),
    "text": ("at_a_glance/runs_in_words", "runs were hurt"),
    "histograms": ("gradients/norm_histogram",),
}
# A page draws on after its words are there.
DRAWING_SECONDS = 4
# TensorBoard asks TensorFlow, where there is one, for what it can do as well without.
SERVER = (
    "import sys, types; sys.modules['tensorboard.compat.notf'] = types.ModuleType('notf'); "
    "from tensorboard.main import run_main; run_main()"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of a sweep; without one the tour is run")
    parser.add_argument("--page", choices=PAGES, default="timeseries")
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--size", default="1600x1000", help="of the window, in pixels (%(default)s)")
    asked = parser.parse_args()
    path = find()
    if path is None:
        print("screenshot: no chromium, chromium-browser or google-chrome on PATH.", file=sys.stderr)
        return 2
    wide, high = (int(part) for part in asked.size.split("x"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or tour(Path(temporary))
        with serve(folder) as address, Browser(path, wide, high, seconds=240) as browser:
            browser.open(f"{address}#{asked.page}")
            browser.wait_for(*PAGES[asked.page])
            time.sleep(DRAWING_SECONDS)
            picture = Image.open(io.BytesIO(browser.picture()))
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(asked.output, optimize=True)
    print(f"{asked.output}: {asked.output.stat().st_size / 1000:.0f} kB")
    return 0


def tour(folder: Path) -> Path:
    command = [sys.executable, "-m", "trainer", "-m", "experiment=glob(tour_*)", f"hydra.sweep.dir={folder / 'tour'}"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder / "tour"


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """TensorBoard over a folder; its address."""
    options = ("--logdir", str(folder), "--host", "127.0.0.1", "--port", "0")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield found[0]
                return
        raise RuntimeError("TensorBoard ended before it had an address")
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()


if __name__ == "__main__":
    sys.exit(main())
