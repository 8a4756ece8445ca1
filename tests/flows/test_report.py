"""The report: what stands in it, that it needs nothing else, and how a browser shows it."""

import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import write_data, write_model, write_rows

from flows.artifacts import markdown
from flows.cli import _run
from flows.report import charts, facts
from flows.report.page import REPORT, REPORTS, html_of, keep_report, pictures, update_chart, write_report
from flows.summary import summarise
from stages.pipeline import load_pipeline
from stages.plan import make_plan

SPEC = """\
name: told
model: {path: base, dtype: float32}
seed: 3
metrics:
  domain: {kind: perplexity, data: {path: data/heldout.jsonl}, sequence_length: 64}
  general: {kind: perplexity, data: {path: data/instructions.heldout.jsonl}, sequence_length: 64}
  said: {kind: generation, data: {path: prompts.jsonl}, max_new_tokens: 4}
stages:
  - name: knowledge
    kind: cpt
    method: {kind: spectrum, top_percent: 50}
    data: [{path: data/corpus.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 4, sequence_length: 64, batch_size: 4, precision: float32}
    gates: [{metric: domain, improves_on: base}, {metric: general, keeps: base, within: 50%}]
  - name: answers
    kind: ift
    method: {kind: lora, rank: 2}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 1e-3, max_steps: 2, sequence_length: 64, batch_size: 2, precision: float32}
    gates: [{metric: domain, at_least: 1000}]
release: {gates: [{metric: general, keeps: base, within: 90%}]}
"""
HOSTILE = "<script>alert(1)</script> </pre><img src=x onerror=alert(2)> \x1b[2J \u202egnp.exe {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def project(tmp_path_factory, run_spec) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_model(folder / "base")
    write_data(folder)
    write_rows(folder / "prompts.jsonl", [{"prompt": HOSTILE}, {"prompt": "say the"}, {"prompt": "w " * 100}])
    (folder / "spec.yaml").write_text(SPEC)
    run_spec(folder / "spec.yaml", until="answers")
    return folder / "spec.yaml"


def plan_of(spec: Path, old: str = "", new: str = ""):
    if old:
        spec = spec.with_name("edited.yaml")
        spec.write_text(SPEC.replace(old, new))
    return make_plan(load_pipeline(spec)[0], spec.parent.resolve(), spec.parent / "runs")


@pytest.fixture(scope="module")
def page(project) -> str:
    return html_of(plan_of(project), project)


class Text(HTMLParser):
    """The words of a page, its tags and what it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words, self.tags, self.loads = [], set(), []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "action", "data", "poster")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


pytestmark = pytest.mark.model


def test_every_section_says_what_is_on_the_disk(project, page):
    plan, text = plan_of(project), " ".join(Text(page).words)
    knowledge, answers = plan.steps[1], plan.steps[2]
    for wanted in (
        "Stopped at answers: its gates do not let it pass",
        "domain improves on base, at 95%",
        plan.verdicts(answers)[0].reason,
        *next(row for row in summarise(plan).metrics if row[0].startswith("general")),
        "data/corpus.jsonl",
        knowledge.artifact.identity,
        "Where Spectrum trained",
        "Cosine between the updates",
        "say the",
        SPEC.splitlines()[0],
    ):
        assert wanted in text, wanted
    for number in ("gates", "metrics", "training", "spectrum", "updates", "data", "samples", "cost", "lineage", "spec"):
        assert f'id="{number}"' in page


def test_it_needs_nothing_else_and_runs_nothing(page):
    read = Text(page)
    assert not read.tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert all(address.startswith("#") for address in read.loads)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "<script>alert(1)" not in page
    assert "49" not in re.findall(r"gnp\.exe (.*?)<", page)[0]
    assert not re.search("[\x00-\x08\x1b\u202e]", page)
    assert "\\x1b[2J \\u202egnp.exe {{ 7 * 7 }}" in " ".join(Text(page).words)


def test_learning_and_keeping_are_what_the_gates_say(project):
    found = facts.trade(plan_of(project))
    assert [point.name for point in found.points] == ["base", "knowledge", "answers"]
    assert (found.x.label, found.y.label) == ("learned: domain", "kept: general")
    assert not found.x.upward
    base = plan_of(project).steps[0]
    assert found.points[0].x == base.evaluation("domain").measure(None).value
    without = plan_of(project, "metric: general, keeps", "metric: domain, keeps")
    assert facts.trade(without) is None


def test_better_is_right_and_up_whatever_the_metric():
    points = (charts.Point("worse", 3.0, 0.5, 0.1, 0.0), charts.Point("better", 2.0, 0.9, 0.1, 0.0))
    drawn = charts.scatter(points, charts.Axis("loss", upward=False), charts.Axis("score", upward=True))
    places = [tuple(map(float, found)) for found in re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert places[1][0] > places[0][0]
    assert places[1][1] < places[0][1]


def test_a_lowered_threshold_is_seen_without_anything_else(project):
    edited = plan_of(project, "at_least: 1000", "at_least: 0.001")
    page = html_of(edited, project.with_name("edited.yaml"))
    assert "Not finished: release is next" in page
    assert "For the release" in page
    assert "at_least: 0.001" in page


def test_a_spec_that_was_edited_since_is_shown_as_it_was_run(project):
    plan = plan_of(project)
    edited = project.with_name("later.yaml")
    edited.write_text(SPEC.replace("seed: 3", "seed: 4"))
    page = html_of(plan, edited)
    assert "seed: 4" not in page
    assert "&#34;seed&#34;: 3" in page


def test_nothing_published_and_damaged_documents_make_a_page_all_the_same(project, tmp_path):
    empty = make_plan(load_pipeline(project)[0], project.parent, tmp_path / "none")
    page = html_of(empty, project)
    assert "Not finished: base is next" in page
    shutil.copytree(project.parent / "runs", tmp_path / "runs", symlinks=True)
    plan = make_plan(load_pipeline(project)[0], project.parent, tmp_path / "runs")
    stage = plan.steps[1].artifact
    for name in ("training.json", "data.json", "diagnostics.json"):
        (stage.path / name).write_text("{")
    found = facts.stage_facts("knowledge", stage)
    assert (found.training, found.data, found.update, found.curve) == ({}, None, None, [])
    assert pictures(found) == {}


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("training.json", {"training": None, "method": None}),
        (
            "training.json",
            {"training": {"curve": [{"loss": 1}, {"loss": "x", "step": 1}, 3]}, "method": {"spectrum": [{}]}},
        ),
        ("data.json", {"format": 1, "sources": []}),
        (
            "diagnostics.json",
            {"format": 1, "reason": None, "matrices": [{}], "others": [], "lineage": {"names": ["a"]}},
        ),
    ],
)
def test_a_document_of_another_version_is_left_out(project, tmp_path, name, document):
    shutil.copytree(project.parent / "runs", tmp_path / "runs", symlinks=True)
    plan = make_plan(load_pipeline(project)[0], project.parent, tmp_path / "runs")
    for step in plan.steps[1:3]:
        (step.artifact.path / name).write_text(json.dumps(document))
    page = html_of(plan, project)
    section = {"training.json": "training", "data.json": "data", "diagnostics.json": "updates"}[name]
    assert f'id="{section}"' not in page
    assert 'id="gates"' in page


def test_a_threshold_that_was_raised_since_is_told_though_later_stages_are_there(project):
    plan = plan_of(project, "{metric: domain, improves_on: base}", "{metric: domain, improves_on: base, by: 99%}")
    states = {link.name: link.state for link in facts.chain(plan)}
    assert states["knowledge"] != "passed"
    assert plan.steps[2].artifact is not None
    assert "Stopped at knowledge: its gates do not let it pass" in html_of(plan, project)


def test_a_secret_that_html_spells_otherwise_is_blotted_out_too(project, monkeypatch):
    monkeypatch.setenv("HOSTED_KEY", "<script>alert(1)</script>")
    page = html_of(plan_of(project), project)
    assert "alert(1)" not in page
    assert "[redacted]" in page


@pytest.mark.parametrize("value", [1.7e308, 5e-324, 0.0, float("inf"), float("nan"), 1e17])
def test_no_number_is_too_odd_for_a_chart(value):
    flat = charts.Axis("x", upward=True)
    points = [charts.Point("a", 1.7e308, -1.7e308, value, value), charts.Point("b", 1e17, 1e17 + 16, 0.0, value)]
    drawn = [
        charts.scatter(points, flat, flat),
        charts.curves([1, 2, 3], [value, -value, value], [value, 0.0, 1e-3], "odd"),
        charts.interval(-abs(value), abs(value), value, "passed"),
        charts.bars([("a", value if value < 2 else 1.0), ("b", 0.5)], "odd"),
        charts.heat([charts.Cell("a", 1, value, True, "x")], "odd"),
    ]
    for chart in drawn:
        places = re.findall(r' (?:d|points|x|y|cx|cy|width)="([^"]*)"', chart)
        assert not [place for place in places if "inf" in place or re.search(r"\d{6}", place)], value
        assert math.isnan(value) or "nan" not in "".join(places)


def test_the_experts_of_a_layer_are_one_cell():
    row = {"type": "experts.up", "planned": False, "relative_norm": 0.1}
    rows = [row | {"layer": layer, "name": f"{layer}.{expert}"} for layer in range(32) for expert in range(64)]
    rows[70] |= {"relative_norm": 0.2, "planned": True}
    drawn = update_chart(facts.Stage("mixture", {}, None, {"matrices": rows}))
    assert drawn.count("<title>") == 32
    assert "1.6: 20% of its norm" in drawn
    assert len(drawn) < 20_000


def test_a_loss_that_is_no_number_breaks_the_line_and_not_the_page():
    drawn = charts.curves([1, 2, 3, 4], [1.0, float("nan"), 2.0, 1.5], [0.0, 1e-3, 1e-3, 0.0], "nan")
    assert "nan" not in drawn.replace("aria-label", "").split(">", 1)[1]
    assert drawn.count("M") > 2


def test_a_run_keeps_its_report_and_the_newest_is_found_beside_the_artifacts(project):
    plan = plan_of(project)
    newest = keep_report(plan, project)
    assert newest == plan.store / REPORT
    (kept,) = (plan.store / REPORTS).iterdir()
    assert kept.read_text() == newest.read_text()


def test_the_command_writes_where_it_is_told(project, tmp_path, capsys):
    target = tmp_path / "out" / "page.html"
    assert _run(["report", str(project), "--root", str(project.parent / "runs"), "--output", str(target)]) == 0
    assert f"report: {target}" in capsys.readouterr().out
    assert "<h1>told</h1>" in target.read_text()
    assert _run(["report", str(project), "--output", "/proc/no/page.html"]) in (2, 4)
    assert _run(["report", str(project), "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "is a folder: name the file in it" in said
    assert "Traceback" not in said


def test_prefect_gets_the_same_charts(project):
    plan = plan_of(project)
    text = markdown(summarise(plan), plan)
    assert 's0["base"] --> s1["knowledge"]' in text
    chart = re.search(r"!\[learned.*?\]\(data:image/svg\+xml;base64,([^)]+)\)", text)
    drawn = base64.b64decode(chart[1]).decode()
    assert drawn.startswith("<svg ")
    assert "prefers-color-scheme:dark" in drawn
    assert set(pictures(facts.stages(plan)[0])) == {"loss", "spectrum", "update"}


CHROMIUM = shutil.which("chromium")
PROBE = """<script>onload = () => {
  const wide = (width) => { document.documentElement.style.width = width + 'px';  // what scrolls by itself may be wider
    const own = [...document.querySelectorAll('body *')].filter((one) => one.closest('.scroll') === null);
    return Math.max(...own.map((one) => Math.ceil(one.getBoundingClientRect().right))); };
  const shown = (what) => getComputedStyle(document.body)[what];
  const boxes = [...document.querySelectorAll('svg')].filter((one) => one.getBoundingClientRect().height < 5).length;
  const facts = {phone: wide(390), desk: wide(1200), ground: shown('backgroundColor'), ink: shown('color'), flat: boxes,
    title: document.title, headings: document.querySelectorAll('h2').length};
  document.body.innerHTML = ''; document.body.textContent = JSON.stringify(facts); };</script></head>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_a_browser_shows_it_on_a_phone_and_in_the_dark(project, tmp_path):
    page = write_report(plan_of(project), project, tmp_path / "page.html").read_text()
    # The page forbids scripts, so the one that measures it gets a copy that does not.
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</head>", PROBE)
    (tmp_path / "probed.html").write_text(page)
    grounds = set()
    for dark in ((), ("--blink-settings=preferredColorScheme=0",)):
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            *dark, "--dump-dom", (tmp_path / "probed.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = json.loads(re.search(r"<body[^>]*>(.*?)</body>", done.stdout, re.DOTALL)[1])
        assert found["phone"] <= 390
        assert found["desk"] <= 1200
        assert found["title"] == "told: report"
        assert found["headings"] == 10
        assert found["flat"] == 0
        assert found["ground"] != found["ink"]
        grounds.add(found["ground"])
    assert len(grounds) == 2
