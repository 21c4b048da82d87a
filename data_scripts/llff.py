"""Fetch scenes of LLFF (Mildenhall et al., 2019) as the authors of NeRF packed them: photographs, cameras, and COLMAP's points.

    python data_scripts/llff.py [--root DIR] [--scenes fern flower fortress horns leaves orchids room trex] [--images 4 8]

writes ROOT/nerf_llff_data/SCENE/: poses_bounds.npy, images_4/ and images_8/ (a quarter and an eighth of the photographs' sides; 1 is the photographs themselves, in images/)
and sparse/. fern comes from the authors' example archive (with lego), the others from nerf_llff_data.zip (1.8 GB) on Google Drive. The paper shows fern, flower, orchids, fortress and leaves. Terms are not stated.
ROOT is INR_PRECOND_DATA where it is set, else data/ in the working directory. An archive that you put into ROOT or ROOT/nerf_llff_data by hand is used, and a scene that is there already is kept.
"""
from __future__ import annotations

import argparse
import re
from pathlib import Path

import _archive
import _fetch

TOP = "nerf_llff_data"
SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")
EXAMPLE = "nerf_example_data.zip"  # fern and lego
EXAMPLE_URLS = [f"https://people.eecs.berkeley.edu/~bmild/nerf/{EXAMPLE}", f"https://cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf/{EXAMPLE}"]
FULL = "nerf_llff_data.zip"
FULL_ID = "16VnMcF1KJYxN9QId6TClMsZRahHNMW5g"
FULL_URLS = [_fetch.drive_url(FULL_ID), f"https://drive.google.com/uc?export=download&id={FULL_ID}"]
DRIVE = "https://drive.google.com/drive/folders/128yBriW1IG_3NJ5Rp7APSTZsJqdJdfc1"


def images(factor: int) -> str:
    return "images" if factor == 1 else f"images_{factor}"


def present(folder: Path, factors: list[int]) -> bool:
    """Whether the scene is there: cameras, and as many pictures in each folder asked for."""
    import numpy as np
    try: count = len(np.load(folder / "poses_bounds.npy"))
    except (OSError, ValueError, EOFError): return False
    there = lambda f: sum(p.suffix.lower() in (".png", ".jpg", ".jpeg") for p in (folder / images(f)).glob("[!.]*")) if (folder / images(f)).is_dir() else 0
    return all(there(f) == count for f in factors)


def unpack(archive: Path, folder: Path, scenes: list[str], factors: list[int]) -> int:
    """Write the scenes' files; the cameras come last."""
    pictures = "|".join(images(f) for f in factors)
    wanted = re.compile(rf"({'|'.join(scenes)})/(poses_bounds\.npy|({pictures})/[^/]+\.(png|jpe?g)|sparse/.+)", re.I).fullmatch
    return _archive.write(_archive.from_zip(archive, TOP, wanted), folder, ("poses_bounds.npy",))


def obtain(args: argparse.Namespace, top: str, scenes: list[str], alone: str, full: str, urls: list[str], mark: str) -> tuple[Path, str, str]:
    """The archive with these scenes, its SHA-256, and where it comes from. Fetched where it is not at hand: the small example if `alone` is all that is wanted."""
    small = scenes == [alone]
    archive = _archive.at_hand(args.root, args.root / top, *([EXAMPLE] if small else []), full) or args.root / (EXAMPLE if small else full)
    urls, page = (EXAMPLE_URLS, EXAMPLE_URLS[0]) if archive.name == EXAMPLE else (urls, DRIVE)
    return archive, _fetch.fetch([args.url] if args.url else urls, archive, args.url or page, _archive.has_scenes(top, mark, scenes), progress=not args.quiet), page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=_fetch.default_root(), help="the data folder (default: %(default)s)")
    parser.add_argument("--scenes", nargs="+", default=["fern"], choices=SCENES, metavar="NAME", help=f"{', '.join(SCENES)} (default: fern)")
    parser.add_argument("--images", type=int, nargs="+", default=[4, 8], choices=(1, 2, 4, 8), metavar="N", help="factors by which the photographs are reduced (default: 4 8)")
    parser.add_argument("--url", help="fetch the archive from here instead, if the link has moved")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    folder = args.root / TOP
    scenes = [s for s in args.scenes if not present(folder / s, args.images)]
    for s in args.scenes:
        if s not in scenes: print(f"{folder / s} is there already.")
    if not scenes: print("Nothing to do."); return
    archive, digest, page = obtain(args, TOP, scenes, "fern", FULL, FULL_URLS, "poses_bounds.npy")
    count = unpack(archive, folder, scenes, args.images)
    lacking = [s for s in scenes if not present(folder / s, args.images)]
    if lacking:
        raise _fetch.Problem(f"{archive} has not as many pictures as cameras of {lacking[0]} in {' and '.join(map(images, args.images))}. Choose other --images, or delete the archive to fetch it again. {_fetch.by_hand(page, archive)}")
    print(f"{archive} (SHA-256 {digest}): wrote {count} files of {', '.join(scenes)} to {folder}.")


if __name__ == "__main__":
    _fetch.run(main)
