"The package as a whole: what it needs to be imported, what it promises, and what may not be in the repository."
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
                 for p in (ROOT / "inr_precond").rglob("*.py") if p.name != "_modidx.py")
DEVELOPMENT = ["jupyter", "jupyter_core", "jupyter_client", "IPython", "ipykernel", "ipywidgets", "nbdev", "execnb", "fastcore", "nbformat", "nbconvert", "nbclient",
               "papermill", "psutil", "pytest", "hypothesis", "jupytext", "tensorboard"]
PUBLIC = {
    "inr": "INR ReLU Sine Gaussian Wavelet GaborLayer PositionalEncoding",
    "curvature": "Problem hvp ggn_vp hessian hutchinson_diagonal equilibration value_grad_hvp condition_number precondition",
    "conditioning": "condition_number precondition spectrum effective_rank gej_bound",
    "density": "zero_fraction",
    "optim": "SGD Adam GaussNewton ESGD AdaHessian Shampoo KFAC LBFGS",
    "recipes": "recipe recipes",
    "data.images": "load_image default_image image_names data_root ImageData",
    "data.shapes": "Shape load_shape default_shape shape_names inside sample_points Sampling PointSet extract_shape save_mesh render compare turntable",
    "data.scenes": "Scene load_scene default_scene scene_names look_at sphere_poses visual_hull",
    "metrics": "mse psnr ssim lpips iou surface_distances",
    "render": "camera_rays view_rays project NDC sample_depths composite NeRFField RadianceField render_view orbit spiral write_video",
    "train": "Trainer ImageTask configure_process",
    "runs": "RunConfig run sweep Run active record recorded",
    "figures": "Experiment",
    "claims": "claim judge evidence from_rows collect",
    "tuning": "Plan tune race_configs",
    "report": "write_report",
    "reproduce": "main",
}


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("needs a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_import_needs_no_development_package():
    "A user of the library has neither Jupyter nor nbdev: an import of them at module level would break every user."
    blocker = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {DEVELOPMENT!r}: raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib
for module in {MODULES!r}: importlib.import_module(module)
print("loaded", len({MODULES!r}))
"""
    done = subprocess.run([sys.executable, "-c", blocker], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded", str(len(MODULES))]


def test_training_imports_no_compiler(tmp_path):
    "torch.optim's marks for torch.compile, and nn.utils.skip_init, import the compiler and sympy: seconds in each of a sweep's processes, for nothing."
    code = f"""
import sys
from inr_precond import runs
for recipe in ("adam/released", "esgd/mended", "kfac/mended", "lbfgs/torch"):
    runs.run(runs.RunConfig(recipe=recipe, image="astronaut", image_size=16, hidden_features=16, steps=2, batch_size=32, evaluations=2), {str(tmp_path)!r})
print([m for m in ("torch._dynamo", "sympy", "skimage.io") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[]"], done.stdout + done.stderr


def test_marks_for_the_compiler_are_heeded_where_it_is(monkeypatch):
    "The way round the marks must end where torch.compile is in use: there the marked method is called, elsewhere the plain one, and both are torch's."
    from inr_precond.optim.base import _unmarked
    def plain(*args, **kwargs): return "plain", args, kwargs
    def marked(*args, **kwargs): return "marked", args, kwargs
    marked.__wrapped__ = plain
    monkeypatch.setitem(sys.modules, "torch._dynamo", sys)
    assert _unmarked(marked)(1, a=2) == ("marked", (1,), {"a": 2})
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert _unmarked(marked)(1, a=2) == ("plain", (1,), {"a": 2})
    assert _unmarked(plain)(1)[0] == "plain", "a torch without marks"


def test_import_loads_nothing_heavy():
    "Pictures, tables and LPIPS are loaded where they are used: at import they would cost every user seconds."
    heavy = ["matplotlib", "pandas", "skimage", "lpips", "torchvision", "trimesh", "igl", "embreex", "tensorboard"]
    code = f"import sys, importlib\nfor m in {MODULES!r}: importlib.import_module(m)\nprint([h for h in {heavy!r} if h in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_import_changes_no_settings():
    "Threads and the allocator are the business of the program, not of an import."
    code = f"import torch\na = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()\nimport importlib\nfor m in {MODULES!r}: importlib.import_module(m)\n" \
           "assert a == (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_exist(module):
    "The names that design.md and the README promise."
    loaded = importlib.import_module(f"inr_precond.{module}")
    assert [name for name in PUBLIC[module].split() if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", [m for m in MODULES if (ROOT / (m.replace(".", "/") + ".py")).is_file()])  # not the packages' __init__
def test_module_comes_from_a_notebook(module):
    "A module that no notebook exports is a leftover of a renamed one, or was edited by hand."
    path = ROOT / (module.replace(".", "/") + ".py")
    found = re.search(r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+\.ipynb)\.", path.read_text(), re.M)
    assert found, f"{module} has no AUTOGENERATED header"
    assert (path.parent / found[1]).resolve().is_file(), f"{module} names {found[1]}, which does not exist"


MACHINE_PATH = re.compile(r"(?<![\w.:/<-])/(?:home|root|work|farm|tmp|mnt|Users)/[\w.-]+")


def test_no_machine_path():
    "A path of somebody's machine in a tracked file tells a reader nothing and works nowhere else."
    found = []
    for path in tracked():
        match = MACHINE_PATH.search(path.read_text(errors="ignore"))
        if match: found.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert found == []


def test_no_large_file():
    "A clone stays small: data and results are not tracked, notebooks hold modest pictures."
    assert [f"{p.relative_to(ROOT)}: {p.stat().st_size / 1e6:.1f} MB" for p in tracked() if p.stat().st_size > 3e6] == []


def test_versions_agree():
    "The version stands in three places; a release that changes one of them forgets the others."
    import inr_precond
    assert f"version = {inr_precond.__version__}\n" in (ROOT / "settings.ini").read_text()
    assert f"version: {inr_precond.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    return {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}


@pytest.mark.parametrize("given, known", [("SEEDS=2", True), ("ONLY=fig05*", True), ("seeds=2", False), ("OUT=elsewhere", False)])
def test_make_refuses_a_name_that_nothing_reads(given, known):
    "Catches `make reproduce seeds=2`, which runs for half an hour with the default."
    import os
    made = subprocess.run(["make", "-n", "help", given], cwd=ROOT, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")})
    assert (made.returncode == 0) == known
    assert known or (f"unknown name on the command line: {given.split('=')[0]};" in made.stderr and "SEEDS" in made.stderr)


def test_every_requirement_is_pinned():
    "A requirement without a pin in constraints.txt makes tomorrow's environment differ from today's."
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {normal(re.match(r"[\w.-]+", r)[0]) for r in wanted} - {"inr-precond"}
    assert names - pins() == set()
    assert "+" not in (ROOT / "constraints.txt").read_text() and "@" not in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_the_requirements_require_is_pinned(python):
    "A package that another one requires on one Python alone (papermill wants aiohttp on 3.12) is installed unpinned there, and nobody sees it on the others."
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    linux = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    todo, seen = [("inr-precond", "dev")], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen: continue
        seen.add((name, extra))
        try: wanted = [Requirement(r) for r in requires(name) or []]
        except PackageNotFoundError: continue  # of another Python: its own requirements are known only there
        for r in wanted:
            if r.marker is None or r.marker.evaluate({**linux, "extra": extra}):
                todo += [(normal(r.name), e) for e in ("", *r.extras)]
    cuda = re.compile(r"(nvidia|cuda)-|triton$|inr-precond$")  # torch's CUDA build brings its own
    assert len(seen) > 100 and sorted({name for name, _ in seen if not cuda.match(name)} - pins()) == []
