"""Write the spec's metrics as task YAMLs for `lm_eval`, over the same held-out rows.

    python heldout_tasks.py --spec spec.yaml --model BASE --output TASKS

Text becomes a loglikelihood_rolling task. Conversations and preference pairs become multiple choice with
one and two answers, the chat template applied here: only so can the plain quizzes share the same call.
Quizzes are copied, cut to the spec's limit and with absolute paths, as the harness wants them.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from settings import arguments, messages, read_jsonl, read_spec
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MEAN = {"aggregation": "mean", "higher_is_better": True}


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], task: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    body = yaml.safe_dump(task | {"task": name} | where)
    (folder / f"{name}.yaml").write_text(body, encoding="utf-8")


def answer(tokenizer: PreTrainedTokenizerBase, opening: list[dict], turn: dict) -> tuple[str, str]:
    """The rendered context, and the turn up to the token that ends it."""
    context = tokenizer.apply_chat_template(opening, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*opening, turn], tokenize=False)
    said = whole[len(context) :]
    return context, said[: said.index(tokenizer.eos_token) + len(tokenizer.eos_token)]


def choice_rows(tokenizer: PreTrainedTokenizerBase, rows: list[dict], sides: tuple[str, ...]) -> list[dict]:
    found = []
    for row in rows:
        prompt = row["messages"][:-1] if "messages" in row else messages(row["prompt"], "user")
        turns = [row["messages"][-1]] if "messages" in row else [messages(row[s], "assistant")[0] for s in sides]
        answers = [answer(tokenizer, prompt, turn) for turn in turns]
        size = len(turns[0]["content"].encode())
        found.append({"context": answers[0][0], "choices": [text for _, text in answers], "gold": 0, "bytes": size})
    return found


def main() -> None:
    paths = arguments("model", "output")
    spec, folder = read_spec(paths.spec), paths.spec.parent
    output = paths.output.resolve()
    output.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(paths.model)
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **MEAN}],
    }
    for name, metric in spec["metrics"].items():
        if metric["kind"] == "lm_eval":
            source = folder / metric["task"]
            task = yaml.safe_load(source.read_text(encoding="utf-8"))
            (file,) = task["dataset_kwargs"]["data_files"].values()
            write_task(output, name, read_jsonl(source.parent / file)[: metric.get("limit")], task)
            continue
        rows = read_jsonl(folder / metric["data"]["path"])
        if "text" in rows[0]:
            write_task(output, name, rows, rolling)
        else:
            sides = ("chosen", "rejected") if metric["kind"] == "preference" else ("completion",)
            write_task(output, name, choice_rows(tokenizer, rows, sides), choice)


if __name__ == "__main__":
    main()
