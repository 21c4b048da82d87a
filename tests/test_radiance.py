"Radiance fields: the task, the config, the run and its folder, records; on the embedded scene, whose cameras are exact."
import dataclasses
import hashlib
import json
import math
import os
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graph import RECORDERS

from inr_precond import claims, figures, metrics, occupancy, radiance, render, reproduce, runs
from inr_precond.curvature import Problem, hessian, hvp
from inr_precond.data.scenes import Scene, fingerprint, sphere_poses
from inr_precond.optim import ESGD, Adam
from inr_precond.render import NeRFField, RadianceField, camera_rays, render_view
from inr_precond.runs import RunConfig, RunError, record, recorded, run, sweep
from inr_precond.train import GraphStep, RadianceTask, Trainer, evaluated_views, stream

SMALL = {"task": "radiance", "scene": "knot", "view_size": 16, "test_views": 2, "samples": 8, "batch_size": 64, "sigma": .3, "density_bias": -2., "hidden_features": 16, "num_layers": 3, "steps": 60, "evaluations": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = RunConfig(**SMALL, recipe="esgd/released", options={"update_every": 10, "warmup": 5})
    return config, run(config, tmp_path_factory.mktemp("store"))


def numbered(train=3, test=2, side=6):
    "A Scene whose pixels say which one they are: red the view, green the row, blue the column."
    n = train + test
    view, row, column = torch.meshgrid(*(torch.arange(k, dtype=torch.uint8) for k in (n, side, side + 2)), indexing="ij")
    lens = torch.tensor([[side + k, side + 1. + k, side / 2 + 1, side / 2 + .25] for k in range(n)], dtype=torch.float64)  # of each view another
    return Scene("numbers", torch.stack([view, row, column], -1), sphere_poses(n), lens, 1., 4., {"train": [4, 0, 2][:train], "test": [1, 3][:test]})


def rays_alone(origins, directions, generator=None):
    "Rows that hold the rays and one number of chance."
    chance = torch.zeros(len(origins), 1) if generator is None else torch.rand(len(origins), 1, generator=generator)
    return torch.cat([origins, directions, chance], 1)


# ---- the task ---------------------------------------------------------------------------------------------------------------------------------

def test_an_epoch_visits_each_training_pixel_once_with_its_own_ray():
    "Catches held-out pixels in the training, sampling with replacement, a row or column exchanged, and a camera of another view."
    scene = numbered()
    task, generator = RadianceTask(scene, rays_alone, batch_size=25), stream(3, "batches")
    epochs = [[task.batch(generator) for _ in range(task.steps_per_epoch)] for _ in range(2)]
    for epoch in epochs:
        inputs, targets = (torch.cat(parts) for parts in zip(*epoch))
        view, row, column = (targets * 255).round().long().unbind(1)
        assert sorted(zip(view.tolist(), row.tolist(), column.tolist())) == [(v, i, j) for v in (0, 2, 4) for i in range(6) for j in range(8)]
        origins, directions = camera_rays(scene.poses[view], scene.intrinsics[view], torch.stack([row, column], 1))
        torch.testing.assert_close(inputs[:, :6], torch.cat([origins, directions], 1).float(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1]) and [len(y) for _, y in epochs[0]][-1] == 144 % 25


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 40), st.integers(1, 200))
def test_a_resumed_task_goes_on_with_the_same_batches(done, batch):
    "The checkpoint holds an epoch's seed, not its order: catches another order after the resume, and a position of another epoch."
    task, generator = RadianceTask(numbered(), rays_alone, batch), stream(1, "batches")
    for _ in range(done):
        task.batch(generator)
    state, at = json.loads(json.dumps(task.state_dict())), generator.get_state()
    expected = [task.batch(generator) for _ in range(5)]
    other, generator = RadianceTask(numbered(), rays_alone, batch), torch.Generator()
    generator.set_state(at)
    other.load_state_dict(state)
    assert all(torch.equal(p, q) for made in expected for p, q in zip(made, other.batch(generator)))


def test_photographs_lie_in_memory_once_and_as_bytes():
    "Catches a bank of float colours or of ready-made rays: 16 million pixels would take 200 and 400 MB more."
    task = RadianceTask(numbered(), rays_alone)
    assert task.targets.dtype == torch.uint8 and task.inputs.shape == (3, 16) and task.batch_size == 144


def test_a_step_asks_the_device_for_nothing(monkeypatch):
    "Inside an epoch no number is read back: catches a check of the pose, or an .item(), in each batch."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            assert op is not torch.ops.aten._local_scalar_dense.default
            return op(*args, **(kwargs or {}))

    field = RadianceField(NeRFField(2, 8, skips=(), colour_features=4), 1., 4., 4, density_noise=.1)
    task, generator = RadianceTask(numbered(), field.inputs, 20), stream(0, "batches")
    task.batch(generator)
    with Watch():
        inputs, _ = task.batch(generator)
    assert inputs.shape == (20, 9 + 2 * 4)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_a_batch_size_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="batch_size is .*2,048 rays"):
        RadianceTask(numbered(), rays_alone, wrong)


def test_a_scene_without_held_out_views_is_refused():
    with pytest.raises(ValueError, match="has no views for test"):
        RadianceTask(dataclasses.replace(numbered(), split={"train": range(5)}), rays_alone)


def test_a_scene_with_validation_views_alone_is_evaluated_on_them():
    "A nerfstudio file that names pictures for train and val: a bare KeyError 'test' once the training had begun."
    scene = dataclasses.replace(numbered(), split={"train": range(3), "val": (3, 4)})
    assert evaluated_views(scene) == [3, 4] and evaluated_views(dataclasses.replace(scene, split={"train": range(3), "val": (3,), "test": (4,)})) == [4]
    RadianceTask(scene, rays_alone)


def test_the_evaluation_against_pixels_one_by_one():
    "Catches a PSNR of the mean error in place of the mean PSNR, a training view among the held-out ones, and training rays that are not at midpoints."
    scene = numbered()
    field = RadianceField(NeRFField(2, 8, skips=(), colour_features=4, generator=stream(0, "initialisation")), 1., 4., 5)
    task = RadianceTask(scene, field.inputs, chunk=7)
    found = task.evaluate(field)
    errors = [(render_view(field, scene.poses[k].float(), scene.intrinsics[k].float(), 6, 8).colour.double() - scene.images[k] / 255).square().mean().item() for k in (1, 3)]
    assert found["mse"] == pytest.approx(np.mean(errors), rel=1e-6) and found["psnr"] == pytest.approx(np.mean([-10 * math.log10(e) for e in errors]), rel=1e-6)
    seen = [(render_view(field, scene.poses[k].float(), scene.intrinsics[k].float(), 6, 8).colour.double() - scene.images[k] / 255).square() for k in (0, 2, 4)]
    assert found["train_psnr"] == pytest.approx(-10 * math.log10(torch.stack(seen).mean().item()), rel=1e-6)  # 144 pixels, fewer than 4,096: all
    assert RadianceTask(scene, field.inputs, test_views=1).evaluate(field)["mse"] == pytest.approx(errors[0], rel=1e-6)


def test_a_field_that_is_not_finite_is_a_divergence():
    field = RadianceField(NeRFField(2, 8, skips=(), colour_features=4), 1., 4., 4)
    trainer = Trainer(field, RadianceTask(numbered(), field.inputs, 20), Adam(field.parameters(), lr=1e-3), 3, stream(0, "batches"))
    with torch.no_grad():
        field.field.colour_head.weight.fill_(math.nan)
    assert trainer.train().status == "diverged" and trainer.loss == "mse"


def test_the_steps_schedule():
    "Four equal stages, the last at the final factor: catches a stage that begins a step late and a factor beyond the last."
    from inr_precond.train import lr_factor
    factor = lr_factor("steps", 400, .125)
    assert [round(factor(t), 6) for t in (0, 99, 100, 199, 200, 300, 399, 400, 1000)] == [1, 1, .5, .5, .25, .125, .125, .125, .125]


# ---- the config -------------------------------------------------------------------------------------------------------------------------------

def test_the_tasks_defaults():
    "Section 4.3 and 7.8: 8 layers of 256, 2,048 rays of 128 points; catches a scene's field in a picture's config."
    config = RunConfig(task="radiance", scene="knot")
    assert (config.num_layers, config.hidden_features, config.batch_size, config.samples, config.view_size, config.image, config.shape) == (8, 256, 2048, 128, 400, None, None)
    assert RunConfig().num_layers == RunConfig(task="occupancy").num_layers == 5 and RunConfig().samples is None
    assert config.signal == "knot" and config.kind == "scene" and config.label.startswith("knot gaussian")


@pytest.mark.parametrize("wrong, words", [({"image": "lion"}, "has no image"), ({"points": 100}, "has no points"), ({"scene": "legoo"}, "did you mean 'lego'"), ({"samples": 0}, "samples is 0"), ({"rule": "right"}, "rule is 'right'"),
                                          ({"density": "exp"}, "density is 'exp'"), ({"holdout": "first"}, "holdout is 'first'"), ({"ndc": 1}, "ndc is 1"), ({"activation": "gabor", "sigma": None}, "no complex layers"),
                                          ({"num_layers": 1}, "needs at least 2"), ({"density_noise": -1.}, "density_noise is -1"), ({"scene": 7}, "scene is 7"), ({"initialisation": "zeros"}, "initialisation is 'zeros'")])
def test_a_wrong_field_is_one_sentence(wrong, words):
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        RunConfig(**{**SMALL, **wrong})
    assert "\n" not in str(caught.value)


def test_what_decides_the_training_decides_the_key():
    "Catches two trainings that share a folder."
    changes = ({}, {"view_size": 17}, {"test_views": 3}, {"samples": 9}, {"rule": "midpoint"}, {"density": "relu"}, {"density_bias": -1.}, {"density_noise": .1}, {"view_frequencies": 2}, {"centred_layers": 1}, {"initialisation": "xavier"}, {"seed": 1})
    assert len({RunConfig(**{**SMALL, **change}).key for change in changes}) == len(changes)


def test_the_network_is_the_one_of_the_paper():
    "Catches widths, skips or bounds of another scene: 8 x 256 with the skip at the fifth layer and a 128-wide colour branch."
    model = runs.network(RunConfig(**{**SMALL, "hidden_features": 256, "num_layers": 8, "view_frequencies": 4, "activation": "relu-pe", "sigma": None, "num_frequencies": 10}))
    field = model.field
    assert [layer.weight.shape[1] for layer in field.layers] == [63, 256, 256, 256, 256 + 63, 256, 256, 256] and field.colour_layer.weight.shape == (128, 256 + 27)
    assert (model.near, model.far, model.samples, model.last) == (2., 4., 8, "far") and torch.equal(model.background, torch.ones(3))
    two = (runs.network(RunConfig(**SMALL, recipe=name)) for name in ("adam/released", "esgd/released"))
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in two)))


def test_a_forward_facing_scene_has_inverse_depth_or_ndc(fern):
    "BARF's law for LLFF scenes, 1/depth from 1 to 0, and NDC where it is asked for: catches metric bounds in their place."
    common = {**SMALL, "scene": fern, "view_size": 24}
    barf, ndc = runs.network(RunConfig(**common)), runs.network(RunConfig(**common, ndc=True))
    assert (barf.near, barf.far, barf.inverse_depth, barf.background) == (1., math.inf, True, None)
    assert (ndc.near, ndc.far, ndc.inverse_depth) == (0., 1., False) and ndc.ndc is not None


@pytest.fixture
def fern(tmp_path):
    "A forward-facing scene of seven photographs in LLFF's layout."
    from PIL import Image
    rows = []
    (tmp_path / "small" / "images").mkdir(parents=True)
    for k in range(7):
        Image.fromarray(np.full((24, 32, 3), 30 * k, np.uint8)).save(tmp_path / "small" / "images" / f"{k:03}.png")
        pose = np.concatenate([np.eye(3)[:, [1, 0, 2]] * [-1, 1, 1], [[.1 * k], [0.], [0.]], [[24.], [32.], [30.]]], 1)
        rows.append(np.concatenate([pose.ravel(), [2., 9.]]))
    np.save(tmp_path / "small" / "poses_bounds.npy", np.array(rows))
    return str(tmp_path / "small")


# ---- runs -------------------------------------------------------------------------------------------------------------------------------------

def test_a_run_has_what_the_tables_need(finished):
    config, done = finished
    assert sorted(p.name for p in done.folder.iterdir()) == sorted([*runs.RESULTS["radiance"], "metrics.json"])
    assert list(done.evals) == ["step", "seconds", "cpu_seconds", "mse", "psnr", "train_psnr"]
    assert done.final["psnr"] == done.evals.psnr.iloc[-1] == pytest.approx(np.mean(done.final["view_psnr"]), abs=1e-4) and len(done.final["view_ssim"]) == 2
    assert done.final["ssim"] == pytest.approx(np.mean(done.final["view_ssim"])) and done.provenance["data"]["name"] == "knot" and "PSNR" in repr(done)


def test_the_weights_are_the_trained_network(finished):
    "The stored network must give the stored evaluation, bit for bit, and its views the stored metrics."
    config, done = finished
    model, scene = done.trained(), config.data().subset("test")
    assert runs.task_of(config, model=model).evaluate(model)["psnr"] == done.final["psnr"]
    view = render_view(model, scene.poses[15].float(), scene.intrinsics[15].float(), 16, 16).colour
    assert metrics.psnr(view, scene.images[15] / 255) == pytest.approx(done.final["view_psnr"][1], abs=1e-9)


def test_what_a_gpu_trained_is_read_on_the_cpu(finished):
    "Catches a step mode that the CPU refuses, which would lose every run recorded as graphs."
    _, done = finished
    elsewhere = runs.Run(done.folder)
    elsewhere.config = dataclasses.replace(done.config, device="cuda", step_mode="graph", products="tf32")
    assert all(torch.equal(p, q) for p, q in zip(elsewhere.trained().parameters(), done.trained().parameters()))


def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path):
    "Bit for bit, depths included; twice cut."
    config, done = finished
    for at in (17, 41):
        count = iter(range(10_000))
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path, stop=lambda at=at, count=count: next(count) >= at)
    again = run(config, tmp_path)
    assert again.provenance["resumed_at"] > 17 and again.final == done.final and again.curve.loss.tolist() == done.curve.loss.tolist()
    assert all(torch.equal(p, q) for p, q in zip(again.trained().parameters(), done.trained().parameters()))


def test_a_sweep_of_two_processes_gives_the_numbers_of_one_and_renders_once(finished, tmp_path):
    config, done = finished
    first, other = sweep([config, dataclasses.replace(config, seed=1)], tmp_path, workers=2, progress=False)
    assert first.final == done.final and other.final != done.final and len(list((tmp_path / ".scenes").glob("*.views"))) == 1


def test_a_record_keeps_the_numbers_of_each_view(finished, tmp_path):
    config, done = finished
    record(done, tmp_path)
    kept, = recorded([config], tmp_path)
    assert kept.final == done.final and kept.evals.train_psnr.tolist() == done.evals.train_psnr.tolist() and kept.trained() is None


def test_a_diverged_run_has_no_numbers(tmp_path):
    made = run(RunConfig(**{**SMALL, "activation": "relu", "sigma": None}, recipe="sgd/released", options={"lr": 1e30}), tmp_path)  # a Gaussian would be 0 there, and finite
    assert made.status == "diverged" and made.final["psnr"] is made.final["view_psnr"] is made.final["lpips"] is None


def test_its_hessian_vector_products_belong_to_the_loss():
    "ESGD's probe on a batch with drawn depths: catches depths that are drawn anew in the second pass."
    field = RadianceField(NeRFField(2, 6, skips=(), colour_features=4, generator=stream(0, "initialisation"), dtype=torch.float64), 1., 4., 4)
    task = RadianceTask(numbered(), field.inputs, 20, dtype=torch.float64)
    problem = Problem(field, *task.batch(stream(0, "batches")))
    v = [torch.randn(p.shape, dtype=p.dtype, generator=stream(k, "probes")) for k, p in enumerate(problem.params)]
    flat = torch.cat([t.reshape(-1) for t in hvp(problem, problem.params, v)])
    torch.testing.assert_close(flat, hessian(problem, problem.params) @ torch.cat([t.reshape(-1) for t in v]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [lambda p: Adam(p, lr=.01), lambda p: ESGD(p, lr=.1, update_every=4, warmup=3, seed=1)], ids=["Adam", "ESGD"])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_recorded_step_is_the_step(recorder, make):
    "With drawn depths and a background: catches depths or a background frozen in the recording, and a number that the field reads from the device."
    record, device = recorder
    paths = []
    for wrap in (lambda optimizer: optimizer.step, lambda optimizer: GraphStep(optimizer, record)):
        field = RadianceField(NeRFField(3, 8, skips=(2,), colour_features=4, generator=stream(0, "initialisation"), dtype=torch.float64, device=device), 1., 4., 4, background="white", density_noise=.1)
        task, generator = RadianceTask(numbered(), field.inputs, 48, device=device, dtype=torch.float64), stream(0, "batches", device)
        step = wrap(make(field.parameters()))
        losses = [step(Problem(field, *task.batch(generator), "mse")) for _ in range(18)]
        paths.append(torch.cat([torch.stack(losses), *(p.detach().flatten() for p in field.parameters())]))
    torch.testing.assert_close(paths[1], paths[0], rtol=1e-9, atol=1e-11)
    assert step.recorded


def test_cuda_configs_record_what_can_be_recorded():
    "On a GPU: catches graphs asked of a recipe that cannot be recorded, which would be refused, and eager steps where graphs are possible."
    modes = {name: RunConfig(**SMALL, recipe=name, **runs.on_device("cuda", name)).step_mode for name in ("adam/released", "esgd/mended", "kfac/mended", "shampoo/mended")}
    assert modes == {"adam/released": "graph", "esgd/mended": "graph", "kfac/mended": "eager", "shampoo/mended": "eager"} and runs.on_device("cpu", "adam/released")["step_mode"] == "eager"
    assert {c.device for c in radiance.configs("full", *radiance.TABLES[5], [("lego", 0)], "cuda")} == {"cuda"} and {c.step_mode for c in occupancy.configs("full", ["sgd/released"], [("dragon", 0)], device="cuda")} == {"graph"}


# ---- comparison and batch -----------------------------------------------------------------------------------------------------------------------

def made_up(recipe, seed, last, steps=30_000, scene="lego", size=400):
    "A run whose training PSNR rises linearly to `last`; held out it is 1 dB lower."
    step = np.linspace(0, steps, 41).astype(int)
    level = last * step / steps
    evals = pd.DataFrame({"step": step, "seconds": step * .1, "cpu_seconds": step * .1, "mse": 10 ** (-level / 10), "psnr": level - 1, "train_psnr": level})
    config = SimpleNamespace(task="radiance", signal=scene, scene=scene, recipe=recipe, options={}, seed=seed, view_size=size, batch_size=2048, steps=steps, schedule="constant", final_lr_factor=None)
    return SimpleNamespace(config=config, key=f"{recipe}{seed}", status="finished", diverged_at=None, evals=evals, curve=pd.DataFrame({"step": step[1:], "seconds": step[1:] * .1, "loss": 10 ** (-level[1:] / 10)}),
                           final={"train_psnr": last, "psnr": last - 1, "best_psnr": last - 1, "ssim": .8, "lpips": .1}, ms_per_step=100., state_floats_per_parameter=2., metrics_sha256="", recorded=False, provenance={})


def test_runs_are_compared_by_the_training_psnr_and_show_the_held_out_one():
    "The paper's iterations are to Adam's training PSNR: catches a comparison by the held-out PSNR."
    groups = {"Adam": [made_up("adam/released", s, 20.) for s in range(5)], "ESGD released": [made_up("esgd/released", s, 25. + .1 * s) for s in range(5)]}
    rows = figures.measure(groups)
    own = rows[rows.method == "ESGD released"]
    assert own.difference.tolist() == pytest.approx([5 + .1 * s for s in range(5)]) and own.steps_to_target.tolist() == pytest.approx([30_000 * 20 / (25 + .1 * s) for s in range(5)])
    table = figures.result_table(rows)
    assert "training PSNR (dB)" in table and "held-out PSNR (dB)" in table and "above (difference +5.20 dB" in figures.conclude(rows, "ESGD released")
    assert claims.ends_above(rows, "ESGD released", "Adam")["unit"] == "dB"
    axes = figures.convergence(groups).axes
    assert {ax.get_xlabel() for ax in axes} >= {"thousands of steps", "training time, whole steps (s)"} and max(axes[0].lines[0].get_xdata()) == 30
    assert figures.convergence_by_signal(groups).axes


def rows_of(esgd, seeds=5, scatter=0., held_out=0., **more):
    "Adam at 20 dB and another method; its held-out PSNR is off by `held_out`."
    groups = {"Adam": [made_up("adam/released", s, 20.) for s in range(seeds)], "ESGD released": [made_up("esgd/released", s, esgd + .01 * s + scatter * (-1) ** s, **more) for s in range(seeds)]}
    rows = figures.measure(groups)
    rows.loc[rows.method == "ESGD released", "psnr"] = 19. + held_out + .01 * rows[rows.method == "ESGD released"].seed
    return rows


@pytest.mark.parametrize("rows, verdict", [({"esgd": 22.}, claims.REPRODUCED), ({"esgd": 22., "held_out": -1.}, claims.REJECTED), ({"esgd": 18.}, claims.REJECTED), ({"esgd": 20., "scatter": 2.}, claims.UNDECIDED), ({"esgd": 22., "steps": 300}, claims.UNDECIDED)])
def test_the_three_verdicts_of_esgd_nerf(rows, verdict):
    "Catches a margin of the wrong sign, methods exchanged, the training PSNR in place of the held-out one, and short runs that rank."
    assert claims.judge("esgd-nerf", claims.from_rows("esgd-nerf", rows_of(**rows))["esgd-nerf"]["printed"]).verdict == verdict


@pytest.mark.parametrize("esgd, scatter, verdict", [(19., 0., claims.REPRODUCED), (21., 0., claims.REJECTED), (19.7, 1., claims.UNDECIDED)])
def test_the_three_verdicts_of_relu_pe_nerf(esgd, scatter, verdict):
    assert claims.judge("relu-pe-nerf", claims.from_rows("relu-pe-nerf", rows_of(esgd, scatter=scatter))["relu-pe-nerf"]["printed"]).verdict == verdict


def test_adam_beats_sgd_on_scenes_needs_each_network():
    above = {"differences": [1., 1.1, .9, 1.2, 1.], "pairs": [["fern", k] for k in range(5)]}
    below = {**above, "differences": [-1., -1.1, -.9, -1.2, -1.]}
    judged = lambda **other: claims.judge("adam-beats-sgd-nerf", claims.evidence("adam-beats-sgd-nerf", parts={**dict.fromkeys(claims.RADIANCE, above), **other})).verdict
    assert judged() == claims.REPRODUCED and judged(ReLU=below) == claims.REJECTED and judged(ReLU={**above, "differences": [1., -1., 1., -1., .5]}) == claims.UNDECIDED


def test_a_run_that_diverged_counts_against_the_held_out_views():
    "Catches a divergence that is left out, which would reward it."
    rows = rows_of(22.)
    rows.loc[rows.method == "ESGD released", ["status", "psnr"]] = ["diverged", np.nan]
    assert max(claims.held_out(rows, "ESGD released", "Adam")["differences"]) < -18


# ---- the plan -----------------------------------------------------------------------------------------------------------------------------------

def test_the_published_tables_against_the_papers_own_sums():
    "Means of columns, taken from another transcript of the paper: catches a digit mistyped and two columns exchanged."
    means = {(n, optimizer): radiance.published(n).query("optimizer == @optimizer")[column].mean() for n, optimizer, column in
             ((1, "adam", "seconds"), (1, "esgd", "psnr"), (2, "sgd", "train_psnr"), (3, "adam", "lpips"), (4, "esgd", "ssim"), (5, "esgd", "iterations"), (6, "adam", "psnr"))}
    assert {k: round(v, 3) for k, v in means.items()} == {(1, "adam"): 431.136, (1, "esgd"): 23.566, (2, "sgd"): 20.118, (3, "adam"): .326, (4, "esgd"): .472, (5, "esgd"): 102., (6, "adam"): 40.974}
    with pytest.raises(ValueError, match="the paper has 1 to 6"):
        radiance.published(7)


def test_every_published_number_as_it_was_compared_with_the_transcript():
    "Catches slips in columns whose means nobody took, and two that cancel in a mean. The hash is that of the 60 rows when they equalled the transcript's."
    words = lambda v: v if isinstance(v, str) else "" if math.isnan(v) else f"{v:g}"
    rows = [",".join([str(number), *map(words, row)]) for number in range(1, 7) for row in radiance.published(number)[["scene", "optimizer", "train_psnr", "iterations", "seconds", "psnr", "ssim", "lpips"]].itertuples(index=False)]
    assert len(rows) == 60 and hashlib.sha256("\n".join(rows).encode()).hexdigest() == "257d6524cc70c79ea7d7834d1a11230bfeee136c47d900a9eb067252ecbf97cd"


def test_full_is_the_papers_setting_and_the_tables_share_runs():
    "200,000 steps of 2,048 rays with 128 points, 8 x 256, the rates of section 7.8; catches Adam trained twice for Tables 3 and 4."
    for number, (data, network, recipes) in radiance.TABLES.items():
        for c in radiance.configs("full", data, network, recipes, radiance.pairs_of("full", list(radiance.SCENES[data]))):
            assert (c.steps, c.batch_size, c.samples, c.num_layers, c.hidden_features, c.density_bias, c.test_views) == (200_000, 2048, 128, 8, 256, 0., 0) and c.view_size == (400 if number == 5 else 640)
    made = {n: radiance.configs("quick", *radiance.TABLES[n], [("fern", 0)]) for n in radiance.TABLES}
    assert made[3][0] == made[4][0] and made[2][0] != made[3][0] and made[1][0] not in made[5]
    lego = {c.recipe: c for c in radiance.configs("full", *radiance.TABLES[5], [("lego", 0)])}
    assert lego["adam/released"].options["lr"] * lego["adam/released"].final_lr_factor == pytest.approx(5e-6) and lego["esgd/mended"].options["lr"] * lego["esgd/mended"].final_lr_factor == pytest.approx(.01)
    sgd = radiance.configs("full", *radiance.TABLES[2], [("fern", 0)])[1]
    assert sgd.options["lr"] * sgd.final_lr_factor == pytest.approx(1e-4) and sgd.schedule == "exponential"


def test_without_data_the_knot_takes_the_place(monkeypatch, tmp_path):
    monkeypatch.setenv("INR_PRECOND_DATA", str(tmp_path))
    assert [radiance.scenes_of(data, "full") for data in radiance.SCENES] == [["knot"]] * 3 and radiance.scenes_of("llff", "quick", "fern, a/b") == ["fern", "a/b"]  # named: catches one that is left out without a word
    assert radiance.pairs_of("laptop", ["a", "b"]) == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 5)]
    assert radiance.pairs_of("laptop", ["a", "b", "c"], [3, 7]) == [("a", 3), ("a", 7), ("b", 8), ("c", 9)]  # a list of seeds, which the batch accepts, was a TypeError


def test_the_mean_colour_is_worth_what_it_is(finished):
    "Against numpy: catches the mean of the held-out views themselves, and all of them in place of those evaluated."
    config, _ = finished
    scene = config.data()
    train, test = scene.subset("train").images.numpy() / 255, scene.subset("test").images.numpy()[[0, 15]] / 255
    assert radiance.baseline(config) == pytest.approx(np.mean([-10 * math.log10(((v - train.reshape(-1, 3).mean(0)) ** 2).mean()) for v in test]))


def test_baselines_are_named_as_the_tables_name_scenes(fern, monkeypatch):
    "A BLEFF scene is called bleff/balls and stands as balls in a table of runs: catches a name that no row has."
    config = RunConfig(**{**SMALL, "scene": fern, "view_size": 24})
    rows = figures.measure({"Adam": [made_up("adam/released", 0, 20., scene="bleff/balls")]})
    assert list(radiance.baselines([config, config])) == ["small"] and rows.scene.tolist() == ["balls"]


def of_table_5(scene="lego"):
    "Rows of Adam and both forms of ESGD on one scene."
    return figures.measure({"Adam": [made_up("adam/released", 0, 20., scene=scene)], "ESGD released": [made_up("esgd/released", 0, 25., scene=scene)], "ESGD mended": [made_up("esgd/mended", 0, 15., scene=scene)]})


def test_the_table_beside_the_published_one():
    "Catches another optimizer's numbers, seconds of the update alone among those of whole steps, and a scene that stands apart from its published rows."
    table = radiance.comparison(5, of_table_5(), {"lego": 11.})
    assert table.loc[("lego", "ESGD, published"), ["steps", "steps to Adam's", "seconds to it, update alone"]].tolist() == [80_000, 80_000, 179.59] and table.loc[("lego", "Adam, published"), "held-out PSNR (dB)"] == 25.37
    assert table["seconds to it, whole steps"].dropna().index.tolist() == [("lego", "Adam"), ("lego", "ESGD released")] and list(table.index[:6]) == [("lego", m) for m in ("Adam", "ESGD released", "ESGD mended", "mean colour", "Adam, published", "ESGD, published")]
    half = figures.measure({"Adam": [made_up("adam/released", s, 20.) for s in (0, 1)], "ESGD released": [made_up("esgd/released", 0, 25.), made_up("esgd/released", 1, 15.)]})
    assert math.isnan(radiance.comparison(5, half).loc[("lego", "ESGD released"), "seconds to it, whole steps"])  # one of two never arrived
    assert table.loc[("lego", "ESGD released"), "steps to Adam's"] == pytest.approx(24_000) and math.isnan(table.loc[("lego", "ESGD mended"), "steps to Adam's"]) and table.loc[("lego", "mean colour"), "held-out PSNR (dB)"] == 11.
    shown = radiance.shown(table)  # as read: catches steps with decimals, and NaN in a cell that holds nothing
    assert shown.loc[("lego", "ESGD released"), "steps to Adam's"] == "24,000" and shown.loc[("lego", "Adam, published"), "held-out PSNR (dB)"] == "25.37"
    assert shown.loc[("lego", "ESGD mended"), "steps to Adam's"] == "" and shown.loc[("lego", "mean colour"), "held-out PSNR (dB)"] == "11.00"


@pytest.mark.parametrize("number, optimizers", [(1, "ESGD"), (2, "SGD"), (3, "SGD"), (4, "ESGD"), (5, "ESGD"), (6, "ESGD")])
def test_published_rows_are_shown_whatever_scene_was_trained(number, optimizers):
    "Catches a table of the embedded scene beside which nothing stands, which is what a reader without data had."
    table, facts = radiance.comparison(number, of_table_5("knot")), radiance.published(number)
    own = table[[name.endswith(", published") for _, name in table.index]]
    assert len(own) == 10 and list(own.index) == [(scene, f"{name}, published") for scene in dict.fromkeys(facts.scene) for name in ("Adam", optimizers)]
    assert own["held-out PSNR (dB)"].tolist() == facts.psnr.tolist() and own["training PSNR (dB)"].tolist() == facts.train_psnr.tolist() and own["steps"].tolist() == (1000 * facts.iterations).tolist()
    assert ("seconds to it, update alone" in table) == facts.seconds.notna().any() == own["steps to Adam's"].notna().all()
    assert len(radiance.comparison(number, of_table_5("knot"), others=False)) == 3


def test_ours_is_said_to_be_of_another_scene(tmp_path):
    "Catches a caption that lets the embedded scene pass for the paper's, or calls lego another scene; and a caption without the paper's setting."
    def caption(rows, **more):
        experiment = figures.Experiment("tab05", "t", "p", "quick", tmp_path)
        radiance.beside(experiment, {5: rows}, "small fields", **more)
        return experiment.tables[0]["caption"]
    assert "none of which is the embedded knot" in caption(of_table_5("knot")) and "none" not in (lego := caption(of_table_5(), others=False))
    assert "small fields" in lego and "8 x 256 at 400 pixels" in lego and "Table 5" in lego
    experiment = figures.Experiment("tab02", "t", "p", "quick", tmp_path)
    words = radiance.beside(experiment, {2: of_table_5("knot"), 3: of_table_5("knot")}, "small fields", name="both")
    assert words.index.names == ["network", "scene", "method"] and set(words.index.get_level_values("network")) == {"ReLU", "ReLU-PE"} and experiment.tables[0]["caption"].startswith("Tables 2 and 3")


def test_what_tab05_says_of_the_recorded_runs(repository):
    "The sentences below the recorded curves of lego, from the records: catches `ahead in the first third`, which was wrong."
    kept = recorded(radiance.configs("laptop", *radiance.TABLES[5], radiance.pairs_of("laptop", ["lego"])), repository / "results" / "recorded" / "runs")
    along = figures.differences(radiance.by_recipe(kept)).query("method == 'ESGD mended'").groupby("step")["difference"].agg(["min", "mean", "max"])
    assert len(kept) == 15 and [step for step in along.index if along["mean"][step] > 0] == [step for step in along.index if step <= 3_008] and round(along["mean"].max(), 2) == .54 == round(along["mean"][1_216], 2)
    assert [step for step in along.index if along["min"][step] > 0] == [1_216, 1_792] and [step for step in along.index if along["max"][step] < 0] == [step for step in along.index if step >= 4_224]
    gained = {name: np.mean([r.final["train_psnr"] - figures.at_step(r, 3_008) for r in own]) for name, own in radiance.by_recipe(kept).items()}
    assert (round(gained["ESGD mended"], 2), round(gained["Adam"], 2)) == (.41, 1.15)
    for problem, factor in ((p, f) for p, f in radiance.at_factors() if p.startswith("64")):
        same = figures.differences(radiance.by_recipe(recorded(radiance.at_factors()[problem, factor], repository / "results" / "recorded" / "runs"))).query("method == 'ESGD mended'").groupby("step")["difference"].mean()
        assert max(step for step in same.index if same[step] > 0) == 1_792 and same.max() < .54 and round(same[6_000], 1) == -.4


def test_methods_are_called_by_their_recipe():
    "The claims' reference is 'Adam': catches labels with rates in them, which leave every run without a partner."
    made = [SimpleNamespace(config=c) for c in radiance.configs("laptop", *radiance.TABLES[5], [("lego", 0), ("lego", 1)])]
    assert {name: len(own) for name, own in radiance.by_recipe(made).items()} == {"Adam": 2, "ESGD released": 2, "ESGD mended": 2}


PLACES = [("a", 300), ("a", 900), ("b", 300), ("b", 900)]


@cache
def planned(seeds): return {(c.recipe, c.seed): c for c in radiance.search(seeds=seeds)["64 px, 512 rays x 32", 300]}


def rung(released, seeds=5, mended=1., status="finished"):
    "Runs of one problem and length: Adam at 20 dB, released ESGD above it by `released`; a diverged run has no numbers."
    rows = [("adam/released", 0., "finished"), ("esgd/released", released, status), ("esgd/mended", mended, "finished")]
    final = lambda gain, k, end: {"psnr": 20 + gain + .01 * k, "train_psnr": 20 - gain} if end == "finished" else {"psnr": None, "train_psnr": None}
    return [SimpleNamespace(config=planned(seeds)[recipe, k], status=end, final=final(gain, k, end)) for recipe, gain, end in rows for k in range(seeds)]


def found(runs, quantity="held-out views"):
    table = radiance.search_table(runs, PLACES)
    return table[(table["method"] == "ESGD released") & (table["PSNR of"] == quantity)].set_index(["problem", "steps"])


@pytest.mark.parametrize("last, seeds, status, stable, settled", [
    (2., 5, "finished", True, True), (-2., 5, "finished", True, False), (2., 4, "finished", None, None), (2., 5, "diverged", True, False)])
def test_the_smallest_problem_is_one_beyond_which_nothing_changes(last, seeds, status, stable, settled):
    "Catches a rung that counts as settled though the larger problem turns the order, four seeds that count as stable, and diverged runs that are left out, or end the table."
    runs = {("b", 900): rung(last, seeds, status=status), ("a", 300): rung(2.), ("a", 900): rung(2.), ("b", 300): rung(-2.)}  # in the order in which they were finished
    own = found(runs)
    assert own.loc[("b", 900), "stable"] is stable and own.loc[("a", 900), "settled"] is settled
    assert own.loc[("a", 300), "settled"] is False  # b at 300 says the opposite
    assert own.loc[("b", 900), "settled"] is (None if stable is None else False)  # nothing is beyond the last
    assert own.loc[("a", 900), "mean (dB)"] == pytest.approx(2.) and own.loc[("a", 900), "ahead of Adam"] == 5
    assert found(runs, "training rays").loc[("a", 300), "mean (dB)"] == pytest.approx(-2.)
    assert len(radiance.search_figure({("a", 300): rung(2.), ("b", 300): rung(-2., status=status)}, "made").axes) == 4


def test_a_search_that_is_not_finished_settles_nothing():
    "Catches a verdict on the places that happen to be there."
    assert found({("a", 300): rung(2.)})["settled"].tolist() == [None] and found({("a", 300): rung(2.), ("b", 900): rung(2.)})["settled"].tolist() == [None, False]
    assert found({("a", 300): rung(2.), ("b", 900): rung(-2.)})["settled"].tolist() == [False, False]  # what is missing could not mend it
    with pytest.raises(ValueError, match="does not have"):
        radiance.search_table({("c", 300): rung(2.)}, PLACES)


def test_the_haze_follows_the_background_and_not_the_name(tmp_path, fern):
    "Catches a path to lego's pictures that starts from another density than the name lego."
    from PIL import Image
    from test_scenes import front, write_blender
    folder = write_blender(tmp_path / "own", front())
    def bias(scene):
        return radiance.configs("quick", "blender", "Gaussian", radiance.ADAM, [(str(scene), 0)])[0].density_bias
    assert bias(folder) == 0. and bias("lego") == bias("knot") == -2. and bias("fern") == bias("bleff/balls") == bias(fern) == 0.
    for file in folder.rglob("*.png"): Image.open(file).convert("RGBA").save(file)
    assert bias(folder) == -2.


def test_ndc_is_for_cameras_that_face_forward(fern, tmp_path):
    "Catches a field that trains in coordinates which its rays do not have."
    with pytest.raises(RunError, match="ndc is True, and view .* 'knot' .*leave ndc out"):
        run(RunConfig(**SMALL, recipe="adam/released", ndc=True), tmp_path)


def test_ndc_begins_where_the_scene_does(fern, tmp_path):
    "A plane at 1 whatever the scene: what lies nearer is cut off without a word. LLFF's own scale keeps 1."
    from test_scenes import front, write_json
    own = write_json(tmp_path / "own" / "transforms.json", replace_world(front(), 5.), near=.2, far=5.)
    scene, common = runs.scene_data(str(own), 8), {**SMALL, "scene": str(own), "view_size": 8, "ndc": True}
    model = runs.network(RunConfig(**common))
    origins, directions = zip(*(render.view_rays(pose, k, scene.height, scene.width) for pose, k in zip(scene.poses, scene.intrinsics)))
    first = torch.stack(origins) + .2 * torch.stack(directions)                        # where each ray of each view begins
    assert 0 < model.ndc.near <= -first[..., 2].max() and model.ndc.near > -first[..., 2].max() - .05
    assert runs.network(RunConfig(**{**SMALL, "scene": fern, "view_size": 24, "ndc": True})).ndc.near == 1.
    assert RunConfig(**common).resolved()["ndc_near"] == "scene" and "ndc_near" not in RunConfig(**{**SMALL, "scene": fern, "view_size": 24, "ndc": True}).resolved()  # an older run had 1: not this key
    behind = write_json(tmp_path / "behind" / "transforms.json", replace_world(front(), -5.), near=.2, far=5.)
    with pytest.raises(ValueError, match="begins at z = .*move the poses' origin") as caught: runs.network(RunConfig(**{**common, "scene": str(behind)}))
    assert "\n" not in str(caught.value)


def replace_world(scene, ahead):
    "The scene with its cameras moved by so much along -z, and the principal point in the middle."
    poses = scene.poses.clone(); poses[:, 2, 3] -= ahead
    k = scene.intrinsics.clone(); k[:, 2:] = torch.tensor([scene.width / 2, scene.height / 2])
    return dataclasses.replace(scene, poses=poses, intrinsics=k)


@pytest.mark.parametrize("edit", ["camera", "picture", "split"])
def test_a_scene_that_is_edited_is_another_scene(tmp_path, edit):
    "In a notebook the old scene came back, and its run, for an edited folder: only plain files were looked at."
    from test_scenes import front, write_blender
    folder = write_blender(tmp_path / "own", front())
    config = RunConfig(**{**SMALL, "scene": str(folder), "view_size": 8})
    before, path = config.key, folder / "transforms_train.json"
    meta = json.loads(path.read_text())
    if edit == "camera": path.write_text(json.dumps({**meta, "camera_angle_x": .9 * meta["camera_angle_x"]}))
    elif edit == "split": path.write_text(json.dumps({**meta, "frames": meta["frames"][:-1]}))
    else:
        from PIL import Image
        picture = folder / "train" / "002.png"; stamp = picture.stat().st_mtime_ns
        Image.new("RGB", Image.open(picture).size, "red").save(picture); os.utime(picture, ns=(stamp + 1_000_000, stamp + 1_000_000))
    assert config.key != before


def test_a_named_scan_that_is_edited_is_another_shape(tmp_path, monkeypatch):
    "As above, for $INR_PRECOND_DATA/meshes/bimba.obj and div2k/test_14.png."
    import trimesh
    from PIL import Image
    (tmp_path / "meshes").mkdir(); (tmp_path / "div2k").mkdir()
    monkeypatch.setenv("INR_PRECOND_DATA", str(tmp_path))
    trimesh.creation.box().export(tmp_path / "meshes" / "bimba.obj"); Image.new("RGB", (8, 8)).save(tmp_path / "div2k" / "test_14.png")
    configs = [RunConfig(task="occupancy", shape="bimba"), RunConfig(image="lion", image_size=8)]
    before = [c.key for c in configs]
    trimesh.creation.icosphere(1).export(tmp_path / "meshes" / "bimba.obj"); Image.new("RGB", (9, 9), "red").save(tmp_path / "div2k" / "test_14.png")
    assert all(c.key != key for c, key in zip(configs, before))
    assert [c.key for c in configs] == [c.key for c in configs]


def test_a_view_without_any_error_ends_a_run(tmp_path):
    "An infinite PSNR is no JSON: the training was finished and could not be written, again and again."
    from PIL import Image
    from test_scenes import front, write_blender
    folder = write_blender(tmp_path / "own", front())
    for file in folder.rglob("*.png"): Image.new("RGBA", (12, 9), (0, 0, 0, 0)).save(file)
    done = run(RunConfig(**{**SMALL, "scene": str(folder), "view_size": 8, "density": "relu", "density_bias": -1000., "steps": 2}, recipe="adam/released"), tmp_path / "runs")
    assert done.final["view_psnr"] == [200.] * len(done.final["view_psnr"]) and done.final["psnr"] == 200.


def test_gauss_newton_resumed_equals_uninterrupted(tmp_path):
    "A radiance field's layers are seen from outside, by probes whose generator the checkpoint did not hold."
    config = RunConfig(**{**SMALL, "steps": 30}, recipe="gauss-newton/exact", seed=1)
    whole = run(config, tmp_path / "a")
    for limit in (7, 1, 12):
        left = iter(range(limit))
        with pytest.raises(KeyboardInterrupt): run(config, tmp_path / "b", stop=lambda: next(left, None) is None)
    other = run(config, tmp_path / "b")
    assert (whole.folder / "weights.npz").read_bytes() == (other.folder / "weights.npz").read_bytes() and whole.curve.loss.equals(other.curve.loss)


def test_the_search_ends_at_the_laptops_plan():
    "Catches a search whose largest problem is not what it is to justify, and a smaller one that is not smaller."
    plans = radiance.search()
    assert plans["64 px, 512 rays x 32", radiance.SETTINGS["laptop"].steps] == radiance.configs("laptop", *radiance.TABLES[5], radiance.pairs_of("laptop", ["lego"]))
    work = [own[0].batch_size * own[0].samples for (_, steps), own in plans.items() if steps == 300]
    assert work == sorted(work) and {len(own) for own in plans.values()} == {15}


def test_the_views_are_drawn(finished):
    config, done = finished
    drawn = radiance.views_figure({"ESGD released": [done]}, "a title")
    assert len(drawn.axes) == 3 * 2 + 2 and "dB" in drawn.axes[1].get_title()
    last = radiance.views_figure({"ESGD released": [done]}, view=1)  # the second evaluated view is the last of sixteen, not the second
    photograph = config.data().subset("test").images[15].numpy() / 255
    assert np.array_equal(last.axes[0].images[0].get_array(), photograph) and f"{done.final['view_psnr'][1]:.1f} dB" in last.axes[1].get_title()
    assert radiance.views_figure({"ESGD released": [SimpleNamespace(status="finished", recorded=True)]}) is None


def test_short_runs_and_small_views_rank_nothing():
    assert figures.too_short(300, 400, "radiance") and figures.too_short(5_999, 400, "radiance") and figures.too_short(200_000, 31, "radiance") and not figures.too_short(200_000, 400, "radiance")
    assert "too short to rank" in figures.short_note([made_up("adam/released", 0, 20., steps=300)])


def test_the_batch_knows_scenes(tmp_path, fern):
    "A typo ends in a sentence before anything is trained; a changed photograph is seen without reading it."
    assert reproduce.data_hashes(["knot"]) == {"knot": fingerprint("knot")}
    with pytest.raises(reproduce.BatchError, match="did you mean 'lego'"):
        reproduce._found("scene", "legoo")
    before = fingerprint(fern)
    from pathlib import Path
    file = sorted((Path(fern) / "images").iterdir())[2]
    file.write_bytes(file.read_bytes() + b"\0")
    assert fingerprint(fern) != before
    file.unlink()
    with pytest.raises(ValueError, match="cameras for 7 images .* holds 6"):
        fingerprint(fern)


@pytest.mark.parametrize("name", ["tab01_llff", "tab02_03_llff_adam_sgd", "tab05_blender", "tab06_bleff", "fig02_tab04_relu_pe"])
def test_settings_say_which_layers_they_count(repository, name):
    "A field's num_layers are the hidden layers of its trunk, those of pictures and shapes all linear ones: catches a settings table that leaves the reader to guess."
    shown = (repository / "nbs" / "experiments" / f"{name}.ipynb").read_text()
    assert "<th>hidden layers</th>" in shown and "<th>num_layers</th>" not in shown and "<th>layers</th>" not in shown
