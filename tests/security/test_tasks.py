"""Tasks for the harness that come with a spec: they say what to ask, and run nothing."""

import re
from pathlib import Path

import pytest
import tiny

from specs.load import SpecError
from specs.metric import LmEvalSpec
from stages.check import check_spec
from stages.errors import InvalidInput
from stages.metrics import harness
from stages.pipeline import load_pipeline

QA = tiny.TASK
CODE = "from pathlib import Path\nPath({mark!r}).touch()\n\ndef ask(*rows):\n    return rows\n"


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that hostile code makes when it runs."""
    return tmp_path / "mark"


@pytest.fixture
def folder(tmp_path, mark) -> Path:
    """A project's data, with Python beside the task that touches ``mark``."""
    tiny.write_data(tmp_path / "p")
    for name in ("code.py", "acc.py", "evil.py", "evil/evil.py"):
        place = tmp_path / "p/tasks" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(CODE.format(mark=str(mark)))
    return tmp_path / "p"


HOSTILE = {
    "process_docs: !function code.ask": r":13:\d+: .*!function.*would run code.*doc_to_text",
    "doc_to_text: !!python/object/apply:os.system [touch]": r":\d+:\d+: .*a task of a spec may not",
    "class: code.ask": r":13:\d+: class: names a Python class, and a task of a spec may not",
    "process_results: code.ask": r":13:\d+: process_results: names a Python function",
    "custom_dataset: code.ask": r":13:\d+: custom_dataset: names a Python function",
    "include: other.yaml": r":13:\d+: include: reads another task file, which may run code",
    "unsafe_code: true": r":13:\d+: unsafe_code: runs what the model writes",
    "use_prompt: 'code.yaml:one'": r":13:\d+: use_prompt: reads prompts from elsewhere",
    "group: many": r":13:\d+: group: names other tasks",
    "made_up: 1": r":13:\d+: made_up: no key of a task .*allowed are task, ",
}
METRICS = QA[QA.index("metric_list:") : QA.index("\nmetadata:")]
CHANGED = {
    (
        "dataset_path: json",
        "dataset_path: code.py",
    ): r":2:\d+: dataset_path: .*'code\.py'.*reads local files by json",
    ("dataset_path: json", "dataset_path: pandas"): r":2:\d+: dataset_path: .*'pandas'",
    ("dataset_path: json", "dataset_path: owner/name"): r":2:\d+: dataset_path: .*'owner/name'.*local files",
    ("dataset_path: json\n", ""): r":1:\d+: dataset_path: found nothing",
    ("{data_files: {test: qa.jsonl}}", "{data_dir: /}"): r":3:\d+: dataset_kwargs: names no files",
    (
        "{data_files: {test: qa.jsonl}}",
        "{data_files: {test: qa.jsonl}, token: x}",
    ): r":3:\d+: dataset_kwargs: token is not",
    ("metric: acc,", "metric: ./evil,"): r":9:\d+: metric_list: each metric is named by a word",
    ("metric: acc,", "metric: acc, hf_evaluate: true,"): r":9:\d+: metric_list: hf_evaluate runs a script",
    (METRICS, "metric_list: {metric: acc}"): r":9:\d+: metric_list: found .*; it is a list, an entry for each metric",
    ("task: tiny_qa", "task: [tiny_qa]"): r"a task YAML names its task",
    ("test: qa.jsonl", "test: 'https://example.org/qa.jsonl'"): r"does not exist",
}


def refused(folder: Path, text: str, wanted: str) -> None:
    """By `validate` and by the harness's own door, with the file and what to do."""
    (folder / "tasks/qa.yaml").write_text(text)
    with pytest.raises(InvalidInput, match=rf"tasks/qa\.yaml{wanted}" if wanted[0] == ":" else wanted):
        harness.task_files(folder / "tasks/qa.yaml")
    (folder / "spec.yaml").write_text(tiny.SPEC)
    tiny_model = folder / "base"
    tiny_model.mkdir()
    with pytest.raises(SpecError, match=rf"spec\.yaml:\d+:\d+: metrics\.qa\.task: .*{wanted}"):
        check_spec(*load_pipeline(folder / "spec.yaml"))


@pytest.mark.parametrize(("line", "wanted"), HOSTILE.items(), ids=HOSTILE)
def test_a_task_that_would_run_code_or_read_elsewhere_is_refused(line, wanted, folder, mark):
    text = QA if not line.startswith("doc_to_text") else re.sub(r"doc_to_text: .*\n", "", QA)
    refused(folder, f"{text}{line}\n", wanted)
    assert not mark.exists()


@pytest.mark.parametrize(("change", "wanted"), CHANGED.items(), ids=[new.strip() or "none" for _, new in CHANGED])
def test_rows_and_metrics_come_from_where_nothing_runs(change, wanted, folder, mark):
    assert change[0] in QA
    refused(folder, QA.replace(*change), wanted)
    assert not mark.exists()


# In the harness itself


@pytest.fixture
def measure(folder, base_model, monkeypatch):
    """Measure a task of this text on the tiny model, in a folder that hostile scripts are found from."""
    import torch

    from stages.model import load_plain, load_tokenizer

    model, tokenizer = load_plain(base_model, torch.float32), load_tokenizer(base_model)
    monkeypatch.chdir(folder / "tasks")

    def run(text: str = QA, task: str = "tasks/qa.yaml"):
        (folder / "tasks/qa.yaml").write_text(text)
        spec = LmEvalSpec.model_validate(
            {"kind": "lm_eval", "task": task, "metric": "acc", "sequence_length": 128, "limit": 2}
        )
        return harness.measure(spec, folder, model, tokenizer, chat_template=False)

    return run


@pytest.mark.model
def test_a_metric_that_the_harness_does_not_have_is_not_looked_for_elsewhere(measure, mark):
    with pytest.raises(InvalidInput, match=r"qa\.yaml: metric_list: the harness has no metric 'evil'; it has: acc, "):
        measure(QA.replace("metric: acc,", "metric: evil,"))
    assert not mark.exists()


@pytest.mark.model
def test_a_task_by_name_is_an_installed_one_and_never_a_file(measure, folder, mark):
    hostile = folder / "tasks/evil.txt"
    hostile.write_text(QA + "process_docs: !function code.ask\n")
    with pytest.raises(InvalidInput, match=r"no task 'evil\.txt' is installed in the harness"):
        measure(task="evil.txt")
    assert not mark.exists()


@pytest.mark.model
@pytest.mark.parametrize(
    "expression",
    [
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ question.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__.keys() }}",
        "{{ question | regex_replace('a', 'b') | attr('__class__') | attr('mro') }}",
        "{{ choices.clear() }}",
    ],
)
def test_the_harness_renders_what_a_task_says_in_a_sandbox(expression, measure, mark):
    from jinja2.exceptions import SecurityError, UndefinedError

    text = QA.replace('"{{question}}"', f'"{expression}"'.replace("MARK", str(mark)))
    with pytest.raises((SecurityError, UndefinedError)):
        measure(text)
    assert not mark.exists()


@pytest.mark.model
def test_the_harness_renders_in_bounds(measure):
    with pytest.raises(InvalidInput, match=r"a template of the task takes more than 512 MiB.*doc_to_text"):
        measure(QA.replace('"{{question}}"', "\"{{ 'x' * 3_000_000_000 }}\""))


@pytest.mark.model
def test_a_sound_task_measures_as_before(measure):
    measures, shown = measure(QA.replace("{{question}}", "{{ question | regex_replace('say', 'tell') }}"))
    assert shown["task"] == "tiny_qa"
    assert 0 <= measures["acc"].value <= 1
