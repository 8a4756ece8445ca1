"""The quickstart's data: sizes, shapes, and that nothing held out is trained on."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.quickstart import build
from flows.quickstart.corpus import unseen
from flows.quickstart.library import walk
from flows.quickstart.sentence import first_sentence
from flows.quickstart.split import split, words

REPOSITORY = Path(__file__).parents[2]
SIZES = {  # file: rows at least, rows at most, bytes at least
    "data/corpus.jsonl": (1_500, 5_000, 700_000),
    "data/corpus.heldout.jsonl": (25, 80, 20_000),
    "data/instructions.jsonl": (1_500, 2_000, 200_000),
    "data/instructions.heldout.jsonl": (64, 64, 8_000),
    "data/preferences.jsonl": (402, 402, 70_000),
    "data/preferences.heldout.jsonl": (120, 120, 20_000),
    "data/general.heldout.jsonl": (25, 25, 9_000),
    "data/replay.jsonl": (20, 20, 7_000),
    "tasks/stdlib_qa.jsonl": (100, 120, 25_000),
    "tasks/general.jsonl": (120, 130, 10_000),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quickstart")
    build(path)
    return path


@pytest.fixture(scope="module")
def parts():
    entries = walk()
    return split(entries, unseen(entries))


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def evened(text):
    return " ".join(text.split())


def sixes(text):
    """Every run of six words."""
    parts = text.split()
    return zip(*(parts[at:] for at in range(6)), strict=False)


def trained_text(folder):
    """Everything that a stage trains on, evened out, one string."""
    texts = [row["text"] for row in rows(folder, "data/corpus.jsonl") + rows(folder, "data/replay.jsonl")]
    for row in rows(folder, "data/instructions.jsonl"):
        texts += [message["content"] for message in row["messages"]]
    for row in rows(folder, "data/preferences.jsonl"):
        texts += [row["prompt"], row["chosen"], row["rejected"]]
    return "\n".join(evened(text) for text in texts)


def asked_and_answered(folder):
    """Every question and answer of the instruction and preference training files."""
    for row in rows(folder, "data/instructions.jsonl"):
        yield from (message["content"] for message in row["messages"])
    for row in rows(folder, "data/preferences.jsonl"):
        yield from (row["prompt"], row["chosen"], row["rejected"])


@pytest.mark.parametrize("name", SIZES)
def test_every_file_has_its_size(folder, name):
    least, most, size = SIZES[name]
    assert least <= len(rows(folder, name)) <= most
    assert (folder / name).stat().st_size >= size


def test_no_other_file_is_written(folder):
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == SIZES.keys() | {"tasks/stdlib_qa.yaml", "tasks/general.yaml"}


def test_two_builds_are_byte_identical(tmp_path):
    """Two processes, as the command builds it, and two hash seeds: neither a set's order nor an address shows."""
    code = "import sys, pathlib, flows.quickstart as q; q.build(pathlib.Path(sys.argv[1]))"
    for seed in ("7", "8"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, tmp_path / seed], check=True, cwd=REPOSITORY, env=environment)
    for path in sorted((tmp_path / "7").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "8" / path.relative_to(tmp_path / "7")).read_bytes(), path.name


def test_build_imports_nothing_heavy_or_unsafe(tmp_path):
    code = (
        "import sys, pathlib, flows.quickstart as q; q.build(pathlib.Path(sys.argv[1]));"
        "heavy = set('torch transformers prefect antigravity this tkinter turtle idlelib test'.split());"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["data/corpus.jsonl", "data/corpus.heldout.jsonl"])
def test_corpus_rows(folder, name):
    for row in rows(folder, name):
        assert row.keys() == {"text", "source"}
        assert row["text"].strip()
        assert row["source"]
        assert len(row["text"]) < 12_000


@pytest.mark.parametrize("name", ["data/instructions.jsonl", "data/instructions.heldout.jsonl"])
def test_instruction_rows(folder, name):
    for row in rows(folder, name):
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert 10 <= len(question["content"]) <= 250
        assert 3 <= len(answer["content"]) <= 220
    assert len({row["messages"][0]["content"] for row in rows(folder, name)}) >= 0.98 * len(rows(folder, name))


@pytest.mark.parametrize("name", ["data/preferences.jsonl", "data/preferences.heldout.jsonl"])
def test_preference_rows(folder, name):
    found = rows(folder, name)
    for row in found:
        assert row.keys() == {"prompt", "chosen", "rejected", "kind"}
        assert row["chosen"] != row["rejected"]
        assert len(row["chosen"]) <= 130  # about 40 tokens
        assert len(row["rejected"]) <= 220  # about 60
    kinds = Counter(row["kind"] for row in found)
    assert kinds.keys() == {"verbose", "evasive", "wrong"}
    assert min(kinds.values()) >= 0.3 * len(found)


def test_answers_are_clean_prose(folder):
    """No marks of a markup language, no signature, no half sentence."""
    answers = [row["messages"][1]["content"] for row in rows(folder, "data/instructions.jsonl")]
    answers += [choice for row in rows(folder, "tasks/stdlib_qa.jsonl") for choice in row["choices"]]
    for answer in answers:
        assert not re.search(r"::|``|:\w+:`|>>>|See help\(|Initialize self|\n|  |\.\.$", answer), answer
        assert answer[-1] in ".!?`", answer


def test_callables_are_split_three_ways(parts):
    train, asked, hidden = ({e.path for e in group} for group in (parts.train, parts.asked, parts.unseen))
    assert not train & asked
    assert not train & hidden
    assert not asked & hidden
    assert len(asked) == 4 * len(parts.quartets)


def test_no_training_question_names_a_held_out_callable(folder, parts):
    heldout = {entry.path for entry in parts.asked + parts.unseen if "." in entry.path}
    quoted = {entry.path for entry in parts.asked + parts.unseen if "." not in entry.path}
    for text in asked_and_answered(folder):
        assert not heldout & set(re.findall(r"[\w.]+\w", text)), text
        assert not quoted & set(re.findall(r"`(\w+)`", text)), text


def test_no_training_answer_is_a_held_out_answer(folder, parts):
    answers = {entry.summary for entry in parts.asked}
    for text in asked_and_answered(folder):
        assert not any(answer in text for answer in answers), text


def test_what_is_asked_can_be_learnt_from_the_corpus(folder, parts):
    sources = {row["source"] for row in rows(folder, "data/corpus.jsonl")}
    assert {entry.path for entry in parts.asked} <= sources


def test_no_held_out_text_is_trained_on(folder):
    trained = trained_text(folder)
    for name in ("data/corpus.heldout.jsonl", "data/general.heldout.jsonl"):
        for row in rows(folder, name):
            for paragraph in re.split(r"\n\s*\n", row["text"]):
                if len(evened(paragraph)) >= 40:  # a shorter one, such as a heading, identifies nothing
                    assert evened(paragraph) not in trained, row


def test_no_held_out_document_is_trained_on(folder):
    sources = [{row["source"] for row in rows(folder, f"data/{name}.jsonl")} for name in ("corpus", "corpus.heldout")]
    assert not sources[0] & sources[1]
    topics = [row for row in rows(folder, "data/corpus.heldout.jsonl") if row["source"].startswith("topic:")]
    assert all(len(row["text"]) <= 2_000 for row in topics)


def test_padding_and_evasions_are_worded_anew_in_the_held_out_pairs(folder):
    def sentences(name):
        found = set()
        for row in rows(folder, name):
            if row["kind"] != "wrong":
                padding = re.sub(r"`[^`]*`", "`x`", row["rejected"].replace(row["chosen"], "\n"))
                found |= set(re.findall(r"[^.!?\n]{8,}[.!?]", padding))
        return found

    train, heldout = sentences("data/preferences.jsonl"), sentences("data/preferences.heldout.jsonl")
    assert len(train) >= 35
    assert len(heldout) >= 18
    assert not train & heldout


@pytest.mark.parametrize("name", ["stdlib_qa", "general"])
def test_questions_are_well_formed(folder, name):
    found = rows(folder, f"tasks/{name}.jsonl")
    for row in found:
        assert row.keys() == {"question", "choices", "answer"}
        assert len(row["choices"]) == len(set(row["choices"])) == 4
        assert all(choice.strip() for choice in row["choices"])
        assert row["answer"] in range(4)
        assert max(map(len, row["choices"])) <= 100
    assert len({row["question"] for row in found}) == len(found)
    places = Counter(row["answer"] for row in found)
    assert max(places.values()) - min(places.values()) <= 1


def test_choices_are_about_equally_long(folder):
    for row in rows(folder, "tasks/stdlib_qa.jsonl"):
        lengths = [len(choice) for choice in row["choices"]]
        assert max(lengths) <= 1.5 * min(lengths)


def test_a_model_that_ignores_the_question_scores_one_in_four(folder):
    """Each sentence is right as often as its quartet offers it over four, whatever a model thinks of it."""
    right, offered = Counter(), Counter()
    for row in rows(folder, "tasks/stdlib_qa.jsonl"):
        right[row["choices"][row["answer"]]] += 1
        offered.update(row["choices"])
    assert all(offered[choice] == 4 * right[choice] for choice in offered)


def test_names_seldom_give_the_answer_away(folder):
    """Measure how many questions a reader of names alone would get: the best match is the gold choice."""
    found = rows(folder, "tasks/stdlib_qa.jsonl")
    given_away = 0
    for row in found:
        path = re.findall(r"`([^`]+)`", row["question"])[0]
        leaf = path.rpartition(".")[2]
        assert leaf.lower() not in row["choices"][row["answer"]].lower()
        stems = {word[:4] for word in words(leaf) if len(word) >= 3}
        scores = [len(stems & {word[:4] for word in words(choice)}) for choice in row["choices"]]
        best = [at for at, score in enumerate(scores) if score == max(scores)]
        given_away += (row["answer"] in best) / len(best)
    assert given_away / len(found) <= 0.55  # 0.47 on 3.11, where chance is 0.25


def test_the_task_files_hold_relative_paths(folder):
    for name in ("stdlib_qa", "general"):
        task = YAML(typ="safe").load((folder / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert task["task"] == name
        assert task["output_type"] == "multiple_choice"
        assert task["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}
        assert task["doc_to_text"] == "Question: {{question}}\nAnswer:"
        assert {metric["metric"] for metric in task["metric_list"]} == {"acc", "acc_norm"}


def test_prose_is_unique_and_not_about_programming(folder):
    held, replay = rows(folder, "data/general.heldout.jsonl"), rows(folder, "data/replay.jsonl")
    texts = [row["text"] for row in held + replay]
    assert len(set(texts)) == len(texts)
    assert not any(
        re.search(r"python|\bprograms?\b|programming|software|comput", text, re.IGNORECASE) for text in texts
    )
    runs = [{run for row in group for run in sixes(row["text"])} for group in (held, replay)]
    assert not runs[0] & runs[1]


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Recursively copy a tree.\n\nMore.", "Recursively copy a tree."),
        ("f(x) -> y\n\nreturn the ``root`` of *x*", "Return the root of x."),
        ("Use :func:`os.walk` for this. Or not.", "Use os.walk for this."),
        ("Return a value, e.g. Monday. Then stop.", "Return a value, e.g. Monday."),
        ("Check the given flag. (see Flags).", "Check the given flag."),
        ("Initialize self.  See help(type(self)) for accurate signature.", ""),
        ("Make one of these:", ""),
        ("Return::\n\n    this", ""),
        ("An unclosed (bracket in a line", ""),
    ],
)
def test_first_sentence(doc, sentence):
    assert first_sentence(doc) == sentence


def test_walk_knows_names_signatures_and_kinds():
    entries = {entry.path: entry for entry in walk()}
    assert len(entries) >= 2_000
    tree = entries["shutil.copytree"]
    assert (tree.kind, tree.home, tree.leaf) == ("function", "shutil", "copytree")
    assert tree.signature.startswith("(src, dst, symlinks=False")
    assert entries["len"].module == "builtins"
    assert entries["os.path.join"].module == "os.path"
    assert entries["str.partition"].home == "str"
    assert all(" at 0x" not in entry.signature for entry in entries.values())
