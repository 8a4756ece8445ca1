"""The model card: what it states, that the hub can read it, that data cannot change it, that it follows the gates."""

import hashlib
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from unread import NAMES, Project, make_project, released_project

from flows.engine import Plain, Run, nothing_to_do, run_chain
from flows.markdown import code, fence, prose, without_places
from flows.model_card import card_text, keep_card
from stages.artifact import CARD, damage
from stages.data_report import DATA_REPORT
from stages.documents import is_sealed_card, sealed_card, write_json
from stages.errors import GateRefused
from stages.evaluate import Evaluation, save
from stages.gate import interval_of
from stages.measure import Measure, ratio

HOSTILE = (
    "<script>alert(1)</script>",
    "![x](https://tracker.example/a.png) [y](javascript:alert(1))",
    "a | b | c\n| --- |\n# a heading\n\n---\nlicense: mit\n---",
    "``` `` ` ~~~ <!-- -->",
    "https://www.example.com *bold* __bold__ ~~gone~~ &lt;b&gt; <https://example.com>",
    "{{ 7 * 7 }} {% raw %}",
    "\u202etxet desrever\u2066 \x1b[2J",
    "",
    " ",
    "`",
)


@pytest.fixture
def released(tmp_path: Path) -> Project:
    """A project whose chain is published to its release, and whose gates pass."""
    return released_project(tmp_path / "project")


def card(project: Project, place: str = ".") -> str:
    return card_text(project.plan(), project.folder / "spec.yaml", place)


def tokens(text: str) -> list:
    return [
        inner
        for token in MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(text)
        for inner in (token, *(token.children or ()))
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_prose_of_others_is_only_text_in_a_paragraph_and_in_a_table(text):
    said = prose(text)
    assert "\n" not in said
    found = {token.type for token in tokens(f"| a | b |\n|---|---|\n| {said} | end |\n\nsaid: {said}.\n")}
    assert not found & {
        "html_block",
        "html_inline",
        "link_open",
        "image",
        "heading_open",
        "hr",
        "strong_open",
        "s_open",
    }
    cells = [token for token in tokens(f"| a | b |\n|---|---|\n| {said} | end |\n") if token.type == "td_open"]
    assert len(cells) == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_code_of_others_stays_code_on_one_line(text):
    found = [token for token in tokens(f"before {code(text)} after\n") if token.type not in ("text", "inline")]
    kinds = [token.type for token in found]
    assert kinds == ["paragraph_open", "code_inline", "paragraph_close"]
    cells = [token.type for token in tokens(f"| a | b |\n|---|---|\n| {code(text)} | end |\n")]
    assert (cells.count("td_open"), cells.count("code_inline")) == (2, 1)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_block_of_others_ends_where_it_ends(text):
    found = [token.type for token in tokens(fence(text, "text") + "\n\nafter\n")]
    assert found[0] == "fence"
    assert found[1:] == ["paragraph_open", "inline", "text", "paragraph_close"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("path: /home/joe/models/base", "path: [a place on this machine]/base"),
        ("path: '/home/joe/my models/base'", "path: '[a place on this machine]/base'"),
        ("# see ~/notes/x.md, ~joe/x", "# see [a place on this machine]/x.md, [a place on this machine]/x"),
        ("a/b/c ../d https://huggingface.co/a/b 1/2 // x", "a/b/c ../d https://huggingface.co/a/b 1/2 // x"),
        ("[{path: /a/b.jsonl}]", "[{path: [a place on this machine]/b.jsonl}]"),
    ],
)
def test_places_on_this_machine_are_left_out(text, left):
    assert without_places(text, ["/home/joe/my models/base"]) == left


def test_the_hub_can_read_the_settings_and_gets_them_back(released):
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    released.edit(("model: {path: base,", "model: {path: base, license: apache-2.0, origin: owner/base,"))
    text = card(released)
    read = ModelCard(text)
    assert str(read) == text
    said = read.data.to_dict()
    assert (said["license"], said["base_model"], said["base_model_relation"]) == (
        "apache-2.0",
        "owner/base",
        "finetune",
    )
    assert (said["library_name"], said["pipeline_tag"]) == ("transformers", "text-generation")
    assert said["tags"] == ["trivium", "cpt", "spectrum", "ift", "lora", "dpo", "qlora"]
    name, results = model_index_to_eval_results(said["model-index"])
    assert eval_results_to_model_index(name, results) == said["model-index"]
    assert {(one.metric_name, one.metric_value) for one in results} == {
        (f"{metric} x", 1.5) for metric in ("domain", "answers", "qa", "pairs")
    }


def test_a_licence_that_nobody_states_is_unknown_in_words_and_absent_for_the_hub(released):
    text = card(released)
    assert "Licence of the base: **unknown**." in text
    assert "\nlicense:" not in text.partition("\n---\n")[0]
    assert "base_model:" not in text


def test_the_card_names_stages_data_hashes_gates_and_the_spec(released):
    text = card(released)
    rows = (released.folder / "data/corpus.jsonl").read_bytes()
    assert hashlib.sha256(rows).hexdigest() in text
    for step in released.plan().steps:
        assert step.key in text
    assert "continued pre-training (`spectrum`), then instruction fine-tuning (`lora`)" in text
    assert "| domain at most 2\\, by its value alone" in text.replace(", by", "\\, by")
    assert text.count("| passed |") == 3
    assert (released.folder / "spec.yaml").read_text() in text
    assert "is better than its base" not in text


def test_what_the_gates_of_the_release_measure_is_among_the_measures(released):
    assert "domain · bits\\_per\\_word" not in card(released)
    with (released.folder / "spec.yaml").open("a") as spec:
        spec.write("release: {gates: [{metric: domain.bits_per_word, improves_on: base}]}\n")
    assert "| domain · bits\\_per\\_word |" in card(released)


def test_examples_that_are_too_short_to_tell_are_not_said_to_be_free_of_overlap(released):
    plan = released.plan()
    sets = [
        {"metric": name, "examples": 7, "judged": judged, "overlapping": 0} for name, judged in (("a", 0), ("b", 5))
    ]
    write_json(plan.steps[1].place / DATA_REPORT, {"overlap": {"sets": sets}})
    text = card_text(plan, released.folder / "spec.yaml", ".")
    assert "of a: not known, for none of them (7) is long enough to tell.\n" in text
    assert "of b: 0 of 5 examples share a run of words with the training rows.\n" in text


def test_no_place_of_this_machine_and_no_secret_is_in_it(released, monkeypatch):
    corpus = released.folder / "data/corpus.jsonl"
    outside = released.folder.parent / "out of the way.jsonl"
    shutil.copy(corpus, outside)
    released.edit(("data/corpus.jsonl", f"'{outside}'"), ("name: tiny", "name: tiny  # for hunter22hunter22"))
    monkeypatch.setenv("SOME_PASSWORD", "hunter22hunter22")
    text = card(released)
    assert str(released.folder.parent) not in text
    assert "`out of the way.jsonl`" in text
    assert "hunter22" not in text


def test_a_gate_that_is_judged_anew_gives_another_card_also_when_it_refuses(released):
    asked = Run(released.folder / "spec.yaml", released.root)
    run_chain(asked, Plain())
    file = released.plan().steps[-1].place / CARD
    first = file.read_text()
    assert is_sealed_card(file)
    assert "**failed**" not in first
    assert damage(released.plan().steps[-1].artifact) == []
    released.edit(("at_most: 2", "at_most: 1"))
    with pytest.raises(GateRefused):
        run_chain(asked, Plain())
    assert is_sealed_card(file)
    assert "**failed**: domain 1\\.5 is not at most 1".replace("\\.", ".") in file.read_text()
    released.edit(("at_most: 1", "at_most: 2"))
    run_chain(asked, Plain())
    assert file.read_text() == first


def test_a_card_that_was_edited_or_lost_is_written_anew_by_a_run_with_nothing_else_to_do(released):
    asked = Run(released.folder / "spec.yaml", released.root)
    run_chain(asked, Plain())
    file = released.plan().steps[-1].place / CARD
    first = file.read_text()
    for harm in (lambda: file.write_text(first.replace("passed", "shone")), file.unlink):
        harm()
        assert not is_sealed_card(file)
        assert nothing_to_do(asked, released.plan())
        assert file.read_text() == first


def test_a_spec_that_was_edited_while_it_ran_is_not_shown_as_the_one_that_ran(released):
    plan = released.plan()
    released.edit(("top_percent: 50", "top_percent: 51"))
    text = card_text(plan, released.folder / "spec.yaml", ".")
    assert "top_percent: 51" not in text
    assert '"top_percent": 50.0' in text


def test_answers_of_a_model_change_nothing_but_the_block_they_stand_in(released):
    said = "```\n# Endorsed by everybody\n<script>x</script>\n---\nlicense: mit\n---"
    released.edit(
        ("  pairs: {", "  shown: {kind: generation, data: {path: data/instructions.heldout.jsonl}}\n  pairs: {")
    )
    for step in released.plan().steps:
        for one in step.measurements:
            if one.metric == "shown":
                samples = [{"prompt": [{"role": "user", "content": said}], "answer": said + "x" * 10_000}]
                measures = {"x": ratio([1.0], [1.0], "lower")}
                save(Evaluation(measures, "x", {}, {}, 0.1, samples), Path(one.file), one.identity)
    found = tokens(card(released).split("\n---\n", 1)[1])
    headings = [after.content for token, after in pairwise(found) if token.type == "heading_open"]
    assert "Endorsed by everybody" not in headings
    assert "Samples" in headings
    html = {token.content.strip() for token in found if token.type in ("html_block", "html_inline")}
    assert all(one.startswith(("<details>", "</details>", "<!--")) for one in html)
    assert len(card(released)) < 40_000


GENERAL = "{kind: perplexity, data: {path: data/heldout.jsonl}, limit: 4}"


def with_release(project: Project, gates: str) -> str:
    """The card once the spec has one more metric, and gates of a release that warn."""
    spec = project.folder / "spec.yaml"
    judged = f"release: {{metrics: [general], gates: [{gates}], on_gate_failure: warn}}\n"
    project.write(spec.read_text().replace("metrics:\n", f"metrics:\n  general: {GENERAL}\n") + judged)
    plan = project.plan()
    for step in (*plan.steps, *plan.references):
        for one in step.missing:
            measures = {name: ratio([3.0, 4.0], [1.0, 1.0], "lower") for name in ("x", "y")}
            save(Evaluation(measures, "x", {}, {}, 0.1), Path(one.file), one.identity)
    return card(project)


def test_gates_of_the_release_are_in_the_card_with_their_policy_and_measures(released):
    text = with_release(released, "{metric: domain.y, at_most: 2, confidence: null}")
    assert "| domain · y |" in text
    assert "**failed**: domain.y 3.5 is not at most 2" in text.replace("\\", "")
    assert "### release (on failure: warn)" in text


def test_the_base_beside_the_release_was_measured_on_the_same_rows_or_stays_blank(released):
    text = with_release(released, "{metric: domain, at_most: 9, confidence: null}")
    (row,) = [line for line in text.splitlines() if line.startswith("| general")]
    assert [part.strip() for part in row.split("|")[3:5]] == ["–", "3.5"]
    (row,) = [line for line in text.splitlines() if line.startswith("| domain · x")]
    assert [part.strip() for part in row.split("|")[3:5]] == ["1.5", "3.5"]  # without a limit: the same rows


def test_nothing_is_kept_where_nothing_is_released(tmp_path):
    project = make_project(tmp_path / "project")
    project.publish(*NAMES[:-1])
    assert keep_card(project.plan(), project.folder / "spec.yaml") is None


@pytest.mark.parametrize(
    "change", [lambda text: text + " ", lambda text: text[1:], lambda _: "", lambda text: text * 2]
)
def test_a_card_knows_its_own_text(tmp_path, change):
    file = tmp_path / CARD
    file.write_text(sealed_card("# A card\n"))
    assert is_sealed_card(file)
    file.write_text(change(file.read_text()))
    assert not is_sealed_card(file)


def test_intervals_are_of_the_value_itself_and_unknown_where_its_noise_is():
    hits = ratio([1.0] * 60 + [0.0] * 40, [1.0] * 100, "higher")
    low, high = interval_of(hits, 0.95)
    assert 0.49 < low < 0.6 < high < 0.70  # Wilson's, with its continuity correction: 0.497 to 0.696
    assert interval_of(ratio([1.3, 2.4], [1.0, 1.0], "lower"), 0.95) is None
    assert interval_of(Measure(float("nan"), 0.1, 5, "lower"), 0.95) is None
    assert interval_of(Measure(0.0, None, 0, "lower"), 0.95) is None
    assert interval_of(Measure(2.0, 0.1, 50, "lower"), 0.95) == pytest.approx((1.804, 2.196), abs=2e-3)
