"Runs: configs and keys, folders, locks, sweeps, faults. Each test's docstring says the mistake it catches."
import dataclasses
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inr_precond import runs
from inr_precond.runs import (
    ACTIVATIONS,
    RESULTS,
    Display,
    Run,
    RunConfig,
    RunError,
    SweepError,
    active,
    canonical_json,
    damage,
    locked,
    run,
    sweep,
)
from inr_precond.train import load_checkpoint, save_checkpoint

RECIPE = runs.recipe("adam/released")


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    "A picture of 33 x 33 pixels made from a formula, as a file."
    from PIL import Image

    row, column = np.meshgrid(*[np.linspace(-1, 1, 33)] * 2, indexing="ij")
    path = tmp_path_factory.mktemp("images") / "waves.png"
    Image.fromarray((255 * np.stack([0.5 + 0.4 * np.sin(6 * row), 0.5 + 0.4 * np.cos(8 * column), (row * column + 1) / 2], -1)).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture
def small(image):
    "A config of a run of a fraction of a second, with changes."
    return lambda **changes: RunConfig(**{**dict(image=image, image_size=33, hidden_features=8, num_layers=3, steps=60, batch_size=64), **changes})


@pytest.fixture(scope="session")
def finished(image, tmp_path_factory):
    "A finished run, to be copied and damaged."
    config = RunConfig(image=image, image_size=33, hidden_features=8, num_layers=3, steps=60, batch_size=64)
    return config, run(config, tmp_path_factory.mktemp("finished"))


def no_training(monkeypatch):
    "From here on nothing may train in this process."
    def refuse(*_, **__):
        raise AssertionError("a run was trained that should have been read")

    monkeypatch.setattr(runs, "trainer", refuse)


def results(run):
    "All of a run that must not depend on how it came about."
    return run.curve[["step", "loss"]].to_csv(), run.evals[["step", "mse", "psnr"]].to_csv(), run.prediction().tobytes(), run.status, run.final


# --- configs

VALID = st.fixed_dictionaries(
    {"activation": st.sampled_from(["relu", "gaussian", "sine", "wavelet", "gabor", "relu-pe"])},
    optional={
        "image": st.sampled_from(["astronaut", "lion"]), "image_size": st.integers(2, 512), "hidden_features": st.integers(1, 512), "num_layers": st.integers(1, 9),
        "recipe": st.sampled_from(["adam/released", "esgd/released", "adahessian-j/released"]), "options": st.fixed_dictionaries({}, optional={"lr": st.floats(0, 10) | st.integers(0, 3), "betas": st.tuples(*[st.floats(0, 0.99)] * 2)}),
        "schedule": st.sampled_from(["constant", "cosine", "exponential"]), "steps": st.integers(1, 10**9), "batch_size": st.integers(1, 10**6), "seed": st.integers(0, 2**63 - 1),
        "evaluations": st.integers(1, 100), "dtype": st.sampled_from(["float32", "float64"]), "device": st.sampled_from(["cpu", "cuda", "cuda:1"]),
    },
)  # fmt: skip


@given(values=VALID, own=st.floats(0.001, 100), data=st.data())
def test_config_round_trips_and_ignores_the_order(values, own, data):
    "Catches a hash that depends on the order of fields or options, a field lost in JSON, and tuples that come back as other values."
    names = sorted(set(ACTIVATIONS[values["activation"]]) - {"num_frequencies"})
    values = {**values, **dict.fromkeys(names, own)}
    config = RunConfig(**values)
    shuffled = RunConfig.from_dict({k: values[k] for k in data.draw(st.permutations(list(values)))})
    back = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert config == shuffled == back == pickle.loads(pickle.dumps(config)) and hash(config) == hash(shuffled) == hash(back)
    assert canonical_json(config.explicit()) == canonical_json(shuffled.explicit()) == canonical_json(back.explicit())


@given(a=VALID, b=VALID)
def test_configs_are_equal_if_and_only_if_their_json_is(a, b):
    "Catches a field left out of the hash, and two spellings of one run that hash apart."
    a, b = RunConfig(**a), RunConfig(**b)
    differ = {f.name for f in dataclasses.fields(RunConfig) if f.name not in ("options", "device") and a.explicit().get(f.name) != b.explicit().get(f.name)}
    differ |= {"options"} if canonical_json(a.explicit()["options"]) != canonical_json(b.explicit()["options"]) else set()
    differ |= {"device"} if torch.device(a.device).type != torch.device(b.device).type else set()
    assert (a == b) == (canonical_json(a.explicit()) == canonical_json(b.explicit())) == (not differ)


@pytest.mark.parametrize("default, spelled", [
    ({}, {"sigma": 0.05}), ({}, {"options": {"lr": 1e-4}}), ({}, {"options": {"betas": [0.9, 0.999]}}), ({}, {"options": {"weight_decay": 0}}), ({}, {"device": torch.device("cpu")}),
    ({"activation": "sine"}, {"activation": "sine", "omega": 30}), ({"activation": "relu-pe"}, {"activation": "relu-pe", "num_frequencies": np.int64(8)}),
    ({"schedule": "cosine"}, {"schedule": "cosine", "final_lr_factor": 0}), ({"sigma": 1}, {"sigma": np.float64(1)}), ({"options": {"lr": 1}}, {"options": {"lr": 1.0}}),
    ({"device": "cuda"}, {"device": "cuda:1"}), ({"recipe": "esgd/released"}, {"recipe": "esgd/released", "options": {"bias_correction": "steps"}}),
])  # fmt: skip
def test_a_default_spelled_out_is_the_same_run(default, spelled):
    "Catches one run trained twice because somebody wrote a default down, gave an integer, or used another card."
    a, b = RunConfig(image="astronaut", **default), RunConfig(image="astronaut", **spelled)
    assert a == b and a.key == b.key


@pytest.mark.parametrize("change", [
    {"image_size": 32}, {"activation": "sine"}, {"sigma": 0.06}, {"hidden_features": 255}, {"num_layers": 4}, {"recipe": "adam/paper-sine"}, {"recipe": "esgd/mended"}, {"options": {"lr": 2e-4}},
    {"options": {"maximize": True}}, {"schedule": "cosine"}, {"steps": 7681}, {"batch_size": 513}, {"seed": 1}, {"evaluations": 11}, {"device": "cuda"}, {"dtype": "float64"},
])  # fmt: skip
def test_every_field_enters_the_key(change):
    "Catches two different runs that share a folder."
    assert RunConfig(image="astronaut", **change).key != RunConfig(image="astronaut").key


def test_the_data_and_the_format_enter_the_key(image, tmp_path, monkeypatch):
    "Catches another picture under the same file name read as the old run, and old runs read after training changed its meaning."
    path = tmp_path / "picture.png"
    shutil.copy(image, path)
    config = RunConfig(image=str(path), image_size=33)
    before = config.key
    from PIL import Image

    Image.fromarray(np.zeros((33, 33, 3), np.uint8)).save(path)
    assert config.key != before
    after = config.key
    monkeypatch.setattr(runs, "FORMAT", runs.FORMAT + 1)
    assert config.key != after


def test_one_image_by_two_paths_is_one_run_of_two_configs(image, small, tmp_path):
    "Catches one picture trained twice because it lies in two folders. Equality is of the fields and reads no image: equal configs name one run, configs of one run need not be equal."
    copy = shutil.copytree(Path(image).parent, tmp_path / "elsewhere") / Path(image).name
    here, there = small(), small(image=str(copy))
    assert here != there and here.key == there.key
    first, second = sweep([here, there], tmp_path / "runs", ThreadPoolExecutor(1), progress=False)
    assert first is second
    image_gone = small(image=str(tmp_path / "gone.png"))
    assert image_gone == small(image=str(tmp_path / "gone.png")) and hash(image_gone) != hash(here)
    assert "need not" in RunConfig.__doc__ and "those that name the same run" not in RunConfig.__doc__


def test_the_recipes_numbers_enter_the_key(monkeypatch):
    "Catches a recipe whose options are changed while its old runs go on being read."
    before = RunConfig(image="astronaut", recipe="esgd/released").key
    changed = dataclasses.replace(runs.recipe("esgd/released"), options={**runs.recipe("esgd/released").options, "update_every": 50})
    monkeypatch.setattr(runs, "recipe", lambda name: changed)
    assert RunConfig(image="astronaut", recipe="esgd/released").key != before


def test_key_does_not_depend_on_the_process():
    "Catches a hash that uses Python's own, which differs from process to process."
    code = "from inr_precond.runs import RunConfig; print(RunConfig(image='astronaut', recipe='esgd/released').key)"
    key = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "1"}).stdout.strip()
    assert key == RunConfig(image="astronaut", recipe="esgd/released").key


@given(values=st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.lists(st.integers(), max_size=3)), max_size=6), data=st.data())
def test_canonical_json_ignores_the_order_and_refuses_nan(values, data):
    "Catches JSON in the order of insertion: a recipe whose options are listed in another order would name another run."
    shuffled = {k: values[k] for k in data.draw(st.permutations(list(values)))}
    assert canonical_json(values) == canonical_json(shuffled) and json.loads(canonical_json(values)) == values
    with pytest.raises(ValueError):
        canonical_json({**values, "bad": math.nan})


BAD = [
    ({"step": 5}, ValueError, "did you mean 'steps'"), ({"steps": True}, TypeError, "steps"), ({"steps": 5.0}, TypeError, "steps"), ({"steps": "5"}, TypeError, "steps"), ({"steps": 0}, ValueError, "steps"),
    ({"steps": None}, TypeError, "steps"), ({"sigma": math.nan}, ValueError, "sigma"), ({"sigma": math.inf}, ValueError, "sigma"), ({"sigma": 0}, ValueError, "above 0"), ({"sigma": True}, TypeError, "sigma"),
    ({"seed": -1}, ValueError, "seed"), ({"seed": 2**63}, ValueError, "seed"), ({"task": "video"}, ValueError, "task"), ({"activation": "gausian"}, ValueError, "did you mean 'gaussian'"), ({"activation": 3}, ValueError, "activation"),
    ({"activation": "relu", "sigma": 0.1}, ValueError, "no sigma"), ({"omega": 30}, ValueError, "no omega"), ({"activation": "sine", "scale": 1}, ValueError, "no scale"), ({"num_frequencies": 8}, ValueError, "no num_frequencies"),
    ({"recipe": "esgd/relased"}, ValueError, "did you mean 'esgd/released'"), ({"options": {"update_evry": 3}, "recipe": "esgd/released"}, ValueError, "did you mean 'update_every'"),
    ({"options": {"update_every": 3}}, ValueError, "not an option of Adam"), ({"options": {"lr": math.nan}}, ValueError, "lr"), ({"options": {"lr": -1}}, ValueError, "lr"), ({"options": {"lr": [1, {}]}}, TypeError, "lr"), ({"options": [1]}, TypeError, "options"),
    ({"options": {"seed": 1}}, ValueError, "seed"), ({"schedule": "cosin"}, ValueError, "did you mean 'cosine'"), ({"final_lr_factor": 0.1}, ValueError, "constant"), ({"schedule": "exponential", "final_lr_factor": 0}, ValueError, "never reaches"),
    ({"schedule": "cosine", "final_lr_factor": 1.5}, ValueError, "final_lr_factor"), ({"device": "gpu0"}, ValueError, "device"), ({"dtype": "float16"}, ValueError, "dtype"), ({"image": "loin"}, ValueError, "did you mean 'lion'"),
    ({"device": "meta"}, ValueError, "device is 'meta'.*'cpu', 'cuda'"), ({"device": "hpu:1"}, ValueError, "device is 'hpu:1'"), ({"device": "cuda:300"}, ValueError, "device is 'cuda:300'"), ({"device": 0}, ValueError, "device is 0"), ({"options": {"maximize": "no"}}, ValueError, "options.*maximize is 'no'"),
    ({"options": {"nesterov": 1}}, ValueError, "options.*nesterov is 1"), ({"options": {"lr": "fast"}}, ValueError, "options.*lr is 'fast'"), ({"image": 3}, TypeError, "image"), ({"image": ""}, TypeError, "image"), ({"image_size": 1}, ValueError, "image_size"), ({"batch_size": 0}, ValueError, "batch_size"), ({"evaluations": 0}, ValueError, "evaluations"),
]  # fmt: skip


@pytest.mark.parametrize("values, error, words", BAD, ids=[str(v) for v, _, _ in BAD])
def test_config_refuses(values, error, words):
    "Catches a mistyped name or value that costs a night, and a message that is not one sentence."
    with pytest.raises(error, match=words.replace("(", r"\(")) as caught:
        RunConfig.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["adam/released", "esgd/released", "adahessian-e/released"])
def test_interrupted_and_resumed_on_cuda(small, tmp_path, recipe):
    "Catches generators or counters that come back on the wrong device."
    config = small(recipe=recipe, device="cuda")
    whole = run(config, tmp_path / "whole")
    interrupted(config, tmp_path / "cut", 37)
    assert results(run(config, tmp_path / "cut")) == results(whole)


@given(name=st.sampled_from([f.name for f in dataclasses.fields(RunConfig)]), value=st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=1)))
def test_any_value_is_accepted_or_refused_in_a_sentence(name, value):
    "Catches a value that passes and then cannot be hashed, and an exception that is neither ValueError nor TypeError."
    try:
        config = RunConfig.from_dict({name: value})
    except (ValueError, TypeError) as error:
        assert "\n" not in str(error)
        return
    assert RunConfig.from_dict(json.loads(canonical_json(config.to_dict()))) == config


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_what_the_optimizer_refuses_is_the_configs_sentence(monkeypatch, error):
    "Catches an optimizer's own error that reaches the user from a config without the option's or the recipe's name, or in several lines."
    class Refusing(torch.optim.SGD):
        def __init__(self, params, lr=1.0):
            raise error("lr must be\n a pleasant number.")

    monkeypatch.setattr(runs, "recipe", lambda name: dataclasses.replace(RECIPE, optimizer=Refusing))
    with pytest.raises(error, match="options of 'adam/released'.* lr must be a pleasant number") as caught:
        RunConfig(options={"lr": 2.0})
    assert "\n" not in str(caught.value)


def test_a_config_draws_no_random_numbers():
    "Catches a validation that shifts the random numbers of whoever makes a config (a dummy layer is initialised at random)."
    before = torch.random.get_rng_state()
    RunConfig()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_config_cannot_be_changed():
    "Catches a config whose key changes after it named a folder."
    config = RunConfig(options={"lr": 1.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    for change in (lambda o: o.__setitem__("lr", 2.0), lambda o: o.update(lr=2.0), lambda o: o.pop("lr"), lambda o: o.clear(), lambda o: o.__ior__({"lr": 2.0})):
        with pytest.raises(TypeError, match="cannot be changed"):
            change(config.options)
    options = {"lr": 1.0}
    config = RunConfig(options=options)
    options["lr"] = 5.0
    assert config.options == {"lr": 1.0}


def test_replace_works_across_activations():
    "Catches defaults written into the fields, so that replace(activation=...) is refused for a sigma nobody gave."
    assert dataclasses.replace(RunConfig(), activation="sine", seed=3) == RunConfig(activation="sine", seed=3)


@pytest.mark.parametrize("activation, parameters", [("gaussian", 198_915), ("sine", 198_915), ("wavelet", 198_915), ("relu", 198_915), ("relu-pe", 207_107), ("gabor", 397_059)])
def test_networks(activation, parameters):
    "Catches an activation's parameter that does not reach the network, and a network of another size than the paper's."
    own = {"gaussian": {"sigma": 0.2}, "sine": {"omega": 7}, "wavelet": {"omega": 3, "scale": 4}, "gabor": {"omega": 3, "scale": 4}, "relu": {}, "relu-pe": {}}[activation]
    model = runs.network(RunConfig(activation=activation, **own))
    holder = model.layers[0] if activation == "gabor" else model.activation
    assert sum(p.numel() for p in model.parameters()) == parameters and all(getattr(holder, k) == v for k, v in own.items())


def test_seeds_pair_the_recipes(small):
    "Catches initial weights or batches that depend on the recipe: the difference of two optimizers would hold the difference of two seeds."
    a, b, c = (runs.trainer(small(**v)) for v in ({}, {"recipe": "esgd/released"}, {"seed": 1}))
    weights = [torch.cat([p.flatten() for p in t.model.parameters()]) for t in (a, b, c)]
    batches = [t.task.batch(t.generator)[0] for t in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and torch.equal(batches[0], batches[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(batches[0], batches[2])


# --- one run

def test_run_has_what_the_figures_need(finished):
    "Catches a missing column or number, a table rounded on its way through CSV, and files of a training left behind."
    config, done = finished
    assert done.config == config and done.key == config.key == done.folder.name and done.status == "finished" and done.diverged_at is None
    assert list(done.curve) == ["step", "seconds", "loss"] and done.curve.step.iloc[-1] == 60 and done.curve.seconds.is_monotonic_increasing
    assert list(done.evals) == ["step", "seconds", "cpu_seconds", "mse", "psnr"] and len(done.evals) == 12
    assert done.final["psnr"] == done.evals.psnr.iloc[-1] and done.final["mse"] == done.evals.mse.iloc[-1] and done.final["best_psnr"] == done.evals.psnr.max()
    assert set(done.final) == {"psnr", "ssim", "lpips", "mse", "best_psnr", "best_step"} and -1 <= done.final["ssim"] <= 1
    target = runs.image_data(config.image, 33).pixels.numpy()
    assert done.prediction().shape == (33, 33, 3) and done.prediction().dtype == np.float32 and np.mean((done.prediction() - target) ** 2) == pytest.approx(done.final["mse"], rel=1e-2)
    assert done.ms_per_step > 0 and done.state_floats_per_parameter == 2
    assert sorted(p.name for p in done.folder.iterdir()) == sorted([*RESULTS["image"], "metrics.json"])


def test_provenance_names_no_folder_and_no_host(finished, image):
    "Catches paths or machine names that a report would publish, and a hash that is not the data's."
    import platform

    config, done = finished
    text = json.dumps(done.provenance)
    assert str(Path(image).parent) not in text and (platform.node() not in text.replace("Linux", "") or len(platform.node()) < 4)
    assert done.provenance["data"]["sha256"] == runs.image_data(config.image, 33).sha256 and done.provenance["threads"] >= 1 and done.provenance["torch"] == torch.__version__


def test_a_finished_run_is_read(finished, monkeypatch):
    "Catches a run that is trained again though it is there."
    config, done = finished
    no_training(monkeypatch)
    assert run(config, done.folder.parent).metrics_sha256 == done.metrics_sha256
    assert [r.key for r in sweep([config, config], done.folder.parent)] == [config.key] * 2


def test_a_run_is_reproducible(finished, tmp_path):
    "Catches anything random that the seed does not decide."
    config, done = finished
    assert results(run(config, tmp_path)) == results(done)


def drop(name):
    return lambda folder: (folder / name).unlink()


def halve(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2])


def flatter(folder):
    "Improve the PSNR in metrics.json by hand."
    summary = json.loads((folder / "metrics.json").read_text())
    summary["final"]["psnr"] += 10
    (folder / "metrics.json").write_text(json.dumps(summary))


def forge(folder):
    "Another config in config.json, with all checksums right."
    stored = json.loads((folder / "config.json").read_text())
    stored["resolved"]["steps"] = 61
    (folder / "config.json").write_text(json.dumps(stored))
    summary = json.loads((folder / "metrics.json").read_text())
    summary["files"]["config.json"] = runs._sha256(folder / "config.json")
    (folder / "metrics.json").write_text(json.dumps({**summary, "digest": runs._digest(summary)}))


DAMAGE = {**{f"{name} missing": drop(name) for name in RESULTS["image"]}, **{f"{name} truncated": halve(name) for name in (*RESULTS["image"], "metrics.json")}, "metrics altered": flatter, "another config": forge,
          "metrics empty": lambda f: (f / "metrics.json").write_bytes(b""), "metrics a list": lambda f: (f / "metrics.json").write_text("[]"), "digits in the curve": lambda f: (f / "curve.csv").write_bytes((f / "curve.csv").read_bytes().replace(b"1", b"2"))}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_folder_is_reported_and_rebuilt(finished, tmp_path, how):
    "Catches a damaged folder that is silently used, or silently rebuilt, or that stops everything."
    config, done = finished
    folder = shutil.copytree(done.folder, tmp_path / config.key)
    DAMAGE[how](folder)
    assert damage(folder)
    with pytest.raises(ValueError, match="cannot be read"):
        Run(folder)
    with pytest.warns(UserWarning, match="damaged.*rebuilt"):
        rebuilt = run(config, tmp_path)
    assert results(rebuilt) == results(done)


def test_a_renamed_folder_is_not_believed(finished, tmp_path):
    "Catches a folder copied under another run's name."
    config, done = finished
    other = dataclasses.replace(config, seed=1)
    shutil.copytree(done.folder, tmp_path / other.key)
    with pytest.warns(UserWarning, match="not the one that its name stands for"):
        assert results(run(other, tmp_path)) != results(done)


def interrupted(config, store, at):
    "Stop a run after `at` steps."
    made = {}
    real = runs.trainer

    def noting(*a, **k):
        made["trainer"] = real(*a, **k)
        return made["trainer"]

    runs.trainer = noting
    try:
        with pytest.raises(KeyboardInterrupt):
            run(config, store, stop=lambda: "trainer" in made and made["trainer"].history.step >= at)
    finally:
        runs.trainer = real
    return store / config.key


@pytest.mark.parametrize("recipe", ["adam/released", "esgd/released"])
def test_an_interrupted_run_resumes(small, tmp_path, recipe):
    "Catches a run that starts from zero although it has a checkpoint, or that ends elsewhere than an uninterrupted one."
    config = small(recipe=recipe)
    whole, folder = run(config, tmp_path / "whole"), interrupted(config, tmp_path / "cut", 37)
    assert load_checkpoint(folder / "checkpoint.pt")["history"]["step"] == 37 and damage(folder) == "not finished"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = run(config, tmp_path / "cut")
    assert results(resumed) == results(whole) and resumed.provenance["resumed_at"] == 37 and not (folder / "checkpoint.pt").exists()


def swap_model(file):
    "A checkpoint of another network, with a correct checksum."
    state = load_checkpoint(file)
    state["model"] = {"layers.0.weight": torch.zeros(3, 3)}
    save_checkpoint(state, file)


@pytest.mark.parametrize("how", [lambda f: f.write_bytes(f.read_bytes()[:999]), lambda f: f.write_bytes(b""), lambda f: f.write_bytes(b"x" * 5000), swap_model, lambda f: save_checkpoint({"step": 3}, f)], ids=["truncated", "empty", "noise", "other network", "no state"])
def test_a_corrupt_checkpoint_is_reported_and_the_run_begins_anew(small, finished, tmp_path, how):
    "Catches a crash that repeats at every start, and a model half loaded from a bad file that trains on."
    folder = interrupted(small(), tmp_path, 37)
    how(folder / "checkpoint.pt")
    with pytest.warns(UserWarning, match=f"{small().key} begins anew.*checkpoint.pt"):
        rebuilt = run(small(), tmp_path)
    assert results(rebuilt) == results(finished[1]) and rebuilt.provenance["resumed_at"] == 0


def test_a_checkpoint_of_another_run_is_not_continued(small, finished, tmp_path):
    "Catches a sound checkpoint of the same network but another run (another seed, learning rate or picture), copied or restored into the wrong folder and continued silently."
    other = interrupted(small(seed=1, options={"lr": 1e-2}), tmp_path / "other", 37)
    folder = interrupted(small(), tmp_path / "runs", 20)
    shutil.copy(other / "checkpoint.pt", folder / "checkpoint.pt")
    with pytest.warns(UserWarning, match=f"{small().key} begins anew.*{folder}.*{other.name}"):
        rebuilt = run(small(), tmp_path / "runs")
    assert results(rebuilt) == results(finished[1]) and rebuilt.provenance["resumed_at"] == 0


def test_a_checkpoint_that_names_no_run_is_not_continued(small, finished, tmp_path):
    "Catches a checkpoint written by something else, whose origin nobody knows."
    folder = interrupted(small(), tmp_path, 37)
    state = load_checkpoint(folder / "checkpoint.pt")
    save_checkpoint({k: v for k, v in state.items() if k != "run"}, folder / "checkpoint.pt")
    with pytest.warns(UserWarning, match="begins anew.*names no run"):
        assert results(run(small(), tmp_path)) == results(finished[1])


@pytest.mark.parametrize("name", ["evals.csv", "prediction.npz", "metrics.json", "config.json"])
def test_a_file_that_cannot_be_read_now_is_no_damage(finished, tmp_path, monkeypatch, name):
    "One passing read error of a disk made a finished run 'damaged', removed its folder and trained it again."
    config, done = finished
    folder = shutil.copytree(done.folder, tmp_path / config.key)
    (folder / "note.txt").write_text("mine")
    read = Path.read_bytes

    def broken(self):
        if self.name == name and self.parent == folder:
            raise OSError(5, "Input/output error")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", broken)
    for attempt in (lambda: damage(folder), lambda: run(config, tmp_path), lambda: sweep([config], tmp_path, progress=False)):
        with pytest.raises(OSError, match=f"{name} cannot be read now .Input/output error.*run again") as caught:
            attempt()
        assert "\n" not in str(caught.value) and caught.value.errno == 5
    monkeypatch.undo()
    no_training(monkeypatch)
    assert run(config, tmp_path).metrics_sha256 == done.metrics_sha256 and (folder / "note.txt").exists()


def test_a_wrong_number_of_slots_is_one_sentence(small, tmp_path, monkeypatch):
    "It ended in int()'s 'invalid literal'."
    monkeypatch.setenv("INR_PRECOND_SLOTS", "abc")
    with pytest.raises(RunError, match="INR_PRECOND_SLOTS is 'abc'; give the number of trainings"):
        run(small(), tmp_path)


@pytest.mark.parametrize("name, words", [("foo", "accepted are 'cpu', 'cuda'"), ("5", "accepted are"), ("cuda:7", "finds (no|only .*) CUDA device")])
def test_a_device_that_is_not_here_is_one_sentence(name, words):
    if name.startswith("cuda") and torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight GPUs")
    with pytest.raises(ValueError, match=words):
        runs.require_device(name)


def obstruct_checkpoint(folder):
    folder.mkdir()
    (folder / "checkpoint.pt").mkdir()
    (folder / "checkpoint.pt" / "kept.txt").write_text("somebody's")


def obstruct_lock(folder):
    (folder.parent / ".locks" / f"{folder.name}.lock").mkdir(parents=True)


def link_damaged(folder):
    (folder.parent / "target").mkdir()
    (folder.parent / "target" / "metrics.json").write_text("[]")
    folder.symlink_to("target")


OBSTACLES = {
    "checkpoint is a folder": (obstruct_checkpoint, "checkpoint.pt in .* cannot be read .Is a directory.; remove it"), "run is a file": (lambda f: f.write_text(""), "is a file .*; remove it"),
    "run is a dangling link": (lambda f: f.symlink_to("nowhere"), "is a link that leads nowhere.*; remove it"), "run is a loop": (lambda f: f.symlink_to(f.name), "is a link that leads nowhere.*; remove it"),
    "run is a link to a damaged folder": (link_damaged, "is a link to a damaged folder.*; remove it"), "lock is a folder": (obstruct_lock, "lock .* cannot be opened .Is a directory.; remove it"),
}  # fmt: skip


@pytest.mark.parametrize("how", OBSTACLES)
def test_what_stands_in_the_way_is_named_and_left_alone(small, finished, tmp_path, how):
    "Catches errno texts that do not say what to do, and a repair that deletes what this package did not write."
    obstruct, words = OBSTACLES[how]
    folder = tmp_path / small().key
    obstruct(folder)
    with warnings.catch_warnings(), pytest.raises(OSError if how == "lock is a folder" else RunError, match=words) as caught:
        warnings.simplefilter("error")
        run(small(), tmp_path)
    assert "\n" not in str(caught.value) and small().key in str(caught.value) and str(caught.value).count("cannot be") <= 1
    with pytest.raises(SweepError, match=words):
        sweep([small()], tmp_path, ThreadPoolExecutor(1), progress=False)
    if how == "checkpoint is a folder":
        assert (folder / "checkpoint.pt" / "kept.txt").exists()
        return
    obstacle = tmp_path / ".locks" / f"{folder.name}.lock" if how == "lock is a folder" else folder
    obstacle.rmdir() if obstacle.is_dir() and not obstacle.is_symlink() else obstacle.unlink()
    assert results(run(small(), tmp_path)) == results(finished[1])


def test_divergence_is_a_finished_run(small, tmp_path, monkeypatch):
    "Catches a diverged run that crashes, is trained again each time, or whose metrics.json holds NaN (which is no JSON)."
    config = small(recipe="sgd/released", options={"lr": 1e10}, steps=200)
    diverged = run(config, tmp_path)
    assert diverged.status == "diverged" and 0 < diverged.diverged_at < 200 and diverged.final["psnr"] is None and f"diverged at step {diverged.diverged_at}" in repr(diverged)
    assert np.isfinite(diverged.curve.loss).all() and diverged.prediction().shape == (33, 33, 3)
    json.loads((diverged.folder / "metrics.json").read_text(), parse_constant=lambda text: pytest.fail(f"metrics.json holds {text}"))
    no_training(monkeypatch)
    assert run(config, tmp_path).status == "diverged"


@pytest.mark.parametrize("error, words", [(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "ran out of memory"), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "ran out of memory"), (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero")])
def test_a_failure_is_one_sentence_and_recorded(small, tmp_path, monkeypatch, error, words):
    "Catches a bare traceback, a failure that leaves no trace in the folder, and one whose trace stays after a success."
    real = runs.ImageTask.batch

    def fail(self, generator):
        raise error

    monkeypatch.setattr(runs.ImageTask, "batch", fail)
    with pytest.raises(RunError, match=words) as caught:
        run(small(), tmp_path)
    assert "\n" not in str(caught.value) and words in json.loads((tmp_path / small().key / "failure.json").read_text())["reason"]
    monkeypatch.setattr(runs.ImageTask, "batch", real)
    assert run(small(), tmp_path).status == "finished" and not (tmp_path / small().key / "failure.json").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "xpu", "mps"])
def test_an_absent_device_is_one_sentence(small, tmp_path, device):
    "Catches torch's own assertion, which does not say what to do, after minutes of other work."
    kind = getattr(torch, torch.device(device).type)
    if kind.is_available() and device != "cuda:99":
        pytest.skip(f"there is such a device ({device}) here")
    with pytest.raises(RunError, match=f"device is '{device}' and torch finds .*; use 'cpu'") as caught:
        run(small(device=device), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("store", ["/proc/nowhere/runs", "FILE/runs", "FILE"])
def test_an_unwritable_store_is_one_sentence(small, tmp_path, store, monkeypatch):
    "Catches an unwritable results folder found out after the training."
    (tmp_path / "file").write_text("")
    no_training(monkeypatch)
    for function in (run, lambda config, store: sweep([config], store)):
        with pytest.raises(OSError, match="results folder .* cannot be written .*give another folder"):
            function(small(), store.replace("FILE", str(tmp_path / "file")))


DISK_FULL = """
import resource, sys, warnings, json
from inr_precond.runs import RunConfig, run
config = RunConfig.from_dict(json.loads(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try: run(config, sys.argv[2])
except Exception as error: print(type(error).__name__, error)
"""


def test_a_full_disk_is_one_sentence_and_loses_nothing(small, finished, tmp_path):
    "Catches a full disk that destroys the last checkpoint, or that is told as a traceback; a later call with room goes on from there."
    folder = interrupted(small(), tmp_path, 37)
    before = (folder / "checkpoint.pt").read_bytes()
    command = [sys.executable, "-c", DISK_FULL, json.dumps(small().to_dict()), str(tmp_path), str(len(before) // 2)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.stdout.startswith("RunError") and "could not be written" in told.stdout and "File too large" in told.stdout and told.stdout.count("\n") == 1, told.stdout + told.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before
    resumed = run(small(), tmp_path)
    assert results(resumed) == results(finished[1]) and resumed.provenance["resumed_at"] == 37


@pytest.fixture
def disk_full_for(monkeypatch):
    "Call it with a file's name: from then on writing that file finds no space. `undo` makes room again."
    real = runs.write_atomically

    def fill(name):
        def full(path, data, durable=True):
            if path.name == name:
                raise OSError(28, "No space left on device")
            real(path, data, durable)

        monkeypatch.setattr(runs, "write_atomically", full)

    fill.undo = monkeypatch.undo
    return fill


def test_results_that_cannot_be_written_are_not_lost(small, finished, tmp_path, disk_full_for):
    "Catches a disk that fills up after the last step: the training must not be repeated."
    disk_full_for("prediction.npz")
    with pytest.raises(RunError, match="No space left"):
        run(small(), tmp_path)
    disk_full_for.undo()
    again = run(small(), tmp_path)
    assert results(again) == results(finished[1]) and again.provenance["resumed_at"] == 60


def test_progress_that_cannot_be_written_is_reported_once(small, tmp_path, disk_full_for):
    "Catches a display that ends a training, or that warns a thousand times."
    disk_full_for("progress.json")
    reports = []
    assert run(small(), tmp_path, report=reports.append).status == "finished" and len(reports) == 1 and "No space left" in reports[0]


def test_progress_and_active(small, tmp_path):
    "Catches a finished or dead run listed as active, and an active one that is not."
    seen = []
    run(small(), tmp_path, progress=lambda state: seen.append((state, active(tmp_path))))
    state, listed = seen[-1]
    assert listed == [state] and {"key", "label", "step", "steps", "loss", "level", "value", "seconds", "eta_s", "pid"} <= set(state) and state["step"] == 60
    assert active(tmp_path) == [] == active(tmp_path / "missing")
    (tmp_path / small().key / "progress.json").write_text(json.dumps(state))  # left by a process that was killed
    assert active(tmp_path) == []


def test_the_lock_excludes_threads_and_outlives_nobody(tmp_path):
    "Catches a lock per process (flock on one descriptor), and a lock file that stays locked after its holder."
    folder, order = tmp_path / "run", []
    with locked(folder):
        thread = threading.Thread(target=lambda: [order.append("waiting"), locked(folder).__enter__(), order.append("second")])
        thread.start()
        time.sleep(0.3)
        order.append("first")
        with pytest.raises(KeyboardInterrupt), locked(folder, stop=lambda: True):
            pass
    thread.join(10)
    assert order == ["waiting", "first", "second"]


def test_trainings_share_the_places_that_a_batch_gives_them(small, tmp_path, monkeypatch):
    "Catches more trainings at a time than there are cores when notebooks run side by side, a place that stays taken after its holder, and one that a stopped batch waits for."
    monkeypatch.setenv("INR_PRECOND_SLOTS", "2")
    held, most, guard = [], [], threading.Lock()

    def work(k):
        with runs.training_slot(tmp_path):
            with guard:
                held.append(k); most.append(len(held))
            time.sleep(0.3)
            with guard: held.remove(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(5)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(20)
    assert len(most) == 5 and max(most) == 2 and not held
    with runs.training_slot(tmp_path), runs.training_slot(tmp_path):
        with pytest.raises(KeyboardInterrupt): run(small(), tmp_path, stop=lambda: True)
        monkeypatch.setenv("INR_PRECOND_SLOTS", "")
        assert run(small(), tmp_path).status == "finished"  # without the setting there is no limit
    monkeypatch.setenv("INR_PRECOND_SLOTS", "1")
    assert run(small(seed=1), tmp_path).status == "finished"


WANT = """
import json, sys
from inr_precond.runs import RunConfig, run
trained = []
print("ready", flush=True); sys.stdin.readline()
done = run(RunConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2], progress=lambda state: trained.append(1))
print(bool(trained), done.metrics_sha256)
"""


def program(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_processes_that_want_the_same_run(small, tmp_path):
    "Catches two writers in one folder: exactly one trains, the other waits and reads the same result."
    config = small(steps=3000)
    both = [program(WANT, json.dumps(config.to_dict()), tmp_path) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    outputs = [None, None]
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for i, process in enumerate(both):
        outputs[i] = process.communicate(timeout=600)[0].split()
    assert sorted(o[0] for o in outputs) == ["False", "True"] and outputs[0][1] == outputs[1][1]


KILLED = """
import json, os, sys
from inr_precond.runs import RunConfig, run
import inr_precond.train as train
save = train.Trainer.save
def save_and_die(self):
    save(self)
    if self.history.step >= int(sys.argv[3]): os.kill(os.getpid(), 9)
train.Trainer.save = save_and_die
run(RunConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2])
"""


def test_a_killed_run_resumes_and_equals_an_uninterrupted_one(small, tmp_path):
    "Catches a stale lock after kill -9, and anything that a resume in another process forgets: curve, evaluations, picture, final numbers."
    config = small(recipe="esgd/released", schedule="cosine", steps=400)
    process = program(KILLED, json.dumps(config.to_dict()), tmp_path / "cut", 200)
    process.communicate(timeout=600)
    assert process.returncode == -9 and (tmp_path / "cut" / config.key / "checkpoint.pt").exists()
    resumed = run(config, tmp_path / "cut")
    assert resumed.provenance["resumed_at"] >= 200 and results(resumed) == results(run(config, tmp_path / "whole"))


# --- sweeps

class Inline(Executor):
    "The least that the interface asks for: runs each task when it is submitted."

    def __init__(self):
        self.submitted = []

    def submit(self, fn, /, *args, **kwargs):
        self.submitted.append((fn, args))
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_sweep_keeps_the_order_trains_once_and_the_longest_first(small, tmp_path):
    "Catches results in the order of completion, a config trained twice, a short run that keeps the long one waiting, and tasks that only this process could run."
    configs = [small(seed=s, steps=n) for s, n in [(0, 20), (1, 80), (0, 20), (2, 40)]]
    executor = Inline()
    done = sweep(iter(configs), tmp_path, executor, progress=False)
    assert [r.config for r in done] == configs and done[0] is done[2]
    assert [json.loads(arguments[0])["steps"] for _, arguments in executor.submitted] == [80, 40, 20]
    for fn, arguments in executor.submitted:
        assert pickle.loads(pickle.dumps(fn)) is fn and pickle.loads(pickle.dumps(arguments)) == arguments


def test_curvature_counts_in_the_cost(small):
    "Catches a longest-first order that takes AdaHessian (three passes a step) for as short as Adam."
    assert runs.cost(small(recipe="adahessian-e/released")) == pytest.approx(3 * runs.cost(small())) and runs.cost(small(recipe="esgd/released")) == pytest.approx(1.02 * runs.cost(small()))


@pytest.mark.slow
def test_sweep_in_processes_equals_run_here(small, tmp_path):
    "Catches a result that depends on where it was computed, a worker that needs the caller's __main__, and a stop file that stays."
    configs = [small(), small(recipe="esgd/released")]
    there = sweep(configs, tmp_path / "there", workers=2, progress=False)
    assert [results(r) for r in there] == [results(run(c, tmp_path / "here")) for c in configs]
    assert there[0].provenance["threads"] == 1 and not list((tmp_path / "there").glob(".stop-*"))


def test_sweep_tells_what_failed_and_keeps_the_rest(small, tmp_path, monkeypatch):
    "Catches one failing run that stops the others, and a failure that is not named."
    real = runs.trainer

    def fail(config, **options):
        if config.seed == 1:
            raise MemoryError
        return real(config, **options)

    monkeypatch.setattr(runs, "trainer", fail)
    configs = [small(seed=s) for s in range(3)]
    with ThreadPoolExecutor(2) as pool, pytest.raises(SweepError, match=f"1 of 3 runs failed .{configs[1].key}: it ran out of memory") as caught:
        sweep(configs, tmp_path, pool, progress=False)
    assert list(caught.value.failures) == [configs[1].key] and "\n" not in str(caught.value)
    assert [damage(tmp_path / c.key) is None for c in configs] == [True, False, True]
    monkeypatch.undo()
    assert [r.status for r in sweep(configs, tmp_path, Inline(), progress=False)] == ["finished"] * 3


def test_sweep_passes_on_what_workers_found_damaged(small, finished, tmp_path):
    "Catches a warning given in a worker process, where nobody sees it."
    config, done = finished
    drop("curve.csv")(shutil.copytree(done.folder, tmp_path / config.key))
    with pytest.warns(UserWarning, match="curve.csv is missing.*rebuilt"):
        sweep([config], tmp_path, Inline(), progress=False)


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_only_its_own_run(small, tmp_path):
    "Catches BrokenProcessPool, which by itself fails every run that has not finished."
    configs = [small(steps=10**6), small(seed=1), small(seed=2), small(seed=3)]

    def kill():
        while not (found := [s for s in active(tmp_path) if s["steps"] == 10**6]):
            time.sleep(0.05)
        os.kill(found[0]["pid"], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SweepError, match="1 of 4 runs failed .*its process ended unexpectedly"):
        sweep(configs, tmp_path, workers=2, progress=False)
    thread.join()
    assert [damage(tmp_path / c.key) is None for c in configs] == [False, True, True, True]


SWEEP = """
import json, signal, sys
from inr_precond.runs import RunConfig, sweep
signal.signal(signal.SIGINT, signal.default_int_handler)
sweep([RunConfig.from_dict(c) for c in json.loads(sys.argv[1])], sys.argv[2], workers=2, progress=False)
"""


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_is_stopped_leaves_checkpoints_and_no_processes(small, tmp_path, how):
    "Catches Ctrl-C that starts the queued runs, workers that train on (or hang for ever) after their parent was killed, and progress lost."
    configs = [small(steps=10**6, seed=s) for s in range(4)]
    process = program(SWEEP, json.dumps([c.to_dict() for c in configs]), tmp_path)

    def both():
        found = active(tmp_path)
        return [s["pid"] for s in found] if len(found) == 2 and min(s["step"] for s in found) > 0 else []

    try:
        workers = wait_for(both)
        process.send_signal(how)
        error = process.communicate(timeout=300)[1]
        wait_for(lambda: not any(map(alive, workers)), 300)
    finally:
        process.kill()  # a test that fails leaves no training of a million steps behind
    steps = [load_checkpoint(p)["history"]["step"] for p in tmp_path.glob("*/checkpoint.pt")]
    assert process.returncode != 0 and len(steps) == 2 and min(steps) > 0 and active(tmp_path) == []
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in error and not list(tmp_path.glob(".stop-*"))


@pytest.mark.parametrize("bad, error", [(dict(workers=0), ValueError), (dict(workers=True), ValueError), (dict(workers=1.5), ValueError)])
def test_sweep_refuses(small, tmp_path, bad, error):
    "Catches a number of processes that means nothing."
    with pytest.raises(error, match="workers"):
        sweep([small()], tmp_path, **bad)
    with pytest.raises(TypeError, match="RunConfig"):
        sweep([{"steps": 3}], tmp_path)


def test_an_empty_sweep():
    "Catches a division by the number of runs."
    assert sweep([], "/tmp") == []


# --- display

STATE = {"key": "a", "label": "lion gaussian adam/released s0", "step": 320, "steps": 7680, "loss": 0.0123, "level": "psnr", "value": 19.1, "seconds": 3.0, "eta_s": 69.0, "pid": 1}


def shown(config, mode):
    display = Display([config], mode)
    display.steps = {"a": 7680, "b": 7680}
    return display


def test_lines_are_rare_and_compact(small, capsys, monkeypatch):
    "Catches a thousand carriage returns in a log."
    now = {"s": 0.0}
    monkeypatch.setattr(runs.time, "monotonic", lambda: now["s"])
    display = shown(small(), "lines")
    for i in range(250):  # 25 seconds
        now["s"] = i / 10
        display.update([STATE | {"step": 10 * i}])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and not any("\r" in line for line in lines) and "0/2 runs" in lines[0] and "lion gaussian adam/released s0  1,000/7,680 steps  loss 1.23e-02  PSNR 19.1 dB  1:09 left" in lines[1]


def test_terminal_shows_every_active_run(small, monkeypatch):
    "Catches a bar without the step, loss, PSNR or time left, and bars of finished runs that stay."
    text = io.StringIO()
    text.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", text)
    monkeypatch.delenv("INR_PRECOND_PROGRESS", raising=False)
    assert runs.display_mode() == ("terminal" if not ("IPython" in sys.modules and sys.modules["IPython"].get_ipython()) else "notebook")
    monkeypatch.setattr(runs.shutil, "get_terminal_size", lambda: os.terminal_size((150, 40)))
    with shown(small(), "terminal") as display:
        display.update([STATE, STATE | {"key": "b", "label": "second"}])
    for part in ("0/2 runs", "320/7,680 steps", "loss 1.23e-02", "PSNR 19.1 dB", "1:09 left", "second", "0 of 2 runs trained"):
        assert part in text.getvalue()


def test_notebook_updates_one_output(small, monkeypatch):
    "Catches a new output for each update, which fills the executed notebook."
    IPython = pytest.importorskip("IPython.display", reason="IPython is not installed")
    calls = []

    class Handle:
        def update(self, content, raw):
            calls.append(("update", content["text/plain"]))

    monkeypatch.setattr(IPython, "display", lambda content, raw, display_id: calls.append(("display", content["text/plain"])) or Handle())
    monkeypatch.setattr(runs.time, "monotonic", iter(range(1000)).__next__)
    with shown(small(), "notebook") as display:
        for _ in range(5):
            display.update([STATE])
        display.update([], ["a", "b"])
    assert [kind for kind, _ in calls] == ["display"] + ["update"] * 6 and "320/7,680" in calls[0][1] and calls[-1][1].startswith("2 of 2 runs trained")


@pytest.mark.parametrize("mode", ["none", "lines", "notebook", "terminal"])
def test_the_environment_chooses_the_display(monkeypatch, mode, small, capsys):
    "Catches a batch that cannot silence its notebooks."
    monkeypatch.setenv("INR_PRECOND_PROGRESS", mode)
    assert runs.display_mode() == mode
    if mode == "none":
        with Display([small()]) as display:
            display.update([STATE])
        assert capsys.readouterr() == ("", "")


def test_time_left_and_share(small, monkeypatch):
    "Catches resumed steps counted as work of this session, which would promise an end far too soon."
    now = {"s": 0.0}
    monkeypatch.setattr(runs.time, "monotonic", lambda: now["s"])
    display = shown(small(), "none")
    assert display.overall([STATE | {"step": 3840}]) == (0.25, None)
    now["s"] = 10.0
    assert display.overall([STATE | {"step": 7680}]) == (0.5, 20.0)


# --- records

def test_a_record_keeps_what_the_figures_need(finished, tmp_path):
    "Catches a record that loses a number, or that holds a picture of data that may not be copied."
    made = finished[1]
    kept = runs.RecordedRun(runs.record(made, tmp_path))
    for name in ("key", "status", "diverged_at", "final", "ms_per_step", "steps", "state_floats_per_parameter", "config", "provenance"):
        assert getattr(kept, name) == getattr(made, name), name
    assert kept.recorded and not made.recorded and kept.prediction() is None and kept.evals[["step", "mse", "psnr"]].equals(made.evals[["step", "mse", "psnr"]])
    assert (tmp_path / f"{made.key}.json").stat().st_size < 30_000 and kept.metrics_sha256 != made.metrics_sha256


@given(rows=st.integers(1, 40), lengths=st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_a_thinned_curve_keeps_the_mean_of_all_steps(rows, lengths):
    "Catches a mean of means that forgets how many steps a row stands for, and a last row that is lost."
    import pandas as pd

    steps = np.cumsum(lengths)
    losses = np.linspace(1, 2, len(steps)) ** 3
    thin = runs._thinned(pd.DataFrame({"step": steps, "seconds": steps / 100, "loss": losses}), rows)
    assert len(thin) <= rows and thin[-1][0] == steps[-1] and [r[0] for r in thin] == sorted({r[0] for r in thin})
    assert np.average([r[2] for r in thin], weights=np.diff([0, *(r[0] for r in thin)])) == pytest.approx(np.average(losses, weights=lengths), rel=1e-5)


@pytest.mark.parametrize("how", ["explicit", "environment"])
def test_a_sweep_reads_records_only_where_it_is_told(finished, tmp_path, monkeypatch, how):
    "Catches records that replace a training nobody asked to skip, and a request that is not heard."
    config, made = finished
    runs.record(made, tmp_path / "records")
    if how == "environment":
        monkeypatch.setenv("INR_PRECOND_RECORDS", str(tmp_path / "records"))
    (kept,) = sweep([config], tmp_path / "store", progress=False, records=tmp_path / "records" if how == "explicit" else None)
    assert kept.recorded and not (tmp_path / "store" / config.key).exists()
    monkeypatch.delenv("INR_PRECOND_RECORDS", raising=False)
    (trained,) = sweep([config], tmp_path / "store", ThreadPoolExecutor(1), progress=False)
    assert not trained.recorded and results(trained) == results(made)
    (preferred,) = sweep([config], tmp_path / "store", progress=False, records=tmp_path / "records")
    assert not preferred.recorded, "a run that was trained here comes before a record"


def test_records_are_found_by_config_without_the_image(finished, small, tmp_path, monkeypatch):
    "Catches a lookup that needs the picture, or that takes another seed's record for this one's."
    config, made = finished
    runs.record(made, tmp_path)
    monkeypatch.setattr(runs, "load_image", lambda *_: 1 / 0)
    assert [r.key for r in runs.recorded([small(seed=3), config, config], tmp_path)] == [made.key] and runs.recorded([small(seed=3)], tmp_path) == []
    monkeypatch.setattr(runs, "FORMAT", runs.FORMAT + 1)
    assert runs.recorded([config], tmp_path) == [], "a record of another format is not this run"


def rewritten(file, change):
    "The record with a change, under a digest that fits."
    values = json.loads(file.read_text()); change(values)
    file.write_text(json.dumps({**values, "digest": runs._digest(values)}))
    return file


@pytest.mark.parametrize("change, words", [(lambda v: v.update(format=99), "format 99"), (lambda v: (v.update(format=99), v.pop("cpu_seconds")), "format 99"), (lambda v: v["config"].update(recipe="esgd/future"), "recipe is 'esgd/future'")])
def test_a_record_of_another_version_is_left_out(finished, tmp_path, change, words):
    "Catches a KeyError of a field that the other format does not have, and a foreign record that stops the batch without its name."
    file = rewritten(runs.record(finished[1], tmp_path), change)
    assert runs.recorded([finished[0]], tmp_path) == []
    with pytest.raises(ValueError, match=f"the record {file.name} .*{words}.* record the run anew"): runs.RecordedRun(file)


def test_a_record_that_lacks_a_number_is_refused_in_a_sentence(finished, tmp_path):
    "Catches a KeyError."
    rewritten(runs.record(finished[1], tmp_path), lambda v: v.pop("cpu_seconds"))
    with pytest.raises(ValueError, match="the record .* cannot be read"): runs.recorded([finished[0]], tmp_path)


def test_a_record_under_another_runs_name_is_refused(finished, small, tmp_path):
    "Catches one run's curve passed off as another's: a sweep finds a record by the name of its file."
    other = small(seed=3)
    file = runs.record(finished[1], tmp_path / "records")
    file.rename(file.with_name(f"{other.key}.json"))
    with pytest.raises(ValueError, match="its digest or its name"): sweep([other], tmp_path / "store", progress=False, records=tmp_path / "records")


@pytest.mark.parametrize("how", ["digit", "half", "key", "empty"])
def test_a_forged_record_is_refused_in_a_sentence(finished, tmp_path, how):
    "Catches a number that somebody improved by hand."
    file = runs.record(finished[1], tmp_path)
    text = file.read_text()
    psnr = repr(finished[1].final["psnr"])
    file.write_text({"digit": text.replace(psnr, repr(float(psnr) + 1)), "half": text[: len(text) // 2], "key": text.replace(finished[0].key, "x" + finished[0].key), "empty": "{}"}[how])
    with pytest.raises(ValueError, match=r"the record .* (was altered|cannot be read) .*remove it, or restore it"):
        runs.recorded([finished[0]], tmp_path)


# --- real data

@pytest.mark.data
def test_the_lion(tmp_path):
    "Catches a real image that the run's path through loader, metrics and LPIPS does not survive."
    done = run(RunConfig(image="lion", image_size=64, hidden_features=16, num_layers=3, steps=40), tmp_path)
    assert done.status == "finished" and done.provenance["data"]["name"] == "lion" and 0 < done.final["lpips"] < 2


def test_only_records_of_that_name_are_read(finished, tmp_path):
    "Catches thousands of files read for one: seconds in each process that draws a recorded curve. A damaged record of another recipe is none of this question's business; of this one it is."
    runs.record(finished[1], tmp_path)
    (tmp_path / "sine-adam-released-s0-0123456789abcdef.json").write_text("{}")
    assert [r.key for r in runs.recorded([finished[0]], tmp_path)] == [finished[0].key]
    (tmp_path / f"{finished[0].stem}-0123456789abcdef.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"): runs.recorded([finished[0]], tmp_path)


# ---- the records --------------------------------------------------------------------------------------------------------------------------

def _recorded_data():
    "One record of each signal that records were made of, by what is loaded."
    first = {}
    for file in sorted(runs.RECORDS.glob("*.json")):
        kept = json.loads(file.read_text())
        first.setdefault(tuple(kept["config"].get(name) for name in ("task", "image", "image_size", "shape", "scene", "view_size", "holdout")), kept)
    return first


def test_every_record_of_the_repository_is_whole_and_found_by_its_config():
    "Catches one that was altered, or lies under a name by which nobody looks for it."
    kept = [runs.RecordedRun(file) for file in sorted(runs.RECORDS.glob("*.json"))]
    assert len(kept) > 2_000 and [r.key for r in runs.recorded([r.config for r in kept])] == [r.key for r in kept]


@pytest.mark.data
def test_records_belong_to_the_data_as_it_is_read_today():
    "Catches a change of a signal's hash (or of its pixels, triangles, cameras), by which records go unused and every run is made anew."
    first = _recorded_data()
    assert {"image", "occupancy", "radiance"} <= {kept["config"].get("task", "image") for kept in first.values()}
    for kept in first.values():
        assert RunConfig.from_dict(kept["config"]).data().sha256 == kept["resolved"]["data_sha256"], kept["key"]


def test_records_of_the_embedded_picture_too():
    "The same where no data is at hand."
    embedded = [kept for kept in _recorded_data().values() if kept["config"].get("image") == "astronaut"]
    assert embedded
    for kept in embedded:
        assert RunConfig.from_dict(kept["config"]).data().sha256 == kept["resolved"]["data_sha256"], kept["key"]
