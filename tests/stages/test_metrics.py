"""Each metric against a computation by hand, or against the library run by itself."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import sentences, write_data, write_rows

from specs.metric import LmEvalSpec, PerplexitySpec, PreferenceSpec
from stages import evaluate
from stages.errors import InvalidInput
from stages.measure import Measure, ratio
from stages.metrics import harness, perplexity, preference
from stages.model import load_plain, load_tokenizer
from stages.plan import make_plan

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tokenizer(base_model):
    return load_tokenizer(base_model)


@pytest.fixture(scope="module")
def model(base_model):
    return load_plain(base_model, torch.float32).eval()


@pytest.fixture(scope="module")
def exact(base_model):
    return load_plain(base_model, torch.float64).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    write_rows(folder / "texts.jsonl", [{"text": " ".join(sentences(n, n)) + " çà"} for n in (1, 9, 2, 5, 1)])
    return folder


def log_likelihood(exact, context: list[int], continuation: list[int]) -> float:
    """log p(continuation | context) in nats, by hand and in float64."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        scores = exact(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return math.fsum(float(scores[len(context) + n - 1, token]) for n, token in enumerate(continuation))


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def texts_spec(path: str = "texts.jsonl", **fields) -> PerplexitySpec:
    return PerplexitySpec.model_validate(
        {"kind": "perplexity", "data": {"path": path}, "sequence_length": 32, "batch_size": 3} | fields
    )


# Perplexity


@pytest.mark.parametrize("window", [7, 32, 512])
def test_bits_per_byte_of_texts_by_hand(window, model, exact, tokenizer, folder):
    nats, sizes, words, tokens = [], [], 0, 0
    for row in rows(folder / "texts.jsonl"):
        ids = tokenizer(row["text"])["input_ids"]
        parts = [ids[start : start + window] for start in range(0, len(ids), window)]
        before = [[tokenizer.bos_token_id], *([part[-1]] for part in parts)]
        nats.append(-math.fsum(log_likelihood(exact, c, part) for c, part in zip(before, parts, strict=False)))
        sizes.append(len(row["text"].encode()))
        words += len(row["text"].split())
        tokens += len(ids)
    spec = texts_spec(sequence_length=window)
    measures, shown = perplexity.measure(spec, folder, model, tokenizer, "domain")
    found = measures["bits_per_byte"]
    assert found.value == pytest.approx(math.fsum(nats) / math.log(2) / sum(sizes), rel=1e-6)
    assert found.numerators == pytest.approx([one / math.log(2) for one in nats], rel=1e-5)
    assert found.weights == tuple(sizes)
    assert (found.n, found.better) == (5, "lower")
    for unit, total in (("byte", sum(sizes)), ("word", words), ("token", tokens)):
        measure = measures[f"bits_per_{unit}"]
        assert math.log(shown[f"{unit}_perplexity"]) == pytest.approx(math.fsum(nats) / total, rel=1e-6)
        assert 2**measure.value == pytest.approx(shown[f"{unit}_perplexity"])
        assert measure.numerators == found.numerators
        assert (sum(measure.weights), measure.n, measure.better) == (total, 5, "lower")
    assert (shown["tokens"], shown["words"], shown["bytes"]) == (tokens, words, sum(sizes))
    assert set(measures) == set(perplexity.MEASURES)


def test_bits_per_byte_of_chats_by_hand(model, exact, tokenizer, folder):
    nats, sizes = [], []
    for row in rows(folder / "data/instructions.heldout.jsonl"):
        question, answer = (message["content"] for message in row["messages"])
        context = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        nats.append(-log_likelihood(exact, context, tokenizer(f"{answer}<|im_end|>")["input_ids"]))
        sizes.append(len(answer.encode()))
    spec = texts_spec("data/instructions.heldout.jsonl", sequence_length=256)
    found = perplexity.measure(spec, folder, model, tokenizer, "answers")[0]["bits_per_byte"]
    assert found.value == pytest.approx(math.fsum(nats) / math.log(2) / sum(sizes), rel=1e-6)


def test_every_turn_of_the_assistant_counts(model, exact, tokenizer, tmp_path):
    turns = [("say cat", "cat."), ("and?", "two old dogs."), ("and?", "a bird")]
    messages, context, nats = [], "", 0.0
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        context += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        nats -= log_likelihood(exact, tokenizer(context)["input_ids"], tokenizer(f"{answer}<|im_end|>")["input_ids"])
        context += f"{answer}<|im_end|>\n"
    write_rows(tmp_path / "chat.jsonl", [{"messages": messages}])
    spec = texts_spec("chat.jsonl", sequence_length=256)
    measures, shown = perplexity.measure(spec, tmp_path, model, tokenizer, "answers")
    size = sum(len(answer.encode()) for _, answer in turns)
    assert measures["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert shown["bytes"] == size


def test_a_chat_longer_than_the_window_is_not_scored_in_part(model, tokenizer, tmp_path):
    """Bits of a part over the bytes of the whole would make a short window look like a good model."""
    answer = " ".join(sentences(8, 3))
    chat = {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]}
    write_rows(tmp_path / "chat.jsonl", [chat])

    def found(window: int):
        measures, shown = perplexity.measure(
            texts_spec("chat.jsonl", sequence_length=window), tmp_path, model, tokenizer, "answers"
        )
        return measures["bits_per_byte"].value, shown["tokens"]

    whole, tokens = found(512)
    try:
        value, counted = found(32)
    except InvalidInput:
        return
    assert counted == tokens
    assert value == pytest.approx(whole, rel=0.5)


@pytest.mark.parametrize("path", ["texts.jsonl", "data/instructions.heldout.jsonl"])
def test_the_batch_size_does_not_change_perplexity(path, model, tokenizer, folder):
    values = [
        perplexity.measure(texts_spec(path, batch_size=size, sequence_length=96), folder, model, tokenizer, "x")[0]
        for size in (1, 4, 64)
    ]
    for other in values[1:]:
        assert other["bits_per_byte"].value == pytest.approx(values[0]["bits_per_byte"].value, abs=1e-4)
        assert other["bits_per_byte"].numerators == pytest.approx(values[0]["bits_per_byte"].numerators, rel=1e-4)


# Preferences


def pairs_spec(**fields) -> PreferenceSpec:
    return PreferenceSpec.model_validate(
        {"kind": "preference", "data": {"path": "data/pairs.heldout.jsonl"}, "sequence_length": 256, "batch_size": 3}
        | fields
    )


def pairs_by_hand(exact, tokenizer, file: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for row in rows(file):
        context = tokenizer(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        for side, values in found.items():
            values.append(log_likelihood(exact, context, tokenizer(f"{row[side]}<|im_end|>")["input_ids"]))
    return found


def test_log_probabilities_of_pairs_by_hand(model, exact, tokenizer, folder):
    by_hand = pairs_by_hand(exact, tokenizer, folder / "data/pairs.heldout.jsonl")
    measures, shown, found = preference.measure(pairs_spec(), folder, model, tokenizer, "pairs", None)
    assert set(measures) == {"policy_accuracy", "policy_length_bias"}  # the base has no start to be rewarded against
    for side in ("chosen", "rejected"):
        assert found[side] == pytest.approx(by_hand[side], rel=1e-5)
    wins = [c > r for c, r in zip(by_hand["chosen"], by_hand["rejected"], strict=True)]
    assert measures["policy_accuracy"].value == pytest.approx(sum(wins) / len(wins))
    assert shown["pairs"] == 20


def test_only_the_last_answer_of_a_longer_conversation_is_compared(model, exact, tokenizer, tmp_path):
    prompt = [
        {"role": "user", "content": "say cat"},
        {"role": "assistant", "content": "the cat."},
        {"role": "user", "content": "and?"},
    ]
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": prompt, "chosen": "a dog", "rejected": "two dogs at night"}])
    _, _, found = preference.measure(
        pairs_spec(data={"path": "pairs.jsonl"}), tmp_path, model, tokenizer, "pairs", None
    )
    context = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in prompt)
    ids = tokenizer(f"{context}<|im_start|>assistant\n")["input_ids"]
    assert found["chosen"] == pytest.approx(
        [log_likelihood(exact, ids, tokenizer("a dog<|im_end|>")["input_ids"])], rel=1e-5
    )


def test_rewards_of_a_known_pair_of_models(model, base_model, exact, tokenizer, folder):
    policy = load_plain(base_model, torch.float32).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "mlp" in name:
                parameter.mul_(1.2)
    start = preference.measure(pairs_spec(), folder, model, tokenizer, "pairs", None)[2]
    measures, _, _ = preference.measure(pairs_spec(beta=0.3), folder, policy, tokenizer, "pairs", start)
    file = folder / "data/pairs.heldout.jsonl"
    ours, theirs = pairs_by_hand(policy.double(), tokenizer, file), pairs_by_hand(exact, tokenizer, file)
    rewards = {side: [0.3 * (a - b) for a, b in zip(ours[side], theirs[side], strict=True)] for side in ours}
    margins = [c - r for c, r in zip(rewards["chosen"], rewards["rejected"], strict=True)]
    accuracy = sum(margin > 0 for margin in margins) / 20
    assert 0 < accuracy < 1 or max(map(abs, margins)) > 0.1
    assert measures["reward_accuracy"].value == pytest.approx(accuracy)
    assert measures["reward_margin"].value == pytest.approx(math.fsum(margins) / 20, abs=1e-4)
    assert measures["reward_margin"].numerators == pytest.approx(margins, abs=1e-3)
    for side in ours:
        assert measures[f"{side}_reward"].value == pytest.approx(math.fsum(rewards[side]) / 20, abs=1e-3)
    assert set(measures) <= set(preference.MEASURES)


def test_a_model_is_not_rewarded_against_itself(model, tokenizer, folder):
    start = preference.measure(pairs_spec(), folder, model, tokenizer, "pairs", None)[2]
    measures, _, _ = preference.measure(pairs_spec(), folder, model, tokenizer, "pairs", start)
    assert measures["reward_margin"].value == pytest.approx(0, abs=1e-6)
    assert measures["reward_accuracy"].value == 0


def test_pairs_longer_than_the_window_are_refused(model, tokenizer, folder):
    with pytest.raises(
        InvalidInput, match=r"metric pairs: pair 1 of data/pairs.* tokens; raise its sequence_length \(20\)"
    ):
        preference.measure(pairs_spec(sequence_length=20), folder, model, tokenizer, "pairs", None)


# The harness


def test_a_limit_scores_the_first_rows_as_they_are_scored_among_all(model, tokenizer, folder):
    whole, _ = perplexity.measure(texts_spec(), folder, model, tokenizer, "texts")
    first, shown = perplexity.measure(texts_spec(limit=3), folder, model, tokenizer, "texts")
    assert (first["bits_per_byte"].n, whole["bits_per_byte"].n) == (3, 5)
    assert first["bits_per_byte"].numerators == pytest.approx(whole["bits_per_byte"].numerators[:3], rel=1e-5)
    assert first["bits_per_byte"].weights == whole["bits_per_byte"].weights[:3]
    assert shown["bytes"] == sum(first["bits_per_byte"].weights)
    _, _, all_pairs = preference.measure(pairs_spec(), folder, model, tokenizer, "pairs", None)
    start = {side: scores[:4] for side, scores in all_pairs.items()}
    rewards, counted, some = preference.measure(pairs_spec(limit=4), folder, model, tokenizer, "pairs", start)
    assert (counted["pairs"], rewards["reward_margin"].n) == (4, 4)
    assert some["chosen"] == pytest.approx(all_pairs["chosen"][:4], rel=1e-5)


def task_spec(**fields) -> LmEvalSpec:
    return LmEvalSpec.model_validate(
        {"kind": "lm_eval", "task": "tasks/qa.yaml", "metric": "acc", "sequence_length": 128, "batch_size": 4} | fields
    )


def test_accuracy_is_what_the_harness_finds_by_itself(model, base_model, tokenizer, folder, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(folder / "tasks")  # where the harness looks for data files
    by_itself = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={base_model},dtype=float32,device=cpu,max_length=128",
        tasks=["tiny_qa"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
    )["results"]["tiny_qa"]
    monkeypatch.chdir("/")
    measures, shown = harness.measure(task_spec(), folder, model, tokenizer, chat_template=False)
    for metric in ("acc", "acc_norm"):
        assert measures[metric].value == by_itself[f"{metric},none"]
        assert math.fsum(measures[metric].numerators) / 20 == pytest.approx(by_itself[f"{metric},none"])
        assert (measures[metric].n, measures[metric].better) == (20, "higher")
        assert measures[metric].standard_error is not None
    assert shown == {"task": "tiny_qa", "version": 1.0, "few_shot": 0}


def test_a_limit_and_the_chat_template_reach_the_harness(model, tokenizer, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    template = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: (asked.append(a), template(*a, **k))[1], raising=False
    )
    assert harness.measure(task_spec(limit=7), folder, model, tokenizer, chat_template=False)[0]["acc"].n == 7
    assert not asked
    harness.measure(task_spec(limit=2), folder, model, tokenizer, chat_template=True)
    assert asked


def test_measuring_leaves_the_weights_alone(model, tokenizer, folder):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    harness.measure(task_spec(limit=2), folder, model, tokenizer, chat_template=False)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_relative_data_files_are_found_from_the_task(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert harness.task_files(folder / "tasks/qa.yaml") == [folder / "tasks/qa.yaml", folder / "tasks/qa.jsonl"]


def test_an_unknown_metric_lists_those_there_are(model, tokenizer, folder):
    with pytest.raises(InvalidInput, match=r"task tiny_qa has no metric 'f1'; it has: acc, acc_norm"):
        harness.measure(task_spec(metric="f1", limit=2), folder, model, tokenizer, chat_template=False)


# Documentation


@pytest.mark.parametrize("kind", evaluate.VERSIONS)
def test_every_measure_is_documented(kind):
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    lines = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    at = next(number for number, line in enumerate(lines) if line.strip() == f"**{kind}**")
    named = []
    for line in lines[at + 1 :]:
        if line.strip().strip("*") in evaluate.VERSIONS:
            break
        named += re.findall(r"`(\w+)`", line)
    assert sorted(named) == sorted(evaluate.MEASURES.get(kind, ()))


# What is kept


def evaluation(value: float = 0.5) -> evaluate.Evaluation:
    return evaluate.Evaluation({"acc": ratio([value, 1.0], [1.0, 1.0], "higher")}, "acc", {"task": "x"}, {}, 0.1)


def test_an_evaluation_comes_back_as_it_was(tmp_path):
    kept = evaluation()
    evaluate.save(kept, tmp_path / "e/acc.json", {"model": "abc"})
    assert evaluate.load(tmp_path / "e/acc.json") == kept


@pytest.mark.parametrize(("old", "new"), [("0.75", "0.95"), ('"abc"', '"abd"'), ("{", ""), ('"acc"', '"f1"')])
def test_an_edited_evaluation_is_ignored(old, new, tmp_path):
    file = tmp_path / "acc.json"
    evaluate.save(evaluation(), file, {"model": "abc"})
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert evaluate.load(file) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_never_written(value, tmp_path):
    broken = evaluate.Evaluation({"acc": Measure(value, None, 1, "higher")}, "acc", {}, {}, 0.1)
    with pytest.raises(ValueError, match="JSON"):
        evaluate.save(broken, tmp_path / "acc.json", {})
    assert not list(tmp_path.iterdir())


def test_an_edited_evaluation_is_measured_again(tmp_path, chain):
    """The plan takes no notice of what is not sealed."""
    step = chain.steps[1]
    assert not step.missing
    measurement = step.measurements[0]
    document = json.loads(Path(measurement.file).read_text())
    document["body"]["measures"]["bits_per_byte"]["value"] = 0.1
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(document))
    moved = replace(step, measurements=(measurement.model_copy(update={"file": str(edited)}),))
    assert [one.metric for one in moved.missing] == [measurement.metric]


@pytest.mark.parametrize("kind", ["perplexity", "lm_eval"])
def test_another_version_of_a_metrics_code_measures_again_and_trains_nothing(kind, chain, monkeypatch):
    monkeypatch.setitem(evaluate.VERSIONS, kind, evaluate.VERSIONS[kind] + 1)
    again = make_plan(chain.pipeline, chain.folder, chain.store.parent)
    assert all(step.artifact is not None for step in again.steps)
    of_kind = [name for name, metric in chain.pipeline.metrics.items() if metric.kind == kind]
    for step in again.steps[:-1]:
        assert [one.metric for one in step.missing] == of_kind
