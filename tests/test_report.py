"The report: complete, self-contained, and honest about gaps."
import csv
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from inr_precond import claims, report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    "Collects tags, checks that they nest."
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text); self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data): self.text.append(data)

    def all(self, tag): return [attributes for name, attributes in self.tags if name == tag]


def picture(path, size=(640, 400), noisy=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.effect_noise(size, 80).convert("RGB") if noisy else Image.linear_gradient("L").resize(size).convert("RGB")).save(path)


def experiment(out, name, figures=1, noisy=False, size=(640, 400), **changes):
    "Write the files of an experiment and its record."
    entries = []
    for i in range(figures):
        picture(out / "figures" / name / f"f{i}.png", size, noisy)
        entries.append({"file": f"figures/{name}/f{i}.png", "caption": f"Figure {i} of {name}: PSNR < 30 dB & more."})
    (out / "tables" / name).mkdir(parents=True, exist_ok=True)
    with open(out / "tables" / name / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["method", "steps", "PSNR (dB)"], ["Adam", "100", "20.123456789"], ["ESGD", "100", "21.5"]])
    record = {"name": name, "title": f"Title of {name}", "paper": f"The paper says this of {name}.", "scale": "quick", "note": "", "figures": entries,
              "tables": [{"file": f"tables/{name}/t.csv", "caption": "Results."}], "metrics": {"x": 1.5, "conclusions": ["ESGD is undecided."]},
              "runs": [{"key": "k", "label": "Adam, seed 0", "status": "finished", "metrics_sha256": None}], "data": [{"name": "astronaut", "sha256": "ab" * 32, "source": "NASA"}],
              "verdict": None, **changes}
    (out / "experiments").mkdir(exist_ok=True)
    (out / "experiments" / f"{name}.json").write_text(json.dumps(record))
    return {"name": name, "status": "ran", "seconds": 61.2, "finished": "today", "error": None, "provenance": {"cpu": "a"}}


@pytest.fixture
def made(tmp_path):
    entries = [experiment(tmp_path, "fig05", figures=2), experiment(tmp_path, "fig08"), {"name": "fig09", "status": "failed", "error": "KeyError: <x>", "seconds": 1.}]
    return report.write_report(tmp_path, "quick", entries, {"written": "now", "cpu": "b", "versions": {"torch": "2.13.0"}}).read_text()


def test_it_is_a_page(made):
    "Markup that does not nest shows differently in every browser."
    page = Page(made)
    assert page.open == [] and made.startswith("<!doctype html>")
    assert page.all("html")[0]["lang"] == "en" and any(m.get("name") == "viewport" for m in page.all("meta"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and "provenance" in ids
    assert all(a["href"][1:] in ids for a in page.all("a") if a["href"].startswith("#"))


def test_it_needs_nothing_else(made):
    "A picture or style from another address would be missing on a machine without a network."
    page = Page(made)
    assert all(image["src"].startswith(("data:image/png;base64,", "data:image/webp;base64,")) for image in page.all("img"))
    assert not page.all("script") and not page.all("link") and "url(" not in made and "@import" not in made and "//" not in made.split("<body>")[0]
    assert all(not a["href"].startswith(("http", "/")) for a in page.all("a"))


def test_pictures_say_what_they_show(made):
    "A reader who cannot see the pictures gets their captions."
    images = Page(made).all("img")
    assert len(images) == 3 and all(image["alt"].startswith("Figure ") and image["width"] and image["height"] for image in images)
    assert "prefers-color-scheme:dark" in made and "@media print" in made


def test_failure_is_shown(made):
    "A failed notebook that leaves no trace looks as if it had not existed."
    assert "KeyError: &lt;x&gt;" in made and 'class="badge failed"' in made


def test_content(made):
    text = " ".join(Page(made).text)
    for part in ("The paper says this of fig05.", "Results.", "20.12", "ESGD is undecided.", "1:01", "cpu: a", "2.13.0", "ab" * 32, "astronaut"): assert part in text, part
    assert '<strong title="best of the rows that may be compared">21.5</strong>' in made


def test_verdict_is_shown_where_there_is_one(tmp_path, made):
    "An empty column promises something that is not there."
    assert "Verdict" not in made
    entries = [experiment(tmp_path, "fig05", verdict={"verdict": "not reproduced", "text": "-0.4 dB [-0.9, 0.1]"}), experiment(tmp_path, "fig08")]
    judged = report.write_report(tmp_path, "laptop", entries, {}).read_text()
    assert judged.count('class="badge not-reproduced"') == 2 and "-0.4 dB [-0.9, 0.1]" in judged and '<th scope="col">Verdict</th>' in judged


def test_record_cannot_inject_markup(tmp_path):
    "Titles, captions and errors are text."
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
    entry = experiment(tmp_path, "fig05", title=evil, paper=evil, note=evil, verdict=evil, data=[{"name": evil, "sha256": evil, "source": evil}])
    made = report.write_report(tmp_path, evil, [{**entry, "status": evil, "error": evil}], {evil: evil}).read_text()
    page = Page(made)
    assert not page.all("script") and all("onerror" not in attributes for _, attributes in page.tags)


def test_large_pictures_are_scaled_down(tmp_path):
    "A dozen large pictures would make a page that no mail takes."
    entry = experiment(tmp_path, "fig05", figures=3, noisy=True, size=(2000, 1500))
    raw = sum(p.stat().st_size for p in tmp_path.rglob("*.png"))
    path = report.write_report(tmp_path, "quick", [entry], {}, limit=2_000_000)
    assert raw > 8_000_000 and path.stat().st_size <= 2_000_000
    assert len(Page(path.read_text()).all("img")) == 3


def test_curves_stay_sharp_and_photographs_become_small(tmp_path):
    "Twelve photographs as PNG fill the page's budget, and every figure is then scaled down until no label can be read."
    import base64
    import io

    import numpy as np
    from PIL import Image, ImageDraw
    from skimage.data import astronaut
    curve = Image.new("RGB", (900, 500), "white"); pen = ImageDraw.Draw(curve)
    pen.line([(10 * i, 250 + 200 * np.sin(i / 9)) for i in range(90)], fill="#D55E00", width=3); pen.text((40, 40), "epochs")
    curve.save(tmp_path / "curve.png"); Image.fromarray(astronaut()).save(tmp_path / "photo.png")
    for name, off, share in (("curve.png", 2, 1.4), ("photo.png", 12, .25)):
        uri, size = report.inline(tmp_path / name)
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"), float)
        true = np.asarray(Image.open(tmp_path / name).convert("RGB"), float)
        assert size == true.shape[1::-1] and abs(shown - true).mean() < off and len(uri) < share * (tmp_path / name).stat().st_size


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null"])
def test_damaged_record_is_no_crash(tmp_path, content):
    "A record that was cut off is shown as missing, and the others stay."
    entries = [experiment(tmp_path, "fig05"), experiment(tmp_path, "fig08")]
    (tmp_path / "experiments" / "fig05.json").write_text(content)
    made = report.write_report(tmp_path, "quick", entries, {}).read_text()
    assert "Not run yet." in made and "Title of fig08" in made


def test_missing_files_are_named(tmp_path):
    entry = experiment(tmp_path, "fig05")
    for file in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.csv")]: file.unlink()
    made = report.write_report(tmp_path, "quick", [entry], {}).read_text()
    assert "The figure figures/fig05/f0.png is missing." in made and "The table tables/fig05/t.csv is missing." in made


def test_report_is_replaced_in_one_piece(tmp_path, monkeypatch):
    "When the disk fills up while the page is written, the one before stays whole."
    entry = experiment(tmp_path, "fig05")
    path = report.write_report(tmp_path, "quick", [entry], {})
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError): report.write_report(tmp_path, "quick", [], {})
    assert path.read_text() == before and [p.name for p in tmp_path.glob("*.tmp")] == []


@pytest.mark.parametrize("note, best", [("", {(1, 1)}), ("100 steps are too short to rank (orderings show from 7,680)", set()),
                                        ("a test of the machinery: its numbers say nothing about the methods", set()),
                                        ("SGD: 100 steps are too short to rank", {(1, 1)}), ("ESGD: 100 steps are too short to rank", {(0, 1)})])
def test_best_is_marked_only_where_it_means_something(note, best):
    "A bold number is a claim: none where the experiment itself says that its runs are too short, and SGD is not ESGD."
    assert report.best_cells(["method", "PSNR (dB)"], [["Adam", "20.1"], ["ESGD", "21.5"], ["SGD", "11.0"]], note) == best


def test_methods_that_stopped_early_do_not_win():
    "The fastest to a target among those that always reach it."
    header, rows = ["method", "seconds to Adam's final PSNR"], [["Adam", "60"], ["ESGD", "20 (1 of 5)"], ["J", "-"], ["E", "30"]]
    assert report.best_cells(header, rows) == {(3, 1)}


# Verdicts

ROW = {"claim": "esgd-image", "form": "printed", "verdict": "reproduced", "reason": "the interval lies above the margin", "statement": "ESGD < Adam", "reference": "Fig. 5", "scale": "laptop", "basis": "runs of this batch", "effect": .7, "bound": "at least", "low": .5, "high": None, "n": 5,
       "margin": .049, "unit": "ln ratio of seconds", "inequality": "i", "method": "Student's t", "parts": [], "signals": ["lion"], "experiment": "fig05", "also": ["fig10"], "data": [], "recorded": 2, "provenance": {}}


def judged(tmp_path, rows, **changes):
    entries = [experiment(tmp_path, "fig05", **changes), {"name": "fig09", "status": "failed", "error": "x", "seconds": 1.}]
    return report.write_report(tmp_path, "laptop", entries, {"written": "now"}, rows).read_text()


@pytest.mark.parametrize("verdict, sign", [("reproduced", "✓"), ("not reproduced", "✗"), ("undecided at this scale", "?"), ("not run", "–")])
def test_verdict_is_a_word_with_a_sign_and_a_colour(tmp_path, verdict, sign):
    "Catches a verdict told by colour alone, or one whose class the style does not know."
    made = judged(tmp_path, [{**ROW, "verdict": verdict, "experiment": None if verdict == "not run" else "fig05"}])
    assert f'<span class="badge {report.slug(verdict)}">{sign} {verdict}</span>' in made and f".badge.{report.slug(verdict)}" in made.replace(",", "{")
    assert f"1 {verdict}" in made


def test_claims_whose_experiment_was_not_asked_for_are_one_line(tmp_path):
    "After ONLY= most claims have nothing to say: catches a table that is full of them, and a failed experiment's claim that hides among them."
    idle = {**ROW, "verdict": "not run", "experiment": None, "effect": None}
    made = judged(tmp_path, [ROW, {**idle, "claim": "bound", "reason": "fig01 has not run"}, {**idle, "claim": "estimators", "reason": "fig09 failed"}])
    assert made.count('"badge not-run"') == 1 and 'id="claim-bound"' not in made and 'id="claim-estimators"' in made
    assert "<code>bound</code> (fig01)" in made[made.index("Not run here"):]
    assert "3 verdicts: 1" in made and "2 not run" in made


def test_verdicts_open_the_page(tmp_path):
    "Before the experiments; each claim once with its forms, the effect as a factor, an open end, the margin, where it comes from; and again in the section of its experiment."
    made = judged(tmp_path, [ROW, {**ROW, "form": "corrected", "verdict": "not reproduced"}, {**ROW, "claim": "bound", "experiment": "32_claims", "also": [], "recorded": 0, "unit": "dB"}])
    page = Page(made)
    assert page.open == [] and made.index('id="claims"') < made.index('class="overview"') and made.count('id="claim-esgd-image"') == 1 and 'rowspan="2"' in made
    text = " ".join(" ".join(page.text).split())
    for words in ("at least factor 2.01 [1.65, ?] in seconds, 5 pairs", "margin factor 1.05", "margin +0.049", "signals: lion; also measured by fig10", "chapter 32_claims"): assert words in text, words
    assert made.count('href="#claim-esgd-image"') == 2 and "ESGD &lt; Adam" in made
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and all(a["href"][1:] in ids for a in page.all("a") if a["href"].startswith("#"))
    assert not page.all("script") and "http" not in made


def test_verdicts_on_recorded_runs_stand_apart(tmp_path):
    "In a row of their own, named as such, and not counted with those of the batch. Catches an earlier time's result passed off as this batch's."
    made = judged(tmp_path, [{**ROW, "verdict": "undecided at this scale"}, {**ROW, "basis": "recorded runs"}])
    assert "the same, judged on recorded runs" in made and made.count("ESGD &lt; Adam") == 1 and 'rowspan="2"' in made and "printed, recorded runs<br>" in made
    assert "1 verdict: 0 reproduced" in made and "1 more on recorded runs" in made and "1 reproduced." in made
    assert "recorded runs" not in judged(tmp_path, [ROW])


def test_recorded_runs_are_not_undecided_at_this_scale(tmp_path):
    "In the table, its parts, its tally and the sections: catches records called `undecided at this scale`, a scale that they do not have; and a badge without sign or colour."
    part = {k: ROW[k] for k in ("reason", "effect", "bound", "low", "high", "n", "margin", "unit", "inequality")} | {"verdict": "undecided at this scale"}
    row = {**ROW, "verdict": "undecided at this scale", "basis": "recorded runs", "parts": [{**part, "name": "a"}, {**part, "name": "b"}]}
    made = judged(tmp_path, [row])
    assert "undecided at this scale" not in made.replace("0 undecided at this scale", "") and made.count('<span class="badge undecided">? undecided</span>') == 4
    assert "1 more on recorded runs" in made and ": 1 undecided." in made and "undecided at this scale</span>" in judged(tmp_path, [{**row, "basis": "runs of this batch"}])


def test_an_end_without_a_limit_is_explained(tmp_path):
    "Catches a `?` in an interval that nothing on the page explains."
    assert "in an interval is an end" in judged(tmp_path, [ROW]) and "in an interval is an end" not in judged(tmp_path, [{**ROW, "high": .9}])


def test_parts_of_a_conjunction_are_listed(tmp_path):
    "Folded away, each with its own verdict and numbers; without evidence without numbers."
    part = {k: ROW[k] for k in ("verdict", "reason", "effect", "bound", "low", "high", "n", "margin", "unit", "inequality")}
    made = judged(tmp_path, [{**ROW, "parts": [{**part, "name": "before Adam"}, {**part, "name": "before K-FAC", "verdict": "undecided at this scale", "reason": "no evidence", "effect": None, "low": None}]}])
    assert "all 2 parts" in made and "before K-FAC" in made and "no evidence" in made and made.count("<svg") == 2


@pytest.mark.parametrize("low, high, arrows", [(.1, .4, 0), (None, .4, 1), (.1, None, 1), (None, None, 2)])
def test_interval_picture(low, high, arrows):
    "The bar lies on the right side of the margin; an end that does not exist is an arrow at the frame. Catches a mirrored or shifted axis."
    made = report.interval_svg({"effect": .25, "low": low, "high": high, "margin": .3, "verdict": "undecided at this scale"}, wide=100)
    x1, x2 = (float(x) for x in re.search(r'<line x1="([^"]+)" x2="([^"]+)"', made).groups())
    dot = float(re.search(r'cx="([^"]+)"', made)[1])
    assert 0 <= x1 < dot < x2 <= 100 and dot < 50 and (x2 > 50) and made.count("<path") == arrows
    assert (x1 == 0) == (low is None) and (x2 == 100) == (high is None)


def test_records_of_an_earlier_time_are_labelled(tmp_path):
    "A reader must see that a curve was not computed in this batch."
    assert "records of an earlier time" not in judged(tmp_path, []) and "of an earlier time are marked" in judged(tmp_path, [], recorded=2)
    assert "1 of 2 runs are records of an earlier time" in judged(tmp_path, [], runs=[{"key": "a", "recorded": True, "status": "finished"}, {"key": "b", "recorded": False, "status": "finished"}])
    assert "4 of 0" not in (made := judged(tmp_path, [], recorded=1)) and "1 of 1 runs" in made


def test_a_verdict_cannot_inject_markup(tmp_path):
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
    page = Page(judged(tmp_path, [{**ROW, **dict.fromkeys(("claim", "form", "verdict", "reason", "statement", "reference", "experiment"), evil), "signals": [evil], "also": [evil]}]))
    assert not page.all("script") and all("onerror" not in attributes for _, attributes in page.tags)


def test_nothing_is_best_where_nothing_is_worse():
    "A single row, or equal values, marked as the best."
    assert report.best_cells(["method", "PSNR"], [["Adam", "30.1"]]) == set() and report.best_cells(["method", "PSNR"], [["Adam", "30.1"], ["ESGD", "30.1"]]) == set()
    assert report.best_cells(["method", "PSNR"], [["Adam", "30.1"], ["ESGD", "30.2"]]) == {(1, 1)}


# ---- the paper, figure by figure ----------------------------------------------------------------------------------------------------------

def _numbers(words):
    "The figures and tables that a phrase names: {('Fig', 16), ('Fig', 17), ...}."
    found = set()
    for kind, listed in re.findall(r"(Fig|Tab)\. (\d+(?:(?:, | and | to |-)\d+)*)", words):
        for first, last in re.findall(r"(\d+)(?:(?: to |-)(\d+))?", listed): found |= {(kind, k) for k in range(int(first), int(last or first) + 1)}
    return found


def test_every_figure_and_table_of_the_paper_has_a_row(repository):
    "Catches a figure that is left out, or that names an experiment that does not exist."
    assert set().union(*(_numbers(item) for item, *_ in report.PAPER)) == {("Fig", k) for k in range(1, 21)} | {("Tab", k) for k in range(1, 7)}
    for _, _, name, _, _ in report.PAPER: assert (repository / "nbs" / "experiments" / f"{name}.ipynb").is_file(), name


def test_a_row_has_the_claims_that_name_it():
    "Catches a claim about a figure that its row forgets, and one that is about another figure."
    for claim in claims.CLAIMS.values():
        about = _numbers(claim.reference) if claim.home in {name for _, _, name, _, _ in report.PAPER} else set()
        listed = set().union(*(_numbers(item) for item, _, _, _, of in report.PAPER if claim.name in of))
        assert listed == about, claim.name


def test_a_row_takes_the_longer_runs_where_the_batch_decides_nothing(tmp_path):
    "Catches an undecided short run that hides a verdict on records, and a record that hides the batch's own verdict."
    batch, kept = {**ROW, "claim": "esgd-nerf", "form": "printed"}, {**ROW, "claim": "esgd-nerf", "form": "printed", "basis": "recorded runs", "verdict": "not reproduced"}
    told = lambda *rows: report._told(rows, "esgd-nerf")
    assert "not reproduced" in told({**batch, "verdict": "undecided at this scale"}, kept) and "on recorded runs" in told({**batch, "verdict": "undecided at this scale"}, kept)
    assert "not reproduced" not in told(batch, kept) and "on recorded runs" not in told(batch, kept)
    assert "on recorded runs of lego<" in told({**batch, "verdict": "not run"}, {**kept, "signals": ["lego"]})  # beside a table of other scenes: catches their row with lego's verdict and no word of it
    assert "on recorded runs" in told({**batch, "verdict": "not run"}, kept) and "href" not in told({**batch, "verdict": "not run"}) and told() == ""
