"""Tables, comparisons and files of the experiment notebooks, on runs whose crossing times are known from a formula."""
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from inr_precond import figures


def make_run(recipe="adam/released", seed=0, start=15.0, slope=0.002, steps=8000, ms=10.0, status="finished", image="astronaut", size=256, schedule="constant", final_lr_factor=None, **options):
    step = np.linspace(0, steps, 11).astype(int)
    psnr = start + slope * step
    evals = pd.DataFrame({"step": step, "seconds": step * ms / 1e3, "cpu_seconds": step * ms / 1e3, "mse": 10 ** (-psnr / 10), "psnr": psnr})
    fine = np.linspace(80, steps, 100).astype(int)
    curve = pd.DataFrame({"step": fine, "seconds": fine * ms / 1e3, "loss": 10 ** (-(start + slope * fine) / 10)})
    config = SimpleNamespace(task="image", signal=image, recipe=recipe, options=options, seed=seed, image=image, image_size=size, batch_size=512, steps=steps, schedule=schedule, final_lr_factor=final_lr_factor)
    final = {"psnr": psnr[-1], "ssim": 0.9, "lpips": None, "mse": 10 ** (-psnr[-1] / 10), "best_psnr": psnr.max()}
    return SimpleNamespace(config=config, key=f"{recipe}-{image}-{seed}", folder=None, status=status, diverged_at=None, curve=curve, evals=evals, final=final,
                           ms_per_step=ms, state_floats_per_parameter=2.0, metrics_sha256="0" * 64, recorded=False,
                           provenance={"data": {"name": image, "sha256": f"hash of {image}", "source": "made up"}})


def pairs(count, gap=0.0005, jitter=0.0):
    "`count` seeds of Adam and of ESGD, ESGD rising faster by `gap` dB a step, seed s by `jitter * s` more."
    return [make_run("adam/released", s) for s in range(count)] + [make_run("esgd/released", s, slope=0.002 + gap + jitter * s) for s in range(count)]


# ---- crossing -------------------------------------------------------------------------------------------------------------------------------

def test_crossing_interpolates_between_evaluations():
    "An implementation that returns the evaluation's own step would say 200."
    assert figures.crossing([0, 100, 200], [10.0, 20.0, 40.0], 25.0) == pytest.approx(125)


def test_crossing_is_the_first_of_several():
    "A spike below the target after the first crossing must not move it."
    assert figures.crossing([0, 100, 200, 300], [10, 30, 20, 40], 25) == pytest.approx(75)


def test_crossing_at_the_first_point_and_exactly_on_a_point():
    assert figures.crossing([7, 100], [30, 40], 25) == 7
    assert figures.crossing([0, 100, 200], [10, 20, 30], 20) == pytest.approx(100)


@pytest.mark.parametrize("y, target", [([10, 20, 30], 31), ([math.nan] * 3, 5), ([10, 20, 30], math.nan), ([10, math.inf, 20], 25)])
def test_crossing_never_reached_is_nan(y, target):
    "Infinite and missing evaluations reach nothing."
    assert math.isnan(figures.crossing([0, 1, 2], y, target))


def test_crossing_passes_over_a_failed_evaluation():
    assert figures.crossing([0, 100, 200], [10, math.nan, 30], 20) == pytest.approx(100)


def test_at_step_does_not_extrapolate():
    "A run of 2,560 steps has no PSNR at 8,000."
    run = make_run(steps=2560)
    assert math.isnan(figures.at_step(run, 8000)) and figures.at_step(run, 1000) == pytest.approx(17)


# ---- rows and table --------------------------------------------------------------------------------------------------------------------------

def test_known_crossing_step_and_seconds():
    "Adam ends at 31 dB; ESGD rises .0025 dB a step and is there at 6,400 steps, at 10 ms a step 64 s."
    rows = figures.measure(figures.by_method(pairs(1))).set_index("method")
    assert rows.target_psnr["ESGD released"] == pytest.approx(31)
    assert rows.steps_to_target["ESGD released"] == pytest.approx(6400) and rows.seconds_to_target["ESGD released"] == pytest.approx(64)
    assert rows.steps_to_target["Adam"] == pytest.approx(8000)


def test_another_program_beside_a_run_does_not_lengthen_its_seconds():
    "Wall time in the tables: a method that trained while the machine was busy would look three times as dear. On a GPU, and for several threads, CPU time says nothing."
    def busy(device="cpu", threads=1, status="finished"):
        run = make_run("esgd/released", slope=.0025, status=status)
        run.evals["seconds"] *= 3; run.curve["seconds"] *= 3; run.ms_per_step *= 3
        run.config.device, run.provenance = device, {**run.provenance, "threads": threads}
        return run
    row = lambda run: figures.measure({"Adam": [make_run()], "ESGD released": [run]}).set_index("method").loc["ESGD released"]
    assert row(busy()).seconds_to_target == pytest.approx(64) and row(busy()).ms_per_step == pytest.approx(10)
    for other in (busy("cuda:0"), busy(threads=2)):
        assert row(other).seconds_to_target == pytest.approx(192) and row(other).ms_per_step == pytest.approx(30)
    spread = figures.spread([busy(), busy()], "loss", "curve"); assert spread.seconds.to_numpy() == pytest.approx(spread.step * .01)
    cut = busy(status="diverged"); cut.evals = cut.evals[cut.evals.step <= 4000]  # its curve goes on for half of the run
    assert figures.timed(cut, "curve").seconds.to_numpy() == pytest.approx(cut.curve.step * .01)


def test_the_target_is_the_one_of_the_same_seed_and_image():
    "Comparing every run with the first Adam run would give one target."
    runs = [make_run("adam/released", s, start=15 + s, image=i) for s in (0, 1) for i in ("a", "b")] + [make_run("esgd/released", s, image=i) for s in (0, 1) for i in ("a", "b")]
    rows = figures.measure(figures.by_method(runs))
    esgd = rows[rows.method == "ESGD released"]
    assert esgd.target_psnr.tolist() == [31, 31, 32, 32] and esgd.difference.tolist() == pytest.approx([0, 0, -1, -1])


def test_runs_of_different_length_are_compared_at_the_common_step():
    "AdaHessian's 2,000 steps against Adam's 8,000: at 2,000 it leads by 2 dB, at the ends it trails by 10."
    groups = figures.by_method([make_run(), make_run("adahessian-e/released", steps=2000, slope=0.003)])
    row = figures.measure(groups).set_index("method").loc["AdaHessian(E) released"]
    assert row.common_step == 2000 and row.difference == pytest.approx(2)
    assert figures.result_table(figures.measure(groups)).loc["AdaHessian(E) released", "PSNR minus Adam's (dB)"] == "+2.00 at 2,000 steps"


def test_table_prints_a_dash_where_the_target_is_never_reached():
    table = figures.result_table(figures.measure(figures.by_method([make_run(), make_run("esgd/mended", slope=0.001)])))
    assert table.loc["ESGD mended", "steps to Adam's final PSNR"] == "-" and table.loc["ESGD mended", "seconds to Adam's final PSNR"] == "-"
    assert table.loc["ESGD mended", "LPIPS"] == "-"


def test_table_counts_the_runs_that_reached_the_target():
    runs = [make_run("adam/released", s) for s in range(3)] + [make_run("esgd/released", s, slope=k) for s, k in enumerate((0.0025, 0.0032, 0.001))]
    table = figures.result_table(figures.measure(figures.by_method(runs)))
    assert table.loc["ESGD released", "steps to Adam's final PSNR"] == "5,700 (2 of 3)"  # median of 6,400 and 5,000


def test_diverged_run_is_a_row_not_a_crash():
    lost = make_run("sgd/released", status="diverged")
    lost.diverged_at, lost.final, lost.evals = 210, {}, lost.evals.iloc[:1]
    groups = figures.by_method([make_run(), lost])
    table = figures.result_table(figures.measure(groups))
    assert table.loc["SGD", "runs"] == "1 (diverged at step 210)" and table.loc["SGD", "final PSNR (dB)"] == "-"
    assert "difference -31.00 dB, 1 pair (1 diverged and counts as 0 dB)" in figures.conclude(figures.measure(groups), "SGD")
    assert figures.convergence(groups, target="Adam") and figures.final_dots(groups)


def test_a_diverged_run_is_not_left_out_of_a_conclusion():
    "Five clear leads and a run that diverged: survivors alone would be above. And one that finished below 0 dB counts no worse."
    groups = figures.by_method(pairs(6, jitter=0.00001))
    lost = groups["ESGD released"][5]
    lost.status, lost.final, lost.evals = "diverged", {}, lost.evals.iloc[:2]
    rows = figures.measure(groups)
    assert rows.difference.iloc[-1] == -31. and "undecided" in figures.conclude(rows, "ESGD released") and "6 pairs (1 diverged and counts as 0 dB)" in figures.conclude(rows, "ESGD released")
    astray = make_run("esgd/released", start=-40.)
    assert figures.measure(figures.by_method([make_run(), astray])).difference.iloc[-1] == -31.


def test_seconds_across_versions_of_the_code_are_marked():
    "Runs of two commits, of which one may have been faster at the same work."
    runs = pairs(5)
    assert "versions" not in figures.conclude_speed(figures.measure(figures.by_method(runs)), "ESGD released")
    for run in runs[:5]: run.provenance = {**run.provenance, "git_commit": "another"}
    assert "different versions of the code" in figures.conclude_speed(figures.measure(figures.by_method(runs)), "ESGD released")


def test_a_warm_up_has_colours_of_its_own():
    "With and without a warm-up of the rate in one figure, as two lines that nobody can tell apart."
    looks = [figures.style(f"esgd/{variant}", options) for variant in ("released", "mended") for options in ({}, {"lr_warmup": 100})]
    assert len({(str(look["color"]), str(look["linestyle"])) for look in looks}) == 4 and looks[0]["color"] == looks[2]["color"] != looks[1]["color"]
    assert figures.style("adam/released", {"lr_warmup": 100}) == figures.style("adam/released")


def test_nan_values_do_not_poison_a_mean():
    broken = make_run("esgd/released", 1)
    broken.final = {**broken.final, "psnr": math.nan}
    rows = figures.measure(figures.by_method([*pairs(1), broken]))
    assert figures.result_table(rows).loc["ESGD released", "final PSNR (dB)"] == "35.00"


def test_diverged_reference_gives_no_target():
    adam = make_run(status="diverged")
    adam.final, adam.evals = {}, adam.evals.iloc[:2]
    rows = figures.measure(figures.by_method([adam, make_run("esgd/released")]))
    assert rows.steps_to_target.isna().all() and "reached Adam's final PSNR in 0 of 1 runs" in figures.conclude_speed(rows, "ESGD released")


def test_best_and_last_are_kept_apart():
    spiky = make_run()
    spiky.final = {**spiky.final, "psnr": 25.0, "best_psnr": 31.0}
    table = figures.result_table(figures.measure(figures.by_method([spiky])))
    assert table.loc["Adam", "final PSNR (dB)"] == "25.00" and table.loc["Adam", "best PSNR (dB)"] == "31.00"


# ---- pairs and sentences ---------------------------------------------------------------------------------------------------------------------

def test_paired_interval_by_hand():
    "1 to 5: mean 3, s = 1.5811, t(4) = 2.776, half width 1.963. The normal quantile 1.96 would give 1.386."
    d = figures.paired([1, 2, 3, 4, 5])
    assert d["mean"] == 3 and d["low"] == pytest.approx(3 - 1.963, abs=1e-3) and d["high"] == pytest.approx(3 + 1.963, abs=1e-3)


@pytest.mark.parametrize("n, t", [(2, 12.706), (6, 2.571), (11, 2.228), (31, 2.042), (61, 2.000), (121, 1.980)])
def test_student_quantiles(n, t):
    "Known values of Student's table; off by one in the degrees of freedom fails at small n."
    values = np.arange(n, dtype=float)
    d = figures.paired(values)
    assert (d["high"] - d["mean"]) / (values.std(ddof=1) / math.sqrt(n)) == pytest.approx(t, abs=2e-3)


def test_paired_leaves_out_what_is_missing():
    assert figures.paired([1.0, math.nan, 3.0])["n"] == 2 and figures.paired([math.inf])["n"] == 0
    one = figures.paired([2.0])
    assert one["mean"] == 2 and math.isnan(one["low"])


def sentence(runs, method="ESGD released"):
    return figures.conclude(figures.measure(figures.by_method(runs)), method)


def test_four_pairs_conclude_nothing():
    assert "undecided, 5 pairs are needed" in sentence(pairs(4, jitter=1e-5))


def test_five_clear_pairs_conclude():
    assert "8,000 steps: above (difference +4.16 dB, 5 pairs, 95 % interval +4.00 to +4.32)" in sentence(pairs(5, jitter=1e-5))
    assert ": below (" in sentence(pairs(5, gap=-0.0005, jitter=1e-5))


def test_an_interval_that_covers_zero_concludes_nothing():
    runs = [make_run("adam/released", s) for s in range(5)] + [make_run("esgd/released", s, start=15 + d) for s, d in enumerate((-1, 1, -2, 2, 0.1))]
    assert "undecided, the interval covers 0" in sentence(runs)


def test_five_short_pairs_conclude_nothing():
    "2,560 steps are too short to rank, whatever their difference."
    runs = [make_run(r, s, slope=k, steps=2560) for r, k in (("adam/released", 0.002), ("esgd/released", 0.003)) for s in range(5)]
    text = sentence(runs)
    assert "not ranked, the runs are too short" in text and "above" not in text
    assert "too short to rank" in figures.conclude_speed(figures.measure(figures.by_method(runs)), "ESGD released")


def test_five_small_pictures_conclude_nothing():
    assert "not ranked" in sentence([make_run(r, s, slope=k, size=32) for r, k in (("adam/released", 0.002), ("esgd/released", 0.003)) for s in range(5)])


def test_speed_sentence_is_a_ratio_to_adams_own_crossing():
    text = figures.conclude_speed(figures.measure(figures.by_method(pairs(5, jitter=1e-5))), "ESGD released")
    assert text.startswith("ESGD released reached Adam's final PSNR in 5 of 5 runs, after 0.79 of its steps") and "undecided" not in text
    assert "undecided" in figures.conclude_speed(figures.measure(figures.by_method(pairs(2))), "ESGD released")


def test_speed_is_undecided_where_some_runs_never_arrive():
    "Dropping the runs that never arrive would turn a loss into a win; so would an interval of those that did."
    runs = pairs(6)
    runs[-1] = make_run("esgd/released", 5, slope=0.001)
    assert "in 5 of 6 runs" in (text := figures.conclude_speed(figures.measure(figures.by_method(runs)), "ESGD released")) and "undecided" in text
    assert "runs, those after" in text and "[" not in text


@pytest.mark.parametrize("steps, size, short", [(2560, 256, True), (7680, 256, False), (64000, 256, False), (64000, 32, True)])
def test_too_short(steps, size, short):
    assert figures.too_short(steps, size) is short


def test_short_note_names_only_the_short_methods():
    note = figures.short_note([make_run(), make_run("adahessian-e/released", steps=2560)])
    assert note.startswith("AdaHessian(E) released: 2,560 steps are too short") and "Adam:" not in note
    assert figures.short_note([make_run()]) == ""
    assert "say nothing about the methods" in figures.short_note([make_run(size=32, steps=24)])


def test_short_note_names_the_shorter_list():
    "The note stands in titles: four short methods among twelve are named, not the eight others; nine among twelve are not."
    make = lambda steps: make_run(steps=steps, lr=len(made) * 1.0)
    for short, told in ((4, "Adam, lr 0, "), (9, "all but Adam, lr 9, ")):
        made = []
        for i in range(12): made.append(make(2560 if i < short else 8000))
        note = figures.short_note(made)
        assert note.startswith(told) and note.count("Adam") == (4 if short == 4 else 3)


# ---- looks -----------------------------------------------------------------------------------------------------------------------------------

def test_colours_are_fixed_and_distinct():
    "The colours are part of the published figures: a change must be deliberate."
    assert figures.style("adam/released")["color"] == "#0072B2" and figures.style("esgd/mended")["color"] == "#D55E00"
    assert len({c for _, c in figures.FAMILIES.values()}) == len(figures.FAMILIES)


def test_variants_differ_by_line_not_by_colour():
    a, b = figures.style("esgd/released"), figures.style("esgd/mended")
    assert a["color"] == b["color"] and a["linestyle"] != b["linestyle"]


def test_every_recipe_has_a_colour():
    recipes = pytest.importorskip("inr_precond.recipes")
    for name in recipes.recipes(): figures.style(name)


def test_unknown_family_says_what_to_do():
    with pytest.raises(ValueError, match="figures.FAMILIES"): figures.style("lion/released")


def test_labels_are_distinct_for_distinct_settings():
    names = ["adam/released", "adam/paper-sine", "esgd/released", "esgd/mended", "adahessian-e/released", "adahessian-j/released", "sgd/released"]
    labels = [figures.label(make_run(n).config) for n in names] + [figures.label(make_run("adam/released", lr=1e-3).config)]
    assert len(set(labels)) == len(labels) and labels[0] == "Adam" and labels[-1] == "Adam, lr 0.001"


def test_a_schedule_is_part_of_the_name():
    "Without it two runs that differ in the schedule alone fall into one group, and their curves into one band."
    runs = [make_run(), make_run(schedule="cosine"), make_run(schedule="cosine", final_lr_factor=0.1), make_run(schedule="esgd-hidden"), make_run(lr=1e-3, schedule="cosine")]
    assert list(figures.by_method(runs)) == ["Adam", "Adam, cosine", "Adam, cosine to 0.1", "Adam, esgd-hidden", "Adam, lr 0.001, cosine"]


def test_the_schedule_of_a_config_is_in_its_label():
    "The made-up runs of this file have the fields that we gave them; a real config must have them too."
    from inr_precond.runs import RunConfig
    plain, cosine = (RunConfig(recipe="adam/released", steps=10, **more) for more in ({}, {"schedule": "cosine"}))
    assert (figures.label(plain), figures.label(cosine)) == ("Adam", "Adam, cosine")


def test_lines_of_one_family_are_told_apart():
    "Recipes that share a panel share the colour: Fig. 8 has two of Adam and four of Shampoo."
    for own in (("adam/released", "adam/paper-sine"), ("shampoo/released", "shampoo/mended", "shampoo/amortized", "shampoo/paper-sine")):
        assert len({str(figures.style(name)["linestyle"]) for name in own}) == len(own)


def test_spread_over_seeds():
    table = figures.spread([make_run(seed=s, start=15 + s) for s in range(3)], "psnr")
    assert np.allclose(table.high - table.low, 2) and np.allclose(table.middle, make_run(start=16).evals.psnr)


def test_convergence_axes_say_what_they_show():
    figure = figures.convergence(figures.by_method(pairs(3)), "title", target="Adam")
    top, right, bottom, last = figure.axes[:4]
    assert top.get_yscale() == "log" and "MSE" in top.get_ylabel() and "dB" in bottom.get_ylabel()
    assert "128 steps" in bottom.get_xlabel() and "(s)" in last.get_xlabel()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["Adam", "ESGD released"]
    assert not bottom.collections and len([l for l in bottom.lines if l.get_linewidth() < 1]) == 6, "three seeds of two methods: a thin line each, and no band"
    many = figures.convergence(figures.by_method(pairs(9)), "title", target="Adam").axes[2]
    assert len(many.collections) == 2, "nine seeds make a band each"


def test_a_method_that_went_astray_does_not_squeeze_the_others():
    "The frame cuts it off and says so; without such a method nothing is cut."
    astray = make_run("sgd/released", start=-80, slope=0.0)
    with_it, without = (figures.convergence(figures.by_method(runs)).axes for runs in ([*pairs(1), astray], pairs(1)))
    assert with_it[2].get_ylim()[0] == pytest.approx(35 - 25) and with_it[0].get_ylim()[1] == 1
    assert [t.get_text() for t in with_it[2].texts] == ["lower values not shown"] and not without[2].texts and without[2].get_ylim()[0] < 15


def test_epochs_of_the_horizontal_axis():
    "8,000 steps are 62.5 epochs of 128 steps."
    figure = figures.convergence(figures.by_method([make_run()]))
    assert figure.axes[2].lines[0].get_xdata().max() == pytest.approx(62.5)
    assert figure.axes[3].lines[0].get_xdata().max() == pytest.approx(80)  # 8,000 steps of 10 ms


def test_reconstruction_windows_do_not_overlap():
    picture = np.random.default_rng(0).random((64, 64, 3))
    (r1, c1), (r2, c2) = figures.detail_windows(picture, 16)
    assert abs(r1 - r2) >= 8 or abs(c1 - c2) >= 8
    assert all(0 <= v <= 48 for v in (r1, c1, r2, c2))


def test_reconstructions_stand_in_blocks_on_one_scale_that_a_failure_does_not_set():
    "Twelve methods in two rows of six, each with its target; errors of .1 but for one picture that is wrong everywhere. A scale over all pixels' 99th percentile would end at 1."
    target = np.zeros((32, 32, 3))
    pictures = {f"M {k}": np.full_like(target, .1) for k in range(11)} | {"lost": np.ones_like(target)}
    figure = figures.reconstructions(target, pictures)
    maps = [ax for ax in figure.axes if ax.images and ax.images[0].get_array().ndim == 2]
    assert len(maps) == 12 and all(ax.images[0].get_clim() == pytest.approx((0, .1)) for ax in maps)
    titled = [ax.get_title().split("\n")[0] for ax in figure.axes if ax.get_title()]
    assert titled.count("target") == 2 and titled.count("M") == 11 and "lost" in titled and figure.axes[0].get_gridspec().get_geometry() == (8, 7)


def test_error_map_clips_the_prediction_only():
    target = np.zeros((4, 4, 3))
    assert figures.error_map(target + 7, target).max() == 1 and figures.error_map(target - 7, target).max() == 0


# ---- files -----------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def experiment(tmp_path):
    return figures.Experiment("fig00_test", "A test", "The paper says nothing (Fig. 0).", "smoke", tmp_path)


def test_experiment_json_has_the_agreed_fields(experiment, tmp_path):
    figure = figures.final_dots(figures.by_method(pairs(2)))
    experiment.figure(figure, "dots", "Dots.")
    experiment.table(pd.DataFrame({"a": [1]}), "results", "One number.")
    experiment.finish({"x": np.float32(1.5), "nan": math.nan, "deep": {"list": [np.int64(3), math.inf]}})
    record = json.loads((tmp_path / "experiments/fig00_test.json").read_text())
    assert list(record) == ["name", "title", "paper", "scale", "note", "figures", "tables", "metrics", "runs", "data", "verdict"]
    assert record["figures"] == [{"file": "figures/fig00_test/dots.png", "caption": "Dots."}] and record["tables"][0]["file"] == "tables/fig00_test/results.csv"
    assert record["metrics"] == {"x": 1.5, "nan": None, "deep": {"list": [3, None]}} and record["verdict"] is None
    assert (tmp_path / "figures/fig00_test/dots.png").stat().st_size > 1000 and (tmp_path / "figures/fig00_test/dots.pdf").read_bytes().startswith(b"%PDF")


def test_experiment_lists_each_run_and_each_picture_once(experiment):
    run, other = make_run(), make_run("esgd/released")
    experiment.runs = [run, run, other]
    record = experiment.finish({})
    assert record["runs"][0] == {"key": run.key, "label": "Adam, astronaut, seed 0", "status": "finished", "metrics_sha256": "0" * 64, "recorded": False} and len(record["runs"]) == 2
    assert record["data"] == [{"name": "astronaut", "sha256": "hash of astronaut", "source": "made up"}]


def test_a_picture_given_by_its_path_is_named_without_folders(experiment):
    "Folders of one machine do not belong in published records."
    experiment.runs = [make_run(image="/somewhere/coffee.png")]
    assert "somewhere" not in experiment.finish({})["runs"][0]["label"]
    assert figures.measure(figures.by_method(experiment.runs)).image.tolist() == ["coffee"]


def test_a_failed_write_leaves_the_old_record(experiment, tmp_path, monkeypatch):
    "Writing in place would leave a truncated file behind."
    experiment.finish({"x": 1})
    monkeypatch.setattr(figures.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): experiment.finish({"x": 2})
    assert json.loads((tmp_path / "experiments/fig00_test.json").read_text())["metrics"] == {"x": 1}


def test_captions_and_names_are_required(experiment):
    figure = figures.final_dots(figures.by_method(pairs(1)))
    with pytest.raises(ValueError, match="no caption"): experiment.figure(figure, "a", " ")
    experiment.figure(figure, "a", "A.")
    with pytest.raises(ValueError, match="exists twice"): experiment.figure(figure, "a", "B.")


def test_unknown_scale_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="smoke, quick, laptop, full"): figures.Experiment("a", "b", "c", "huge", tmp_path)


def test_figures_are_the_same_bytes_twice(tmp_path):
    "A date in the file would make every batch differ."
    files = []
    for name in ("one", "two"):
        experiment = figures.Experiment("x", "t", "p", "smoke", tmp_path / name)
        experiment.figure(figures.convergence(figures.by_method(pairs(1))), "a", "A.")
        files.append([(tmp_path / name / f"figures/x/a.{kind}").read_bytes() for kind in ("png", "pdf")])
    assert files[0] == files[1]


# ---- records --------------------------------------------------------------------------------------------------------------------------------

def test_records_are_not_asked_for_a_picture():
    "A record has no picture: drawing one would fail with an attribute error in the middle of a notebook."
    record = make_run("adam/released")
    record.recorded, record.prediction = True, lambda: None
    figure = figures.first_reconstructions(np.zeros((32, 32, 3)), {"Adam": [record]})
    assert "hold no pictures" in figure.axes[0].texts[0].get_text()
    run = make_run("esgd/released")
    run.prediction = lambda: np.zeros((32, 32, 3))
    mixed = figures.first_reconstructions(np.zeros((32, 32, 3)), {"Adam": [record], "ESGD": [run]})
    assert any("ESGD" in ax.get_title() for ax in mixed.axes) and not any("Adam" in ax.get_title() for ax in mixed.axes)


def test_recorded_says_where_the_runs_come_from_and_draws_what_there_is(experiment, monkeypatch, capsys):
    "A record without its machine and commit is a number from nowhere; an experiment without records must not fail."
    from inr_precond import runs
    kept = pairs(5)
    for run in kept: run.provenance |= {"cpu": "A CPU", "gpu": None, "torch": "2.13.0", "git_commit": "0123456789", "finished": f"2026-11-{20 + run.config.seed}T00:00:00+00:00"}
    monkeypatch.setattr(runs, "recorded", lambda configs, **_: kept)
    rows = experiment.recorded(["a", "b"] * 6, "Setting")
    caption = experiment.figures[0]["caption"]
    assert "10 runs on A CPU, torch 2.13.0, 2026-11-20 to 2026-11-24, commit 0123456; 10 of the 2 planned" in caption
    assert len(rows) == 10 and "above" in (said := capsys.readouterr().out) and "undecided" not in said
    monkeypatch.setattr(runs, "recorded", lambda configs, **_: [])
    assert experiment.recorded(["a"], "Setting") is None and len(experiment.figures) == 1


def test_recorded_draws_signals_apart(experiment, monkeypatch):
    "A median over pictures (or shapes) would show their differences as if they were the method's spread."
    from inr_precond import runs
    kept = pairs(2) + [make_run(recipe, 2, image="lion") for recipe in ("adam/released", "esgd/released")]
    for run in kept: run.provenance |= {"cpu": "A CPU", "gpu": None, "torch": "2.13.0", "git_commit": "0123456789", "finished": "2026-11-20T00:00:00+00:00"}
    drawn = []
    monkeypatch.setattr(figures, "convergence_by_signal", lambda groups, title: drawn.append(title) or figures.new_figure(1, 1, (2, 2))[0])
    monkeypatch.setattr(runs, "recorded", lambda configs, **_: kept)
    assert len(experiment.recorded(["a"], "Setting")) == 6 and len(drawn) == 1
    assert "A column for each image: training loss and PSNR of the whole image (dB) against epochs" in experiment.figures[0]["caption"]


def test_a_figure_is_laid_out_once_as_savefig_lays_it_out(tmp_path):
    "A layout that is made outside of savefig could differ from savefig's own: a legend outside of the axes would be cut off."
    from PIL import Image
    def made():
        figure, axes = figures.new_figure(2, 2, (7, 5))
        for k, ax in enumerate(axes.flat): ax.plot([0, 1], [k, 10 ** k], label=f"method {k}"); ax.set(xlabel="steps", ylabel="PSNR (dB)", title=f"panel {k}")
        figure.colorbar(axes[0, 0].imshow(np.eye(3)), ax=axes[0, 1])
        figure.legend(loc="outside lower center", ncols=4)
        return figure
    experiment = figures.Experiment("one", "A title", "What the paper says", "smoke", tmp_path)
    experiment.figure(made(), "ours", "A caption.")
    made().savefig(tmp_path / "savefig.png", dpi=130, facecolor="white")
    ours, theirs = (np.asarray(Image.open(p)) for p in (tmp_path / "figures" / "one" / "ours.png", tmp_path / "savefig.png"))
    assert ours.shape == theirs.shape and (ours == theirs).mean() > .999


def test_powers_of_ten_are_plain_text():
    "A label that the way round matplotlib's formulas does not know must stay a formula, and a sign or a factor must not be lost."
    given = {r"$\mathdefault{10^{-3}}$": "10⁻³", r"$\mathdefault{2\times10^{-12}}$": "2×10⁻¹²", r"$\mathdefault{-10^{0}}$": "−10⁰", r"$\mathdefault{1.5\times10^{4}}$": "1.5×10⁴",
             r"$\mathdefault{2^{6}}$": "2⁶", r"$\mathdefault{0}$": "0", "": "", "0.25": "0.25", r"$\mathdefault{10^{1.50}}$": r"$\mathdefault{10^{1.50}}$", r"$\alpha$": r"$\alpha$"}
    assert figures._in_plain_text(lambda values: values, list(given)) == list(given.values())
    assert figures._in_plain_text(lambda values: values, list(given.values())) == list(given.values()), "a figure that is saved twice"


# ---- what is read, and what is not timed --------------------------------------------------------------------------------------------------------

def test_a_sweep_says_how_many_runs_were_read(tmp_path, capsys):
    "Two of three runs were there: `1 of 1 runs trained` alone leaves a reader to wonder where the others of the figure come from. All read: nothing, as before."
    from inr_precond.runs import RunConfig
    configs = [RunConfig(recipe="adam/released", image="astronaut", image_size=16, batch_size=32, hidden_features=4, num_layers=2, steps=2, evaluations=1, seed=seed) for seed in range(3)]
    def said(configs, **options):
        figures.Experiment("e", "t", "p", "smoke", tmp_path).sweep(iter(configs), workers=1, **options)
        return capsys.readouterr().out
    assert said(configs[:2]) == "" and said(configs) == "2 runs read, 1 to train\n" and said(configs) == ""
    assert said([configs[0], dataclasses.replace(configs[0], seed=7)], progress=False) == ""


def test_nothing_is_timed_at_smoke(tmp_path):
    "Tiny runs are mostly what a process pays once: catches milliseconds a step, seconds or their ratio in a table or a sentence, and a caption that does not say that they are absent."
    groups = figures.by_method([make_run(r, slope=k, size=32, steps=24) for r, k in (("adam/released", 0.002), ("esgd/released", 0.003))])
    rows = figures.measure(groups)
    assert rows.ms_per_step.isna().all() and rows.seconds_to_target.isna().all() and rows.steps_to_target.notna().all()
    table = figures.result_table(rows).T
    assert set(table.loc["ms a step"]) == set(table.loc["seconds to Adam's final PSNR"]) == {"-"}
    assert "of its steps" in (text := figures.conclude_speed(rows, "ESGD released")) and "seconds" not in text and "nan" not in text
    experiment = figures.Experiment("e", "t", "p", "smoke", tmp_path)
    for name, own in (("results", table), ("settings", table.iloc[:2]), ("recorded_results", table), ("runs", rows)): experiment.table(own, name, "Caption.")
    assert ["not measured at smoke" in entry["caption"] for entry in experiment.tables] == [True, False, False, True]
    quick = figures.Experiment("e", "t", "p", "quick", tmp_path); quick.table(table, "results", "Caption.")
    assert quick.tables[0]["caption"] == "Caption." and figures.measure(figures.by_method(pairs(1))).ms_per_step.notna().all()
