"""Fetch the paper's images: 512 x 512 crops of DIV2K, packed by the authors of Fourier Features (Tancik et al., 2020).

    python data_scripts/div2k.py [--root DIR] [--images 14 2 5 ...]

writes ROOT/div2k/test_NN.png (item 14 of the packed file's `test_data` is the paper's lion). DIV2K is for academic research only:
https://data.vision.ee.ethz.ch/cvl/DIV2K/ . ROOT is INR_PRECOND_DATA where it is set, else data/ in the working directory.
"""
from __future__ import annotations

import argparse
import os
import zipfile
import zlib
from pathlib import Path

import _fetch

FILE_ID = "1TtwlEDArhOMoH18aUyjIMSZ3WODFmUab"
PAGE = f"https://drive.google.com/uc?id={FILE_ID}"
URLS = [_fetch.drive_url(FILE_ID), f"https://drive.google.com/uc?export=download&id={FILE_ID}"]
IMAGES = [14, 2, 5, 7, 9, 11]


def crops(path: Path):
    """test_data of the packed file as (n, H, W, 3) uint8; ValueError says what is wrong."""
    import numpy as np
    with open(path, "rb") as f: start = f.read(512)
    if not start.startswith(b"PK"):
        raise ValueError("it is a web page, as Google Drive sends in place of a file" if b"<html" in start.lower() or b"<!doctype" in start.lower() else "it is no .npz archive")
    try:
        with np.load(path) as packed: data = packed["test_data"]
    except KeyError as e: raise ValueError("it has no test_data") from e
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as e: raise ValueError(f"its test_data cannot be read, it is damaged or incomplete: {e}") from e
    if data.ndim != 4 or data.shape[-1] != 3 or not len(data): raise ValueError(f"its test_data has shape {data.shape}, not (images, rows, columns, 3)")
    if data.dtype != np.uint8:
        if not ((data >= 0) & (data <= 255) & (data == np.rint(data))).all(): raise ValueError("its test_data are not whole numbers from 0 to 255")
        data = data.astype(np.uint8)
    return data


def is_image(path: Path) -> bool:
    """Whether the file decodes as an image."""
    from PIL import Image
    try:
        with Image.open(path) as image: image.load()
    except (OSError, SyntaxError): return False
    return True


def unpack(packed: Path, folder: Path, items: list[int]) -> list[Path]:
    """Write the items that are missing or differ as PNG; each file appears whole or not at all."""
    import numpy as np
    from PIL import Image
    data, written = crops(packed), []
    for item in items:
        if not 0 <= item < len(data): raise _fetch.Problem(f"There is no image {item}: {packed} has images 0 to {len(data) - 1}. Choose among these with --images.")
        path = folder / f"test_{item:02d}.png"
        if path.is_file() and is_image(path) and np.array_equal(np.asarray(Image.open(path)), data[item]): continue
        part = path.with_name(path.name + ".part")
        Image.fromarray(data[item]).save(part, format="PNG")
        os.replace(part, path)
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=_fetch.default_root(), help="the data folder (default: %(default)s)")
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, metavar="N", help="items of test_data (default: 14 2 5 7 9 11)")
    parser.add_argument("--url", help="fetch from here instead, if the link has moved")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    folder = args.root / "div2k"
    packed = next((p for p in (folder / "data_div2k.npz", args.root / "data_div2k.npz") if p.is_file()), folder / "data_div2k.npz")
    if not packed.is_file() and all(is_image(folder / f"test_{i:02d}.png") for i in args.images):
        print(f"{len(args.images)} images are in {folder} already; nothing to do.")
        return
    digest = _fetch.fetch([args.url] if args.url else URLS, packed, args.url or PAGE, crops, progress=not args.quiet)
    folder.mkdir(parents=True, exist_ok=True)
    written = unpack(packed, folder, args.images)
    print(f"{packed} (SHA-256 {digest}): wrote {len(written)} of {len(args.images)} images to {folder}, the others were there.")


if __name__ == "__main__":
    _fetch.run(main)
