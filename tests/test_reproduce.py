"The batch: what it executes and what not, what it says, and what it leaves behind when it is stopped."
import errno
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from inr_precond import reproduce

PARAMETERS = "scale = 'smoke'\nseeds = None\nimage = None\nout = '.'\nworkers = None\n"
FINISH = """
import json, pathlib
def finish(name, runs=(), data=(), metrics={"answer": 42}):
    folder = pathlib.Path(out) / "experiments"; folder.mkdir(parents=True, exist_ok=True)
    record = {"name": name, "title": f"Title of {name}", "paper": "P.", "scale": scale, "note": "", "figures": [], "tables": [],
              "metrics": metrics, "runs": list(runs), "data": list(data), "verdict": None}
    (folder / f"{name}.json").write_text(json.dumps(record))
"""
TRAINS = """
from inr_precond import runs
config = runs.RunConfig(image="astronaut", image_size=32, hidden_features=32, num_layers=3, batch_size=64, steps=STEPS, seed=0)
run = runs.sweep([config], store=pathlib.Path(out) / "runs", workers=1)[0]
finish("slow", [{"key": run.key, "label": "a run", "status": run.status, "metrics_sha256": hashlib.sha256((run.folder / "metrics.json").read_bytes()).hexdigest()}])
"""


def notebook(folder, name, code, parameters=PARAMETERS):
    cell = nbformat.v4.new_code_cell(parameters); cell.metadata["tags"] = ["parameters"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {name}"), cell, *(nbformat.v4.new_code_cell(c) for c in (FINISH, code))])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder / f"{name}.ipynb")


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty working folder; `nbs/` takes the notebooks."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INR_PRECOND_DATA", raising=False)
    return tmp_path


def batch(*arguments): return reproduce.main(["--notebooks", "nbs", "--scale", "smoke", *arguments])


def state(name): return reproduce.read_state("results/smoke", name)


def test_failures_do_not_stop_the_others(place, capsys):
    "An exception, a crash of the kernel and a notebook that forgets its record: each is named, the good ones run, the status is 1."
    notebook(place / "nbs", "a_raises", "def f(): raise ValueError('sigma is -1;\\n give a positive number')\nf()")
    notebook(place / "nbs", "b_crashes", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    notebook(place / "nbs", "c_forgets", "1 + 1")
    notebook(place / "nbs", "d_works", "finish('d_works')")
    assert batch() == 1
    said, page = capsys.readouterr(), Path("results/smoke/report.html").read_text()
    assert "ValueError: sigma is -1; give a positive number (In [4])" in said.out and "Experiment.finish" in said.out and "3 of 4 notebooks failed" in said.err
    assert {n: state(n)["status"] for n in ("a_raises", "b_crashes", "c_forgets", "d_works")} == {"a_raises": "failed", "b_crashes": "failed", "c_forgets": "failed", "d_works": "ran"}
    assert "Kernel died" in state("b_crashes")["error"]
    assert "sigma is -1" in page and "Title of d_works" in page and page.count('class="badge failed"') == 3
    metrics = json.loads(Path("results/smoke/metrics.json").read_text())
    assert metrics["experiments"]["d_works"]["metrics"] == {"answer": 42} and metrics["experiments"]["a_raises"]["error"]
    assert metrics["provenance"]["versions"]["torch"] and "git_commit" in metrics["provenance"]
    assert Path("results/smoke/metrics.csv").read_text() == "experiment,metric,value\nd_works,answer,42\n"


CLAIM = """
differences = [1., 1.2, .9, 1.1, .8]
finish("relu", metrics={"answer": 42, "claims": {"relu-pe-image": {"printed": {"differences": differences, "margin": -5., "unit": "dB", "pairs": [["lion", seed] for seed in range(5)]}}, "of-another-time": {}}})
"""


def test_verdicts(place, capsys):
    "The table of verdicts in the terminal, before the report's line; all that a machine needs in claims.json; the same in the report; no evidence in metrics.csv. At smoke no claim on runs is decided."
    notebook(place / "nbs", "relu", CLAIM); notebook(place / "nbs", "image_relu_pe", "raise SystemError('x')")
    assert batch() == 1
    lines = capsys.readouterr().out.strip().splitlines()
    table = lines[lines.index("Claims"):]
    assert lines[-1].startswith("Report:") and any("relu-pe-image" in line and "undecided" in line for line in table) and any("not registered: of-another-time" in line for line in table)
    assert any("bound" in line and "corrected" in line and " reproduced" in line for line in table) and any(line.strip().startswith("not run:") and "conditioning" in line for line in table)
    found = json.loads(Path("results/smoke/claims.json").read_text())
    rows = {(row["claim"], row["form"]): row for row in found["claims"]}
    relu, bound, other = rows["relu-pe-image", "printed"], rows["bound", "corrected"], rows["relu-pe-image", "corrected"]
    assert (relu["verdict"], relu["experiment"], relu["n"], relu["margin"], relu["scale"], relu["signals"]) == ("undecided at this scale", "relu", 5, .3, "smoke", ["lion"]) and "smoke" in relu["reason"]
    assert relu["provenance"]["versions"]["torch"] and bound["provenance"]["versions"]["torch"] and (other["verdict"], other["reason"]) == ("not run", "image_relu_pe failed") and found["unregistered"] == ["of-another-time"]
    page = Path("results/smoke/report.html").read_text()
    assert page.index('id="claims"') < page.index('class="overview"') and 'badge not-run">– not run' in page and 'href="#relu"' in page
    assert Path("results/smoke/metrics.csv").read_text() == "experiment,metric,value\nrelu,answer,42\n"
    rerun = reproduce.judge(reproduce.prepare(reproduce.arguments(["--notebooks", "nbs", "--scale", "smoke"]))[0], "results/smoke", "laptop", {})
    assert next(r for r in rerun if r["claim"] == "relu-pe-image")["verdict"] == "reproduced"  # the same evidence at a scale that decides


def test_recorded_runs_do_not_count_as_changed(place, monkeypatch):
    "A run read from the repository's records has no folder in the results: its record is hashed instead. Catches a notebook that is executed again in every batch."
    import hashlib

    from inr_precond import runs
    (place / "kept").mkdir(); (place / "kept" / "r.json").write_text("x")
    monkeypatch.setattr(runs, "RECORDS", place / "kept")
    record = {"runs": [{"key": "r", "recorded": True}, {"key": "s", "recorded": False}]}
    assert reproduce.run_hashes(place / "results", record) == {"r": hashlib.sha256(b"x").hexdigest(), "s": None}


def test_new_records_are_a_change(place, monkeypatch):
    "A record that is added, altered or removed, for an experiment that draws records and for no other. Catches a report that shows the verdict of fewer recorded runs than there are."
    from inr_precond import runs
    monkeypatch.setattr(runs, "RECORDS", place / "kept")
    notebook(place / "nbs", "draws", "finish('draws', metrics={'recorded_claims': {}})"); notebook(place / "nbs", "other", "finish('other')")
    assert batch() == 0
    (place / "kept").mkdir()
    why = lambda name: reproduce.why(place / "nbs" / f"{name}.ipynb", {"scale": "smoke", "out": "../results/smoke"}, Path("results/smoke"))
    assert why("draws") == why("other") == ""
    (place / "kept" / "r.json").write_text("x")
    assert why("draws") == "the records changed" and why("other") == ""
    assert batch() == 0 and why("draws") == ""
    (place / "kept" / "r.json").write_text("y"); assert why("draws") == "the records changed"
    (place / "kept" / "r.json").write_text("x"); assert why("draws") == ""
    (place / "kept" / "r.json").unlink(); assert why("draws") == "the records changed"


def test_recorded_reaches_the_notebooks_as_a_full_path(monkeypatch, tmp_path):
    "A relative path means another folder in the notebook's process; and a batch of records must not pass for one that was trained."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INR_PRECOND_RECORDS", raising=False)
    assert reproduce.records_setting() == {}
    notebook = Path(__file__).parents[1] / "nbs" / "experiments" / "bench_step.ipynb"
    trained = reproduce.before_execution(notebook, {})
    monkeypatch.setenv("INR_PRECOND_RECORDS", "records")
    assert reproduce.records_setting() == {"INR_PRECOND_RECORDS": str(tmp_path / "records")} and reproduce._recorded_file("k") == tmp_path / "records/k.json"
    assert reproduce.before_execution(notebook, {}) != trained


def test_recorded_says_what_it_has_to_train(place, monkeypatch, capsys):
    "Without data `--recorded` trained the embedded scene for hours, of which there is no record, and did not say why."
    from inr_precond import runs
    monkeypatch.setenv("INR_PRECOND_RECORDS", "")                                       # the command sets it; this puts it back
    monkeypatch.setattr(runs, "RECORDS", place / "kept")
    (place / "kept").mkdir(); (place / "kept" / "a.json").write_text(json.dumps({"resolved": {"image": "astronaut"}}))
    (place / "kept" / "b.json").write_text(json.dumps({"resolved": {"scene": "lego"}}))
    notebook(place / "nbs", "picture", "finish('picture')"); notebook(place / "nbs", "scenes", "finish('scenes')", PARAMETERS.replace("image = None", "scene = None"))
    assert batch("--recorded") == 0
    said = capsys.readouterr().out
    assert "No record has the scene 'knot', so its runs are trained (scenes)." in said and "INR_PRECOND_DATA" in said and "'astronaut'" not in said


def test_only_what_changed_is_executed_again(place, monkeypatch, capsys):
    "Source, parameters, library, data, runs and outputs: each change is seen and named; without one nothing is executed."
    notebook(place / "nbs", "a", "finish('a', [{'key': 'r', 'metrics_sha256': __import__('hashlib').sha256(b'x').hexdigest()}], [{'name': 'astronaut', 'sha256': '', 'source': ''}])")
    Path("results/smoke/runs/r").mkdir(parents=True); Path("results/smoke/runs/r/metrics.json").write_text("x")
    assert batch() == 0
    first, executed = state("a"), Path("results/smoke/notebooks/a.ipynb").read_bytes()
    assert batch() == 0 and state("a") == first and "unchanged" in capsys.readouterr().out
    path, out = Path("nbs/a.ipynb"), Path("results/smoke")
    parameters = {"scale": "smoke", "out": "../results/smoke"}
    why = lambda **changes: reproduce.why(path, {**parameters, **changes}, out)
    assert why() == "" and why(out="elsewhere", workers=3) == "" and why(seeds=2) == "the parameters changed"
    source = path.read_text()
    path.write_text(source.replace("# a", "# b")); assert why() == "the notebook changed"
    path.write_text(source); assert why() == ""
    with monkeypatch.context() as m: m.setattr(reproduce, "library_hash", lambda: "other"); assert why() == "the library changed"
    with monkeypatch.context() as m: m.setattr(reproduce, "data_hashes", lambda names: {"astronaut": "other"}); assert why() == "the data changed"
    with monkeypatch.context() as m: m.setattr("inr_precond.data.images.default_image", lambda: "lion"); assert why() == "the data changed"
    (out / "runs/r/metrics.json").write_text("y"); assert why() == "its runs changed"
    (out / "runs/r/metrics.json").write_text("x"); assert why() == ""
    (out / "notebooks/a.ipynb").unlink(); assert why() == "notebooks/a.ipynb is missing"
    (out / "notebooks/a.ipynb").write_bytes(executed); (out / "experiments/a.json").write_text("{"); assert why() == "it was interrupted"
    (out / "state/a.json").write_text("{"); assert why() == "it was interrupted"  # its first execution began, and left no state
    (out / "notebooks/a.ipynb").unlink(); assert why() == "not run before"
    assert batch("-p", "seeds=2") == 0 and state("a")["parts"]["parameters"] != first["parts"]["parameters"]
    assert "seeds = 2" in Path("results/smoke/notebooks/a.ipynb").read_text()


def test_a_file_that_a_parameter_names_is_watched(place):
    "A picture, a mesh or a scene given by path is recorded under its stem. Catches results that stay when the file behind them changed."
    cube = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"
    Path("mine.obj").write_text(cube)
    notebook(place / "nbs", "a", "finish('a', data=[{'name': 'mine', 'sha256': '', 'source': 'a file'}])", PARAMETERS + "shape = None\n")
    why = lambda: reproduce.why(Path("nbs/a.ipynb"), {"scale": "smoke", "out": "../results/smoke", "shape": str(Path("mine.obj").resolve())}, Path("results/smoke"))
    assert batch("-p", "shape=mine.obj") == 0 and why() == ""
    Path("mine.obj").write_text(cube.replace("v 0 0 1", "v 0 0 2")); assert why() == "the data changed"
    assert batch("-p", "shape=mine.obj") == 0 and why() == ""
    two = f"knot, {Path('mine.obj').resolve()}"  # as scenes are given
    assert reproduce.given_paths({"scene": two, "image": "astronaut", "steps": 3}) == [str(Path("mine.obj").resolve())]


def test_a_notebook_that_was_not_selected_is_not_called_unchanged(place):
    "Catches a report that vouches for results which nobody compared with the notebook as it is now."
    notebook(place / "nbs", "a", "finish('a')"); notebook(place / "nbs", "b", "finish('b')")
    assert batch() == 0
    Path("nbs/b.ipynb").write_text(Path("nbs/b.ipynb").read_text().replace("# b", "# c"))
    assert batch("--only", "a") == 0
    found = json.loads(Path("results/smoke/metrics.json").read_text())["experiments"]
    assert (found["a"]["status"], found["b"]["status"]) == ("unchanged", "earlier") and found["b"]["finished"]


def test_times_are_those_of_the_end(place, monkeypatch):
    "The report's 'end' of a notebook and its 'Written' were the moment at which the batch, or the notebook, had begun."
    clock = iter(range(10_000))
    monkeypatch.setattr(reproduce, "now", lambda: f"{next(clock):05}")
    notebook(place / "nbs", "a", "finish('a')"); notebook(place / "nbs", "b", "finish('b')")
    assert batch() == 0
    found = json.loads(Path("results/smoke/metrics.json").read_text())
    ends = {name: int(entry["finished"]) for name, entry in found["experiments"].items()}
    began = {name: int(entry["provenance"]["written"]) for name, entry in found["experiments"].items()}
    assert all(ends[name] > began[name] for name in ends) and int(found["provenance"]["written"]) > max(ends.values())


SOUND = {"name": "a", "status": "ran", "seconds": 1.0, "error": None, "finished": "then", "provenance": {}, "parts": {}}
RECORD = {"name": "a", "title": "T", "paper": "P.", "note": "", "figures": [], "tables": [], "metrics": {}, "runs": [], "data": [], "verdict": None}


@pytest.mark.parametrize("found", [{"status": "ran", "parts": 5}, {"a": 1}, {"status": ["ran"]}, {**SOUND, "status": 5}, {**SOUND, "parts": None}, {**SOUND, "seconds": "3"}, {**SOUND, "error": 3}, {**SOUND, "provenance": []}, [], 5, None], ids=str)
def test_a_state_that_makes_no_sense_is_absent(place, found):
    "Catches a state written by something else, or edited by hand, that ends the batch with an AttributeError or KeyError instead of a new execution."
    notebook(place / "nbs", "a", "finish('a')")
    (place / "results/smoke/state").mkdir(parents=True)
    (place / "results/smoke/state/a.json").write_text(json.dumps(found))
    (place / "results/smoke/experiments").mkdir()
    (place / "results/smoke/experiments/a.json").write_text(json.dumps(RECORD))
    assert state("a") is None and batch("--list") == 0
    jobs, out = reproduce.prepare(reproduce.arguments(["--notebooks", "nbs", "--scale", "smoke"]))
    reproduce.recall(jobs[0], out)
    assert jobs[0].status == "not run" and reproduce.why(jobs[0].path, jobs[0].parameters, out) == "not run before"
    reproduce.gather(jobs, out, "smoke", reproduce.machine())
    (place / "results/smoke/state/a.json").write_text(json.dumps(SOUND))
    assert state("a") == SOUND


@pytest.mark.parametrize("change", [{"runs": 5}, {"runs": ["k"]}, {"runs": [{"label": "no key"}]}, {"data": [{}]}, {"figures": {"a": 1}}, {"figures": [{"caption": "no file"}]}, {"tables": [3]}, {"metrics": [1]}], ids=str)
def test_a_record_that_makes_no_sense_is_absent(place, change):
    "As above, for the record that a notebook writes."
    notebook(place / "nbs", "a", "finish('a')")
    for folder, content in (("state", SOUND), ("experiments", {**RECORD, **change})):
        (place / "results/smoke" / folder).mkdir(parents=True)
        (place / "results/smoke" / folder / "a.json").write_text(json.dumps(content))
    jobs, out = reproduce.prepare(reproduce.arguments(["--notebooks", "nbs", "--scale", "smoke"]))
    assert reproduce.why(jobs[0].path, jobs[0].parameters, out) == "it was interrupted"
    reproduce.gather(jobs, out, "smoke", reproduce.machine())


def test_selection_keeps_the_others_in_the_report(place):
    "A batch of one experiment must not drop the results of the others from the page."
    notebook(place / "nbs", "a", "finish('a')"); notebook(place / "nbs", "b", "finish('b')"); notebook(place / "nbs", "c", "finish('c')")
    assert batch("--only", "a") == 0
    assert batch("--only", "b,d*") == 2 and batch("--only", "b") == 0
    page = Path("results/smoke/report.html").read_text()
    assert "Title of a" in page and "Title of b" in page and 'id="c"' in page and "Not run yet" in page


@pytest.mark.parametrize("arguments, parts", [
    (["-p", "seed=3"], ["'seed'", "'seeds'", "accept"]), (["-p", "steps=3"], ["'steps'", "scale"]), (["-p", "steps"], ["NAME=VALUE"]), (["-p", "out=x"], ["--out"]),
    (["--scale", "quik"], ["'quik'", "'quick'", "laptop"]), (["--only", "fig5_image"], ["'fig5_image'", "'fig05_image'"]), (["--only", "nothing*"], ["nothing", "fig05_image"]),
    (["--only", "fig05"], ["'fig05'", "did you mean 'fig05_image'"]), (["--seeds", "two"], ["--seeds", "'two'", "--help"]), (["--frobnicate"], ["--frobnicate", "--help"]), (["--seeds", "0"], ["--seeds is 0"]), (["--workers", "-1"], ["--workers is -1"]), (["--image", "lyon"], ["lyon", "lion"]), (["--image", "none.png"], ["none.png"]),
    (["-p", "seeds=-3"], ["seeds is -3", "at least 1"]), (["-p", "seeds=[1,'a']"], ["seeds is [1, 'a']", "list"]), (["-p", "seeds=[1,1]"], ["seeds is [1, 1]", "different"]), (["-p", "seeds=[]"], ["seeds is []"]),
    (["-p", "seeds=True"], ["seeds is True"]), (["-p", "seeds=two"], ["seeds is 'two'"]), (["-p", "seeds=1.0"], ["seeds is 1.0"]), (["-p", "seeds=[9223372036854775808]"], ["seeds is"]), (["-p", "image=5"], ["image is 5", "lion"]), (["-p", "image=True"], ["image is True"]),
    (["-p", "workers=0"], ["workers is 0", "at least 1"]), (["-p", "workers=2.5"], ["workers is 2.5"]), (["-p", "image=lyon"], ["lyon", "lion"]), (["-p", "steps={1, 2}"], ["steps", "JSON"]),
    (["-p", "device=cuda:7777"], ["device is 'cuda:7777'"]), (["-p", "device=foo"], ["device is 'foo'", "'cpu'"]), (["-p", "device=5"], ["device is 5", "'cpu'"]), (["-p", "image=astronaut,astronaut"], ["takes one image", "fig05_image"]), (["-p", "image=,"], ["names nothing"]),
    (["-p", "image=astronaut,lyon"], ["lyon", "lion"]), (["--notebooks", "nowhere"], ["nowhere", "--notebooks"])])
def test_wrong_command(place, capsys, arguments, parts):
    "A mistake is one sentence with what is accepted, before anything is executed or written."
    notebook(place / "nbs", "fig05_image", "finish('fig05_image')")
    assert batch(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.strip().endswith(".") and all(part in said for part in parts), said
    assert not Path("results").exists()


def test_damaged_notebook(place, capsys):
    (place / "nbs").mkdir(); (place / "nbs" / "a.ipynb").write_text("{")
    assert batch() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a.ipynb" in said


def test_values_of_parameters():
    "A text that is no literal stays a text; numbers, booleans and lists become themselves."
    read = reproduce.given_parameters(reproduce.arguments(["-p", "a=1", "-p", "b=x=y", "-p", "c=[1, 2.5]", "-p", "d=None", "-p", "e=true", "-p", "f="]))
    assert read == {"a": 1, "b": "x=y", "c": [1, 2.5], "d": None, "e": True, "f": ""}


def test_values_of_the_common_parameters_that_are_accepted():
    "Catches a check that refuses what the notebooks take: None for the scale's, a number of seeds, the seeds themselves."
    read = lambda *given: reproduce.given_parameters(reproduce.arguments([part for item in given for part in ("-p", item)]))
    assert read("seeds=None", "image=None", "workers=None") == {"seeds": None, "image": None, "workers": None}
    assert read("seeds=[3, 0]", "image=astronaut", "workers=2") == {"seeds": [3, 0], "image": "astronaut", "workers": 2} and read("seeds=2") == {"seeds": 2}


def test_image_path_is_seen_from_the_notebook(place):
    "Notebooks run in their own folder: a relative path of the command line must still name the same file."
    from PIL import Image
    Image.linear_gradient("L").convert("RGB").save("mine.png")
    assert reproduce.given_parameters(reproduce.arguments(["--image", "mine.png"])) == {"image": str((place / "mine.png").resolve())}


def test_several_images_where_a_notebook_takes_them(place):
    "Its parameter says 'separated by commas', and the command line refused any comma; a file with a comma in its name was taken, and then split."
    from PIL import Image

    from inr_precond.runs import signals
    for name in ("mine.png", "one,two.png"): Image.linear_gradient("L").convert("RGB").save(name)
    several = PARAMETERS.replace("image = None", "image = None  # names or paths, separated by commas")
    notebook(place / "nbs", "many", "finish('many')", several); notebook(place / "nbs", "one", "finish('one')")
    read = lambda image, only="many": reproduce.prepare(reproduce.arguments(["--notebooks", "nbs", "--only", only, "--image", image]))[0][0].parameters["image"]
    mine, comma = (str((place / name).resolve()) for name in ("mine.png", "one,two.png"))
    assert read("astronaut, mine.png") == f"astronaut,{mine}" and signals(read("astronaut, mine.png")) == ["astronaut", mine]
    assert read("one,two.png") == comma and signals(comma) == [comma] and reproduce.given_paths({"image": f"astronaut,{mine}"}) == [mine] and reproduce.given_paths({"image": comma}) == [comma]
    with pytest.raises(reproduce.BatchError, match="one takes one image; .*: many"): read("astronaut,mine.png", "one,many")
    Path("two.png").write_bytes(Path("mine.png").read_bytes()); (place / "a,b").mkdir()
    Path("a,b/c.png").write_bytes(Path("mine.png").read_bytes()); (place / "link").symlink_to("a,b")
    with pytest.raises(reproduce.BatchError, match="has a comma in it"): read("mine.png,link/c.png")


def test_a_failure_keeps_what_the_last_good_execution_gave(place):
    "A wrong parameter found in the notebook removed the good record and overwrote the good notebook before."
    good = "finish('a') if seeds != 2 else 1 / 0"
    notebook(place / "nbs", "a", good)
    assert batch() == 0
    kept = {name: Path("results/smoke", name).read_bytes() for name in ("notebooks/a.ipynb", "experiments/a.json", "state/a.json")}
    for _ in range(2):                                                                  # a second failure must not replace it by the first
        assert batch("--seeds", "2") == 1 and state("a")["status"] == "failed" and "previous" in state("a")["error"]
        assert {name: Path("results/smoke/previous", name).read_bytes() for name in kept} == kept and not Path("results/smoke/experiments/a.json").exists()
    assert batch() == 0 and state("a")["status"] == "ran" and not [f for f in Path("results/smoke/previous").rglob("*") if f.is_file()]


def test_results_folder_cannot_be_made(place, capsys):
    "One sentence, not a traceback."
    notebook(place / "nbs", "a", "finish('a')"); Path("file").write_text("")
    assert batch("--out", "file") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "file" in said and "--out" in said


def test_results_folder_is_read_only(place):
    "As above, where the folder exists; by a process without root's rights."
    notebook(place / "nbs", "a", "finish('a')"); Path("results").mkdir(mode=0o555)
    place.chmod(0o755)
    code = "import os, sys\nfrom inr_precond import reproduce\nif os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n" \
           "try:\n  with reproduce.only_batch('results/smoke'): sys.exit(9)\nexcept reproduce.BatchError as error: print(error); sys.exit(2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Permission denied" in done.stdout and "--out" in done.stdout, done.stdout + done.stderr


def test_full_disk(place, capsys, monkeypatch):
    "The disk fills up while the batch runs: one sentence that says what to do, and the same command goes on later."
    import inr_precond.train
    notebook(place / "nbs", "a", "finish('a')")
    def full(path, data, durable=True): raise OSError(errno.ENOSPC, "it could not be written")
    with monkeypatch.context() as m:
        m.setattr(inr_precond.train, "write_atomically", full)
        assert batch() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "full" in said and "--out" in said
    assert batch() == 0


def test_two_batches_do_not_mix(place, capsys, monkeypatch):
    "The second waits for a while and then says which process is at work."
    notebook(place / "nbs", "a", "finish('a')")
    monkeypatch.setattr(reproduce, "_locked", lambda file: False)
    monkeypatch.setattr(reproduce.only_batch.__wrapped__, "__defaults__", (.3,))
    assert batch() == 2
    assert "Another batch" in capsys.readouterr().err


def start(*arguments, prefix=()):
    command = [*prefix, sys.executable, "-m", "inr_precond.reproduce", "--notebooks", "nbs", "--scale", "smoke", *arguments]
    return subprocess.Popen(command, stdout=open("log.txt", "w"), stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not happen; the log says: {Path('log.txt').read_text()}"
        time.sleep(.05)
    return value


def training():
    "The run that trains now, once it has made 200 steps."
    from inr_precond import runs
    store = Path("results/smoke/runs")
    return [p for p in (runs.active(store) if store.is_dir() else []) if p["step"] >= 200]


def slow(place, steps):
    notebook(place / "nbs", "slow", "import hashlib\n" + TRAINS.replace("STEPS", str(steps)))


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C", "kill -9 of make"])
def test_stopped_batch_leaves_nothing_and_goes_on(place, how):
    "However a batch is stopped, none of its processes is left, and the same command goes on from where the run was."
    slow(place, 20_000)  # some 5 s on the fastest machine met; a stop is heeded within one
    make = how == "kill -9 of make"
    process = start(*["--exit-with-parent"] * make, prefix=["/bin/sh", "-c", '"$@"; true', "sh"] if make else ())
    try:
        at = wait_for(training, 600, "training")[0]["step"]
        tree = psutil.Process(process.pid).children(recursive=True)
        assert len(tree) >= 3  # papermill, kernel, training
        process.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
        status = process.wait(300)
        _, alive = psutil.wait_procs(tree, timeout=300)
    finally:
        process.kill()  # a test that fails leaves no batch behind
    assert not alive, [p.cmdline() for p in alive]
    assert status == (130 if how == "Ctrl-C" else -9)
    if how == "Ctrl-C":
        assert "goes on from the last checkpoints" in Path("log.txt").read_text()
        assert "interrupted" in Path("results/smoke/report.html").read_text()
    checkpoint = list(Path("results/smoke/runs").glob("*/checkpoint.pt"))
    assert checkpoint, "no checkpoint: the training process had no time to write it, or ended before it was stopped"
    if make: return  # the rest is as in the first case
    assert batch() == 0
    run = next(Path("results/smoke/runs").glob("*/provenance.json"))
    assert json.loads(run.read_text())["resumed_at"] >= at - 1 and state("slow")["status"] == "ran"


MEET = """
import time, os, pathlib
def meet(name, other):
    "Begin, and wait for the other to have begun; True where it came within a minute."
    pathlib.Path(out, f"{{name}}.here").touch()
    while other and not pathlib.Path(out, f"{{other}}.here").exists() and time.time() < began + 60: time.sleep(.1)
    return bool(other) and pathlib.Path(out, f"{{other}}.here").exists()
began = time.time()
met = meet({0!r}, {1!r})
finish({0!r}, metrics={{'began': began, 'ended': time.time(), 'met': met, 'slots': int(os.environ['INR_PRECOND_SLOTS'] or 0)}})
"""


def spans(): return {name: e["metrics"] for name, e in json.loads(Path("results/smoke/metrics.json").read_text())["experiments"].items()}


def together(a, b): return a["began"] < b["ended"] and b["began"] < a["ended"]


def test_notebooks_run_side_by_side_but_one_that_times_things_alone(place, monkeypatch):
    "Catches a machine half idle while figures are drawn, and a benchmark that is disturbed by its neighbours."
    from inr_precond import runs
    monkeypatch.setattr(runs, "default_workers", lambda configs: 2)
    for name, other in (("a", "b"), ("b", "a"), ("c", "")): notebook(place / "nbs", name, MEET.format(name, other))
    nb = nbformat.read("nbs/c.ipynb", 4)
    nb.cells[1].metadata["tags"] = ["parameters", "alone"]
    nbformat.write(nb, "nbs/c.ipynb")
    assert batch() == 0
    done = spans()
    assert done["a"]["met"] and done["b"]["met"] and together(done["a"], done["b"]) and not together(done["c"], done["a"]) and not together(done["c"], done["b"])
    assert {m["slots"] for m in done.values()} == {2}
    for more, one in ((["--workers", "1"], True), (["-p", "device=cuda"], False)):
        jobs, _ = reproduce.prepare(reproduce.arguments(["--notebooks", "nbs", "--scale", "smoke", *(more if one else [])]))
        if not one: jobs[0].parameters["device"] = "cuda"
        assert reproduce.side_by_side(jobs) == (1, None)
    assert reproduce.side_by_side(reproduce.prepare(reproduce.arguments(["--notebooks", "nbs", "--scale", "smoke", "--workers", "16"]))[0]) == (4, 16)


def test_a_notebook_is_not_cut_off_by_the_failure_of_its_neighbour(place, monkeypatch):
    from inr_precond import runs
    monkeypatch.setattr(runs, "default_workers", lambda configs: 2)
    notebook(place / "nbs", "a", "raise ValueError('no')"); notebook(place / "nbs", "b", "import time; time.sleep(4); finish('b')")
    assert batch() == 1 and state("a")["status"] == "failed" and state("b")["status"] == "ran"


def test_progress_is_shown_in_a_terminal(place):
    "A run's steps, loss, PSNR and time left stand below its notebook, and the lines are replaced in place."
    slow(place, 10_000)  # long enough to be seen on a fast machine
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    command = [sys.executable, "-m", "inr_precond.reproduce", "--notebooks", "nbs", "--scale", "smoke"]
    process = subprocess.Popen(command, stdout=slave, stderr=subprocess.STDOUT)
    os.close(slave)
    seen = b""
    while True:
        try: more = os.read(master, 65536)
        except OSError: break  # the other end is closed
        if not more: break
        seen += more
    assert process.wait(60) == 0, seen.decode()
    text = seen.decode()
    assert "[1/1] slow" in text and "/10,000 steps" in text and "left" in text and "\x1b[2F\x1b[J" in text
    assert text.rstrip().splitlines()[-1].startswith("Report: results/smoke/report.html")


def test_list(place, capsys):
    notebook(place / "nbs", "a", "finish('a')"); notebook(place / "nbs", "bench_x", "finish('bench_x')"); notebook(place / "nbs", "z", "finish('z')")
    assert batch("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "z", "bench_x"] and "not run before" in lines[0] and "seeds" in lines[0]
    assert not Path("results").exists()


def test_committed_experiments_are_not_touched(place):
    "The batch executes copies: the notebook in the repository stays byte for byte. From its folder it finds the data that the batch finds from its own."
    (place / "data").mkdir()
    notebook(place / "nbs", "a", f"import os; assert os.environ['INR_PRECOND_DATA'] == {str((place / 'data').resolve())!r}; finish('a')")
    before = Path("nbs/a.ipynb").read_bytes()
    assert batch() == 0 and Path("nbs/a.ipynb").read_bytes() == before and sorted(p.name for p in Path("nbs").iterdir()) == ["a.ipynb"]
