"""The data report: what it counts, what it finds twice, what it finds in evaluation sets, and what it refuses."""

import json
import random
from pathlib import Path

import pytest
import torch
from one_stage import only_job, write_spec
from pydantic import TypeAdapter
from row_reading import words
from tiny import sentences, write_rows

from specs.data import DataLimits, exceeds
from specs.metric import PerplexitySpec
from stages import data_report, run
from stages.data_limits import refusals, summary, warnings
from stages.data_preview import preview
from stages.data_report import DATA_REPORT, Material, kept_or_made, make_report
from stages.errors import InvalidInput
from stages.mixing import mixed
from stages.model import load_tokenizer
from stages.pipeline import Stage, load_pipeline

pytestmark = pytest.mark.model

SOURCE = {"path": "data/a.jsonl"}
CHAT = {"role": "user", "content": "say it"}


def perplexity(path: str) -> PerplexitySpec:
    return PerplexitySpec.model_validate({"kind": "perplexity", "data": {"path": path}})


def chat(answer: str) -> dict:
    return {"messages": [CHAT, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def tokenizer(base_model):
    return load_tokenizer(base_model)


@pytest.fixture
def report_of(tmp_path, tokenizer):
    """A function that writes sources and makes the report of a stage over them."""

    def make(files: dict[str, list[dict]], *, kind: str = "cpt", train: dict | None = None, metrics=None, **stage):
        for name, rows in files.items():
            write_rows(tmp_path / name, rows)
        return make_report(material(tmp_path, list(files), tokenizer, kind, train, metrics, **stage))

    return make


def material(folder: Path, files, tokenizer, kind="cpt", train=None, metrics=None, **stage) -> Material:
    sources = stage.pop("data", None) or [{"path": name} for name in files]
    document = {"name": "it", "kind": kind, "method": {"kind": "full"}, "data": sources}
    document["train"] = {"learning_rate": 1e-3, "max_steps": 1, "sequence_length": 64} | (train or {})
    spec = TypeAdapter(Stage).validate_json(json.dumps(document | stage))
    mixture = mixed(spec.data, folder, spec.normalise, 1, lambda rows: spec.sizes(rows, tokenizer))
    dataset, masks = spec.dataset(mixture.rows, tokenizer)
    return Material(spec, metrics or {}, folder, mixture, dataset, masks, tokenizer)


def test_where_the_earlier_row_stands_is_told_within_and_across_sources(report_of):
    once, again = [{"text": words(n)} for n in range(4)], [{"text": words(n)} for n in (9, 2, 9, 8)]
    report = report_of({"data/a.jsonl": once, "data/b.jsonl": [*again, {"text": words(1).upper()}]})
    kinds = {"exact_within": 1, "exact_across": 1, "near_within": 0, "near_across": 1}
    assert [one["duplicates"] for one in report["sources"]] == [dict.fromkeys(kinds, 0), kinds]
    assert report["total"]["duplicates"] == kinds
    assert [(one["at"], one["of"], one["sources"], one["exact"]) for one in report["duplicates"]["shown"]] == [
        ("data/b.jsonl:2", "data/a.jsonl:3", [1, 0], True),
        ("data/b.jsonl:3", "data/b.jsonl:1", [1, 1], True),
        ("data/b.jsonl:5", "data/a.jsonl:2", [1, 0], False),
    ]
    assert report["duplicates"]["share"] == round(3 / 9, 4)


def test_a_row_that_its_weight_uses_twice_is_no_duplicate(report_of):
    report = report_of({"data/a.jsonl": [{"text": words(n)} for n in range(5)]}, data=[SOURCE | {"weight": 2}])
    (one,) = report["sources"]
    assert (one["rows"], one["rows_per_pass"], one["weight"], report["duplicates"]["rows"]) == (5, 10, 2.0, 0)
    assert one["tokens_per_pass"] == 2 * 5 * one["lengths"]["mean"]


def test_a_source_of_which_nothing_is_trained_on_is_told(report_of):
    files = {"data/a.jsonl": [{"text": words(n)} for n in range(9)], "data/b.jsonl": [{"text": words(20)}] * 4}
    report = report_of(files, data=[SOURCE, {"path": "data/b.jsonl", "weight": 0.1}])
    assert [one["rows"] for one in report["sources"]] == [9, 0]
    said = "data/b.jsonl: none of its 4 rows is trained on at a weight of 0.1: raise it, or remove the source"
    assert warnings(report) == [said]


@pytest.mark.parametrize(("limit", "looked_at"), [("", 9), (", limit: 6", 6), (", limit: 1", 4)])
def test_overlap_is_looked_for_in_all_that_is_measured_before_the_release(tmp_path, base_model, limit, looked_at):
    write_rows(tmp_path / "data/corpus.jsonl", [{"text": words(n)} for n in range(9)])
    (tmp_path / "base").symlink_to(base_model)
    spec = write_spec(
        tmp_path, head="metrics: {domain: {kind: perplexity, data: {path: data/corpus.jsonl}, limit: 4}}\n"
    )
    with spec.open("a") as file:
        file.write(f"release: {{metrics: [domain]{limit}}}\n")
    pipeline, _ = load_pipeline(spec)
    (one,) = preview(pipeline, tmp_path, base_model, ["only"])
    assert one["report"]["overlap"]["sets"][0]["examples"] == looked_at


# What is trained


def test_rows_cut_dropped_and_left_out_are_counted_with_their_places(report_of, tokenizer):
    long = " ".join(sentences(12, 3))
    rows = [chat("yes."), chat(long), {"messages": [{"role": "user", "content": long}, chat("no.")["messages"][1]]}, {}]
    report = report_of({"data/a.jsonl": rows}, kind="ift", data=[SOURCE | {"on_bad_row": "drop", "max_bad_rows": 1}])
    (one,) = report["sources"]
    assert one["truncated"] == {"rows": 2, "shown": ["data/a.jsonl:2", "data/a.jsonl:3"]}
    assert one["dropped"] == {"rows": 1, "shown": ["data/a.jsonl:3"]}
    assert one["left_out"]["rows"] == 1
    assert one["left_out"]["shown"][0].startswith("data/a.jsonl:4: columns none")
    assert (one["rows"], one["available"]) == (3, 3)
    assert report["turn_end"] == {"token": "<|im_end|>", "rows": 2, "trained": 1}
    assert one["lengths"]["max"] > 64
    assert one["tokens_per_pass"] < 64 + 40
    assert 0 < one["trained_tokens_per_pass"] < one["tokens_per_pass"]


def test_lengths_are_quantiles_of_the_tokens_of_whole_rows(report_of, tokenizer):
    rows = [{"text": words(n, n)} for n in range(1, 102)]
    report = report_of({"data/a.jsonl": rows})
    lengths = sorted(len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows)
    found = report["sources"][0]["lengths"]
    assert (found["min"], found["p5"], found["median"], found["p95"], found["max"]) == tuple(
        lengths[place] for place in (0, 5, 50, 95, 100)
    )
    assert found["mean"] == round(sum(lengths) / 101, 1)


def test_samples_show_what_is_learned_of_a_row_of_each_source(report_of):
    report = report_of({"data/a.jsonl": [chat("one red bird.")], "data/b.jsonl": [chat("two old dogs.")]}, kind="ift")
    found = {sample["at"]: sample["segments"] for sample in report["samples"]}
    assert found["data/a.jsonl:1"] == [
        {"text": "<|im_start|>user\nsay it<|im_end|>\n<|im_start|>assistant\n", "trained": False},
        {"text": "one red bird.<|im_end|>", "trained": True},
        {"text": "\n", "trained": False},
    ]
    assert [one["trained"] for one in found["data/b.jsonl:1"]] == [False, True, False]
    assert not any(sample["cut"] for sample in report["samples"])


def test_wanted_and_reached_shares_are_in_the_report(report_of):
    files = {
        "data/a.jsonl": [{"text": words(n, 30)} for n in range(60)],
        "data/b.jsonl": [{"text": words(900 + n, 3)} for n in range(400)],
    }
    report = report_of(files, data=[SOURCE, {"path": "data/b.jsonl", "share": 0.2}])
    domain, general = report["sources"]
    assert (general["wanted_share"], general["weight"], domain["wanted_share"]) == (0.2, None, None)
    assert general["share_of_tokens"] == pytest.approx(0.2, abs=0.003)
    assert general["share_of_rows"] > 0.5
    assert not [line for line in report["warnings"] if "makes up" in line]


def test_the_same_rows_give_the_same_report_and_nothing_random_is_drawn(tmp_path, tokenizer):
    write_rows(tmp_path / "data/a.jsonl", [{"text": words(n % 20)} for n in range(30)])
    states = random.getstate(), torch.get_rng_state()
    first = make_report(material(tmp_path, ["data/a.jsonl"], tokenizer))
    assert make_report(material(tmp_path, ["data/a.jsonl"], tokenizer)) == first
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


# What is refused


def test_a_source_of_which_every_row_is_in_another_one_is_refused(report_of):
    rows = [{"text": words(n)} for n in range(4)]
    report = report_of({"data/a.jsonl": rows, "data/b.jsonl": rows[1:3]})
    assert refusals(report, DataLimits()) == [
        "data/b.jsonl: every row is also in a source before it (data/b.jsonl:1 is data/a.jsonl:2): remove it, or set a "
        "weight there"
    ]


def test_a_source_of_one_row_over_and_over_is_refused(report_of):
    report = report_of({"data/a.jsonl": [{"text": "the same"}] * 4})
    assert refusals(report, DataLimits()) == [
        "data/a.jsonl: all 4 rows are the same (data/a.jsonl:2 is data/a.jsonl:1): correct the file"
    ]


def test_answers_whose_end_is_never_learned_are_refused(report_of):
    report = report_of({"data/a.jsonl": [chat(" ".join(sentences(9, n))) for n in range(3)]}, kind="ift")
    (line,) = refusals(report, DataLimits())
    assert line.startswith("in none of the 3 rows the end of a turn (<|im_end|>) is learned")


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        ({"duplicates": "25%", "overlap": "50%", "truncated": "50%", "dropped": "50%"}, None),
        ({"duplicates": "24.9%"}, "1 of 4 rows are, or nearly are, an earlier one (first: data/a.jsonl:4 is like "),
        ({"duplicates": 0}, "data_limits.duplicates allows 0: take them out"),
        ({"truncated": 0}, "1 of 4 rows are truncated at 160 tokens (first: data/a.jsonl:3); data_limits.truncated"),
        ({"overlap": 0}, "1 of 2 examples of metric domain share a run of words with the training rows (first: held"),
        ({"dropped": 0}, None),
    ],
)
def test_a_limit_refuses_what_is_beyond_it(limits, refused, report_of, tmp_path):
    answers = [words(1, 8), words(2, 8), " ".join(sentences(30, 1)), words(1, 8)]
    write_rows(tmp_path / "held.jsonl", [{"text": words(5)}, {"text": f"{answers[1]}"}])
    report = report_of(
        {"data/a.jsonl": [chat(one) for one in answers]},
        kind="ift",
        train={"sequence_length": 160},
        metrics={"domain": perplexity("held.jsonl")},
    )
    found = refusals(report, DataLimits.model_validate(limits))
    assert (found == []) == (refused is None)
    assert refused is None or refused in found[0]


def test_a_limit_is_a_number_of_rows_or_an_exact_share():
    assert not exceeds(7, "0.07%", 10_000)
    assert exceeds(8, "0.07%", 10_000)
    assert not exceeds(0, 0, 5)
    assert exceeds(1, 0, 5)


def test_what_is_remarkable_is_a_warning_and_the_rest_is_one_line(report_of, tmp_path):
    write_rows(tmp_path / "held.jsonl", [{"text": words(1)}])
    metrics = {"domain": perplexity("held.jsonl")}
    quiet = report_of({"data/a.jsonl": [{"text": words(n)} for n in range(20, 40)]}, metrics=metrics)
    assert quiet["warnings"] == warnings(quiet) == []
    loud = report_of({"data/a.jsonl": [{"text": words(n % 15)} for n in range(20)]}, metrics=metrics)
    duplicate, overlap = loud["warnings"]
    assert duplicate.startswith("5 of 20 rows (25%) are, or nearly are, an earlier one (first: data/a.jsonl:16")
    assert overlap.startswith("1 of 1 examples of metric domain share a run of words with the training rows (first: ")
    assert summary(loud).startswith("data of it: 20 rows and ")
    assert summary(loud).endswith("; 5 duplicates; 0 rows truncated, 0 dropped; overlap domain 1/1")


def test_a_source_that_a_share_repeats_often_is_a_warning(report_of):
    files = {"data/a.jsonl": [{"text": words(n)} for n in range(9)], "data/b.jsonl": [{"text": words(50)}]}
    report = report_of(files, data=[SOURCE, {"path": "data/b.jsonl", "share": 0.5}])
    assert "data/b.jsonl has 1 rows, and its share of 0.5 uses each 9 times a pass" in " ".join(report["warnings"])


# In a stage's process


def test_a_report_is_kept_for_a_resume_and_made_anew_for_other_inputs(tmp_path, tokenizer, monkeypatch):
    write_rows(tmp_path / "data/a.jsonl", [{"text": words(n)} for n in range(9)])
    write_rows(tmp_path / "held.jsonl", [{"text": words(1)}])
    made = []
    make = data_report.make_report
    monkeypatch.setattr(data_report, "make_report", lambda given: made.append(1) or make(given))
    given = material(tmp_path, ["data/a.jsonl"], tokenizer, metrics={"domain": perplexity("held.jsonl")})
    file = tmp_path / "work" / DATA_REPORT
    first = kept_or_made(given, file, {"stage": 1})
    assert kept_or_made(given, file, {"stage": 1}) == first
    assert len(made) == 1
    kept_or_made(given, file, {"stage": 2})
    assert len(made) == 2
    write_rows(tmp_path / "held.jsonl", [{"text": words(77)}])
    assert kept_or_made(given, file, {"stage": 2})["overlap"]["sets"][0]["overlapping"] == 0
    file.write_text(file.read_text().replace('"overlapping": 0', '"overlapping": 1'))
    assert kept_or_made(given, file, {"stage": 2})["overlap"]["sets"][0]["overlapping"] == 0
    assert len(made) == 4


def test_a_stage_beyond_its_limits_is_refused_before_it_trains_and_trains_once_they_are_raised(tmp_path, base_model):
    write_rows(tmp_path / "data/corpus.jsonl", [{"text": words(n % 6)} for n in range(9)])
    (tmp_path / "base").symlink_to(base_model)
    limits = "kind: cpt\ndata_limits: {duplicates: LIMIT}\ndata: [{path: data/corpus.jsonl}]"
    job = only_job(write_spec(tmp_path, limits.replace("LIMIT", "10%")), tmp_path / "runs")
    with pytest.raises(InvalidInput, match=r"^stage only: 3 of 9 rows are, or nearly are, .*duplicates allows 10%"):
        run.run_job(job)
    assert not (Path(job.work) / "checkpoints").exists()
    again = only_job(write_spec(tmp_path, limits.replace("LIMIT", "3")), tmp_path / "runs")
    assert again.identity == job.identity
    assert (run.run_job(again).path / DATA_REPORT).is_file()
