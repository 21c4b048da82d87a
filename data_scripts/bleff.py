"""Fetch scenes of BLEFF, the Blender forward-facing data set of NeRF-- (Wang et al., 2021).

    python data_scripts/bleff.py [--root DIR] [--scenes balls deer chair root roundtable] [--variant mix_rt/t000r000]

writes ROOT/BLEFF/VARIANT/SCENE/, with the scenes' folders named as in the archive (balls may be balls1): images/, gt_metas.json, train_ids.txt, val_ids.txt, poses_bounds.npy. A variant is a kind and a strength of
perturbation of the cameras; t000r000 has none. The paper shows the five scenes above and does not say which variant. The scenes are modified from blendswap.com; their terms are in the supplement of NeRF--.
ROOT is INR_PRECOND_DATA where it is set, else data/ in the working directory. A BLEFF.tar.gz that you put into ROOT or ROOT/BLEFF by hand is used, and a scene that is there already is kept.
"""
from __future__ import annotations

import argparse
import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import _archive
import _fetch

TOP = "BLEFF"
SCENES = ("balls", "deer", "chair", "root", "roundtable")
ARCHIVE = "BLEFF.tar.gz"
URL = f"https://www.robots.ox.ac.uk/~ryan/nerfmm2021/{ARCHIVE}"
PAGE = "https://github.com/ActiveVisionLab/nerfmm"
MARKS = ("gt_metas.json", "poses_bounds.npy")
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)


def check(path: Path) -> None:
    """ValueError where the file is no gzipped tar archive; damage further in shows when it is unpacked."""
    kind = _archive.kind_of(path)
    if kind != "gzip": raise ValueError(f"it is {kind}" if kind != "zip" else "it is a zip file")
    try:
        with tarfile.open(path, "r:gz") as tar:
            if tar.next() is None: raise ValueError("it is an empty archive")
    except DAMAGE as e: raise ValueError(f"it is damaged or incomplete: {e}") from e


def scene_pattern(scene: str) -> str:
    return rf"{re.escape(scene)}\d*"


def present(folder: Path, scene: str) -> Path | None:
    """The scene's folder, with cameras and pictures."""
    found = [p for p in sorted(folder.glob(f"{scene}*")) if re.fullmatch(scene_pattern(scene), p.name)] if folder.is_dir() else []
    return next((p for p in found if any((p / m).is_file() for m in MARKS) and (p / "images").is_dir() and any((p / "images").iterdir())), None)


def files(archive: Path, variant: str, scenes: list[str], seen: set[str]) -> Iterator[tuple[str, bytes]]:
    """(name behind the variant, content) of the scenes' files; `seen` collects the scenes of the archive, with their variants."""
    wanted = re.compile(rf"{re.escape(variant)}/((?:{'|'.join(map(scene_pattern, scenes))})/.+)")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                inner = _archive.below(member.name, TOP) if member.isfile() else None
                if inner is None: continue
                if inner.endswith(MARKS): seen.add(inner.rsplit("/", 1)[0])
                if match := wanted.fullmatch(inner): yield match[1], tar.extractfile(member).read()
    except DAMAGE as e: raise _fetch.Problem(f"{archive} is damaged or incomplete ({e}). Delete it and run this command again. Or: {_fetch.by_hand(PAGE, archive)}") from e


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=_fetch.default_root(), help="the data folder (default: %(default)s)")
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), metavar="NAME", help=f"scenes, without the number at their end (default: {' '.join(SCENES)})")
    parser.add_argument("--variant", default="mix_rt/t000r000", help="kind and strength of the cameras' perturbation (default: %(default)s)")
    parser.add_argument("--url", default=URL, help="fetch the archive from here instead, if the link has moved")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    top, variant = args.root / TOP, args.variant.strip("/")
    folder = top / variant
    if ".." in Path(variant).parts or any(not re.fullmatch(r"[\w-]+", s) for s in args.scenes): raise _fetch.Problem("--variant and --scenes are names of folders in the archive, such as mix_rt/t000r000 and balls.")
    scenes = [s for s in args.scenes if not present(folder, s)]
    for s in args.scenes:
        if s not in scenes: print(f"{present(folder, s)} is there already.")
    if not scenes: print("Nothing to do."); return
    archive = _archive.at_hand(args.root, top, ARCHIVE) or args.root / ARCHIVE
    digest = _fetch.fetch([args.url], archive, PAGE if args.url == URL else args.url, check, progress=not args.quiet)
    seen: set[str] = set()
    count = _archive.write(files(archive, variant, scenes, seen), folder, MARKS)
    lacking = [s for s in scenes if not present(folder, s)]
    if lacking: raise _fetch.Problem(f"{archive} has no {variant}/{lacking[0]} with cameras and images. It has {', '.join(sorted(seen)[:12]) or 'no scenes that are known here'}{', ...' if len(seen) > 12 else ''}. Choose with --variant and --scenes.")
    print(f"{archive} (SHA-256 {digest}): wrote {count} files of {', '.join(scenes)} to {folder}.")


if __name__ == "__main__":
    _fetch.run(main)
