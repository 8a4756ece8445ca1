"""Examples of evaluation sets that occur in training rows."""

from row_reading import words
from tiny import TASK, write_rows

from specs.metric import JudgeSpec, LmEvalSpec, PerplexitySpec, PreferenceSpec
from stages.overlap import overlaps


def perplexity(path: str, limit: int | None = None) -> PerplexitySpec:
    return PerplexitySpec.model_validate({"kind": "perplexity", "data": {"path": path}, "limit": limit})


def test_an_example_overlaps_where_a_run_of_13_words_of_it_is_trained_on(tmp_path):
    held = [words(n, 40) for n in range(5)]
    once = held[1].split()
    rows = [
        {"text": f"before {' '.join(once[5:18]).upper().replace(' ', ', ')} after"},
        {"text": " ".join(held[2].split()[5:17])},  # one word too few
        {"text": held[3]},
    ]
    write_rows(tmp_path / "held.jsonl", [{"text": one} for one in held])
    (found,) = overlaps({"domain": perplexity("held.jsonl")}, tmp_path, rows)
    assert (found["examples"], found["judged"], found["overlapping"], found["contained"]) == (5, 5, 2, 1)
    assert found["share"] == 0.4
    assert [(one["at"], one["with"], one["part"]) for one in found["shown"]] == [
        ("held.jsonl:2", 0, round(1 / 28, 3)),
        ("held.jsonl:4", 2, 1.0),
    ]
    assert found["shown"][0]["words"] == " ".join(once[5:18])


def test_short_examples_are_judged_by_runs_of_8_words_and_shorter_ones_not_at_all(tmp_path):
    write_rows(tmp_path / "held.jsonl", [{"text": words(1, 9)}, {"text": words(2, 7)}, {"text": words(3, 9)}])
    rows = [{"text": f"a {words(1, 9)}"}, {"text": words(2, 7)}]
    (found,) = overlaps({"domain": perplexity("held.jsonl")}, tmp_path, rows)
    assert (found["examples"], found["judged"], found["too_short"], found["overlapping"]) == (3, 2, 1, 1)


def test_pairs_and_task_files_are_looked_at_too_and_what_cannot_be_is_told(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": words(1, 20), "chosen": "yes", "rejected": "no"}])
    write_rows(tmp_path / "tasks/qa.jsonl", [{"question": words(n, 20), "choices": ["a"]} for n in (2, 3, 4)])
    (tmp_path / "tasks/qa.yaml").write_text(TASK)
    (tmp_path / "tasks/other.yaml").write_text(TASK.replace("test_split: test", "test_split: other"))
    metrics = {
        "pairs": PreferenceSpec.model_validate({"kind": "preference", "data": {"path": "pairs.jsonl"}}),
        "qa": LmEvalSpec(kind="lm_eval", task="tasks/qa.yaml", limit=2),
        "arc": LmEvalSpec(kind="lm_eval", task="arc_easy"),
        "gone": perplexity("gone.jsonl"),
        "split": LmEvalSpec(kind="lm_eval", task="tasks/other.yaml"),
    }
    rows = [{"text": f"{words(1, 20)} {words(3, 20)} {words(4, 20)}"}]
    pairs, qa, arc, gone, split = overlaps(metrics, tmp_path, rows)
    assert (pairs["judged"], pairs["overlapping"]) == (1, 1)
    assert (qa["examples"], qa["overlapping"], qa["shown"][0]["at"]) == (2, 1, "tasks/qa.jsonl:2")
    assert arc["not_looked_at"] == "the rows of the installed task arc_easy are no files of the spec"
    assert split["not_looked_at"] == "no examples are where the metric's task looks for them"
    assert gone["not_looked_at"].endswith("gone.jsonl: no such file")


def test_rows_that_are_not_measured_are_not_looked_at(tmp_path):
    write_rows(tmp_path / "held.jsonl", [{"text": words(n, 20)} for n in range(3)])
    (found,) = overlaps({"domain": perplexity("held.jsonl", 2)}, tmp_path, [{"text": words(n, 20)} for n in (0, 2)])
    assert (found["examples"], found["overlapping"]) == (2, 1)


def test_evaluation_sets_beyond_the_bound_are_counted_as_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.overlap.MOST_RUNS", 60)
    write_rows(tmp_path / "held.jsonl", [{"text": words(n, 40)} for n in range(5)])
    (found,) = overlaps({"domain": perplexity("held.jsonl")}, tmp_path, [{"text": words(0, 40)}])
    assert (found["examples"], found["judged"], found["beyond"]) == (5, 2, 3)


def test_a_judge_has_no_rows_of_its_own(tmp_path):
    judge = JudgeSpec.model_validate({"kind": "judge", "answers": "samples", "model": {"path": "judge"}})
    assert overlaps({"judge": judge}, tmp_path, [{"text": words(1)}]) == []
