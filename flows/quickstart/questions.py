"""Multiple-choice tasks for lm-eval: the library's held-out callables, and general knowledge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.quickstart.library import Entry
from flows.quickstart.rows import mixed, write_rows

_TASK = """\
# {comment}
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def library_questions(quartets: Sequence[tuple[Entry, ...]]) -> list[dict[str, Any]]:
    """Ask four questions over the same four choices for each quartet, the right one in each place once."""
    rows = []
    for turn, quartet in enumerate(mixed(quartets, "questions")):
        for place, entry in enumerate(quartet):
            answer = (place + turn) % len(quartet)
            choices = [quartet[(place - answer + at) % len(quartet)].summary for at in range(len(quartet))]
            verb = "is" if entry.kind == "class" else "does"
            question = f"What {verb} `{entry.path}`{'' if verb == 'is' else ' do'}?"
            rows.append({"question": question, "choices": choices, "answer": answer})
    return rows


def write_task(folder: Path, name: str, comment: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the questions and the lm-eval task that reads them."""
    write_rows(folder / f"{name}.jsonl", rows)
    (folder / f"{name}.yaml").write_bytes(_TASK.format(name=name, comment=comment).encode("utf-8"))
