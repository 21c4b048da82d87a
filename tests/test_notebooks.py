"Every notebook is a test: chapters run as they are, experiments at smoke scale through the batch; all are clean, executed and in step with the library."
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inr_precond import reproduce

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))
EXPERIMENTS = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))
LIMIT = {"nbs": 300_000, "experiments": 1_000_000}  # bytes of outputs a notebook


@pytest.fixture(scope="module")
def fresh():
    "Processes in which the imports that all chapters share are made, and nothing else: on Linux forked from one that made them once (some 4 s each); on a Mac, whose system libraries do not bear a fork, spawned."
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["torch", "torch._dynamo", "pandas", "matplotlib.pyplot", "scipy.stats", "nbdev.test"])
    return context


def run_chapter(path, log):
    "In a process of its own: its output goes to a file, its exit status says whether all cells ran."
    with open(log, "w") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    os.chdir(path.parent)
    from nbdev.test import test_nb
    done, _ = test_nb(path, skip_flags=["slow", "cuda"])
    sys.exit(not done)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter(path, fresh, tmp_path):
    "Every cell of a chapter runs, with every check in it; in a process of its own, so that no chapter lives on what another left behind."
    process = fresh.Process(target=run_chapter, args=(path, tmp_path / "log.txt"))
    process.start(); process.join()
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()[-8000:]


def check_floor(metrics):
    "Ratios without what the machine allows: the rates of its float32 products, and the floor they set, must agree with each other and with the sentence."
    rates, floor, ratios = metrics["products"], metrics["floor"], metrics["ratios"]
    assert rates and all(0 < rate["low"] <= rate["GFLOP/s"] <= rate["high"] for rate in rates.values())
    fastest = max(rates, key=lambda name: rates[name]["GFLOP/s"])
    assert floor["share of our gradient step"] == ratios[f"nine products on {fastest} / our gradient step"]["median"] and floor["bound on plain / ours"] == ratios["bound: plain gradient step / nine products"]["median"]
    assert all(f"{rate['GFLOP/s']:.3g} GFLOP/s on {name}" in floor["sentence"] for name, rate in rates.items()) and f"{floor['share of our gradient step']:.0%} of our gradient step" in floor["sentence"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiment_at_smoke_scale(path, tmp_path, monkeypatch, capsys):
    "An experiment runs through the batch with its results in a folder of ours, fills its record, and is not executed again where nothing has changed."
    monkeypatch.chdir(tmp_path)
    if os.environ.get("INR_PRECOND_DATA"): monkeypatch.setenv("INR_PRECOND_DATA", str((ROOT / os.environ["INR_PRECOND_DATA"]).resolve()))
    command = ["--scale", "smoke", "--only", path.stem, "--notebooks", str(path.parent), "--workers", "1"]
    status = reproduce.main(command)
    assert status == 0, capsys.readouterr()
    out = tmp_path / "results" / "smoke"
    record = json.loads((out / "experiments" / f"{path.stem}.json").read_text())
    assert record["title"] and record["paper"] and record["figures"] and record["metrics"]
    for figure in record["figures"]:
        assert figure["caption"] and (out / figure["file"]).is_file() and (out / figure["file"]).with_suffix(".pdf").is_file()
    assert all((out / table["file"]).is_file() for table in record["tables"])
    if path.stem == "bench_step": check_floor(record["metrics"])
    page = (out / "report.html").read_text()
    assert page.count("data:image/") >= len(record["figures"]) and 'class="missing">The ' not in page  # "Not run yet." has that class too
    state = reproduce.read_state(out, path.stem)
    assert reproduce.main(command) == 0
    assert reproduce.read_state(out, path.stem) == state, "it was executed again though nothing had changed"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the notebooks and the library, cleaned and exported anew; the working tree is left alone."
    copy = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "results")
    for name in ("nbs", "inr_precond"): shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, copy)
    code = "from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_clean(); nbdev_export()"
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, env=environment)
    return copy


@pytest.mark.parametrize("path", CHAPTERS + EXPERIMENTS, ids=lambda p: p.stem)
def test_notebook_is_clean(path, exported):
    "A notebook with execution counts or a machine's metadata makes every later change unreadable; `nbdev_clean` removes them."
    assert (exported / path.relative_to(ROOT)).read_text() == path.read_text(), f"run nbdev_clean --fname {path.relative_to(ROOT)}"


def test_library_is_what_the_notebooks_export(exported):
    "A module edited by hand, a notebook not exported, a module left over from a renamed notebook."
    modules = lambda root: {p.relative_to(root).as_posix(): p.read_text() for p in (root / "inr_precond").rglob("*.py")}
    ours, theirs = modules(ROOT), modules(exported)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == [], "run nbdev_export"


@pytest.mark.parametrize("path", CHAPTERS + EXPERIMENTS, ids=lambda p: p.stem)
def test_notebook_can_be_read(path):
    "A reader on a web page sees a title, a subtitle, outputs, and no traceback; the pictures are of modest size, the exported cells too."
    cells = json.loads(path.read_text())["cells"]
    source = lambda cell: "".join(cell["source"])
    first = source(cells[0])
    assert first.startswith("# ") and "\n> " in first
    code = [cell for cell in cells if cell["cell_type"] == "code" and source(cell).strip()]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs or not code, "it was committed without outputs"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum(len(json.dumps(output)) for output in outputs) <= LIMIT[path.parent.name]
    assert max((len(source(c).splitlines()) for c in code if "#| export" in source(c)), default=0) <= 60


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiment_has_the_common_parameters(path):
    "The batch sets these; an experiment without one of them would silently run at its default."
    accepted = reproduce.accepted_parameters(path)
    assert {"scale", "out"} <= set(accepted)


def test_lint():
    "Ruff finds nothing in the library, tests, scripts and notebooks."
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "inr_precond", "tests", "data_scripts", "nbs"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
