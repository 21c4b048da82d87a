"""Fetch the synthetic scenes of NeRF (Mildenhall et al., 2020), rendered with Blender: 100 views for training, 100 for validation, 200 for testing.

    python data_scripts/blender.py [--root DIR] [--scenes lego chair drums hotdog ficus materials mic ship] [--size 400]

writes ROOT/nerf_synthetic/SCENE/: train/, val/, test/ with RGBA pictures, reduced from 800 x 800 by area averages (of colours weighted by opacity) to the paper's 400 x 400, and transforms_*.json.
--size 800 keeps the originals. lego comes from the authors' example archive (with fern), the others from nerf_synthetic.zip (1.2 GB) on Google Drive. The paper shows lego, chair, drums, hotdog and ficus. Each scene has its own
Creative Commons terms (lego: CC-BY-NC); they stand in the archive's README. ROOT is INR_PRECOND_DATA where it is set, else data/ in the working directory.
An archive that you put into ROOT or ROOT/nerf_synthetic by hand is used, and a scene that is there already is kept.
"""
from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

import _archive
import _fetch
from llff import obtain

TOP = "nerf_synthetic"
SCENES = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")
FULL = "nerf_synthetic.zip"
FULL_ID = "18JxhpWD-4ZmuFKLzKlAw-w5PpzZxXOcG"
FULL_URLS = [_fetch.drive_url(FULL_ID), f"https://drive.google.com/uc?export=download&id={FULL_ID}"]
PARTS = ("train", "val", "test")


def present(folder: Path) -> bool:
    """Whether the scene is there: the cameras of all three parts, and a picture for each."""
    try:
        for part in PARTS:
            frames = json.loads((folder / f"transforms_{part}.json").read_text())["frames"]
            if not frames or not all((folder / f"{frame['file_path']}.png").is_file() for frame in frames): return False
    except (OSError, ValueError, KeyError, TypeError): return False
    return True


def reduced(content: bytes, size: int) -> bytes:
    """A PNG picture at `size` x `size` by area averages; colours count by their opacity, so that what is transparent does not tint an edge."""
    import numpy as np
    from PIL import Image
    with Image.open(io.BytesIO(content)) as image: rgba = np.asarray(image.convert("RGBA"), np.float64)
    if rgba.shape[:2] == (size, size): return content
    if rgba.shape[0] != rgba.shape[1] or rgba.shape[0] % size: raise _fetch.Problem(f"The pictures have {rgba.shape[0]} x {rgba.shape[1]} pixels, which cannot be reduced to {size} x {size} in whole steps. Choose --size among the divisors.")
    step = rgba.shape[0] // size
    mean = lambda x: x.reshape(size, step, size, step, -1).mean((1, 3))
    alpha = mean(rgba[..., 3:])
    colour = mean(rgba[..., :3] * rgba[..., 3:]) / np.where(alpha > 0, alpha, 1)
    out = io.BytesIO()
    Image.fromarray(np.floor(np.concatenate([colour, alpha], -1) + .5).clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def unpack(archive: Path, folder: Path, scenes: list[str], size: int) -> int:
    """Write the scenes' files; the cameras come last."""
    wanted = re.compile(rf"({'|'.join(scenes)})/((train|val|test)/r_\d+\.png|transforms_(train|val|test)\.json)").fullmatch  # depth and normal maps stay
    return _archive.write(((name, reduced(content, size) if name.endswith(".png") else content) for name, content in _archive.from_zip(archive, TOP, wanted)), folder, (".json",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=_fetch.default_root(), help="the data folder (default: %(default)s)")
    parser.add_argument("--scenes", nargs="+", default=["lego"], choices=SCENES, metavar="NAME", help=f"{', '.join(SCENES)} (default: lego)")
    parser.add_argument("--size", type=int, default=400, help="side of the pictures, a divisor of 800 (default: 400)")
    parser.add_argument("--url", help="fetch the archive from here instead, if the link has moved")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.size < 2: raise _fetch.Problem(f"--size is {args.size}: give the side of the pictures in pixels, a divisor of 800.")
    folder = args.root / TOP
    scenes = [s for s in args.scenes if not present(folder / s)]
    for s in args.scenes:
        if s not in scenes: print(f"{folder / s} is there already.")
    if not scenes: print("Nothing to do."); return
    archive, digest, page = obtain(args, TOP, scenes, "lego", FULL, FULL_URLS, "transforms_train.json")
    count = unpack(archive, folder, scenes, args.size)
    lacking = [s for s in scenes if not present(folder / s)]
    if lacking: raise _fetch.Problem(f"{archive} lacks cameras or pictures of {lacking[0]}. Delete it to fetch it again. {_fetch.by_hand(page, archive)}")
    print(f"{archive} (SHA-256 {digest}): wrote {count} files of {', '.join(scenes)} to {folder}.")


if __name__ == "__main__":
    _fetch.run(main)
