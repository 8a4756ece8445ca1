"""Answers to fixed prompts: by hand, whatever the batch, and what is counted of them."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from tiny import SPEC, write_project, write_rows

from specs.metric import GenerationSpec
from stages import evaluate
from stages.errors import InvalidInput
from stages.metrics import diversity, generation
from stages.metrics.answers import Answer, _Drawn, answers_of
from stages.model import load_plain, load_tokenizer
from stages.rows import BadRow, plain_prompt_row, prompt_row

pytestmark = pytest.mark.model

QUESTIONS = ["say cat", "say", "one red bird sing to two old dogs", "night", "and saw one"]


@pytest.fixture(scope="module")
def tokenizer(base_model):
    return load_tokenizer(base_model)


@pytest.fixture(scope="module")
def model(base_model):
    return load_plain(base_model, torch.float32).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "plain.jsonl", [{"prompt": question} for question in QUESTIONS])
    mixed = [{"prompt": QUESTIONS[0], "completion": "the cat sat."}, *({"prompt": one} for one in QUESTIONS[1:])]
    write_rows(folder / "mixed.jsonl", mixed)
    return folder


def spec(**fields) -> GenerationSpec:
    given = {"kind": "generation", "data": {"path": "plain.jsonl"}, "max_new_tokens": 12, "sequence_length": 256}
    return GenerationSpec.model_validate(given | {"batch_size": 2} | fields)


def answer_all(model, tokenizer, folder, **fields):
    chosen = spec(**fields)
    applied = chosen.chat_template is True
    return generation.measure(chosen, folder, model, tokenizer, "samples", chat_template=applied)


def greedy_by_hand(model, ids: list[int], stops: list[int], most: int) -> list[int]:
    """The likeliest token again and again, the whole sequence anew each time."""
    found: list[int] = []
    with torch.no_grad():
        while len(found) < most:
            token = int(model(input_ids=torch.tensor([ids + found]), use_cache=False).logits[0, -1].argmax())
            if token in stops:
                break
            found.append(token)
    return found


@pytest.mark.parametrize("chat", [True, False])
def test_greedy_answers_are_the_likeliest_tokens_by_hand(chat, model, tokenizer, folder):
    _, shown, samples = answer_all(model, tokenizer, folder, chat_template=chat)
    stops = generation.stop_tokens(model, tokenizer)
    for question, sample in zip(QUESTIONS, samples, strict=True):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" if chat else question
        by_hand = greedy_by_hand(model, tokenizer(text)["input_ids"], stops, 12)
        assert sample["answer"] == tokenizer.decode(by_hand, skip_special_tokens=True)
        assert sample["tokens"] == len(by_hand)
        assert sample["stopped"] == (len(by_hand) < 12)
        assert sample["prompt"] == [{"role": "user", "content": question}]
    assert (shown["prompts"], shown["references"]) == (5, 0)


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.3}, {"temperature": 0.7, "top_p": 0.8}])
def test_an_answer_depends_on_no_neighbour(drawn, model, tokenizer, folder):
    found = [answer_all(model, tokenizer, folder, batch_size=size, **drawn)[2] for size in (1, 2, 5)]
    assert found[0] == found[1] == found[2]


def test_drawn_answers_follow_the_seed_and_not_the_process(model, tokenizer, folder):
    def drawn(seed: int) -> list[str]:
        return [one["answer"] for one in answer_all(model, tokenizer, folder, temperature=1.0, seed=seed)[2]]

    torch.manual_seed(1)
    first = drawn(3)
    torch.manual_seed(2)
    assert drawn(3) == first
    assert drawn(4) != first


def test_tokens_are_drawn_as_often_as_they_are_likely():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 20_000
    scores = shares.log().repeat(draws, 1)
    chosen = _Drawn(5, range(draws))(torch.zeros(draws, 1), scores).argmax(-1)
    for token, share in enumerate(shares.tolist()):
        found = float((chosen == token).float().mean())
        assert found == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / draws))


def test_an_answer_that_never_ends_is_cut_off_and_counted(model, tokenizer, folder):
    chosen = spec(max_new_tokens=3)
    prompts = [tokenizer(question)["input_ids"] for question in QUESTIONS]
    endless = answers_of(model, prompts, [], chosen, "x")
    assert [len(one.ids) for one in endless] == [3] * 5
    assert not any(one.stopped for one in endless)
    first = endless[0].ids[0]
    ended = answers_of(model, prompts, [first], chosen, "x")[0]
    assert ended == Answer([], stopped=True)


def test_what_the_model_says_ends_an_answer(base_model, tokenizer, folder):
    model = load_plain(base_model, torch.float32).eval()
    model.generation_config.eos_token_id = [7, 9]
    assert generation.stop_tokens(model, tokenizer) == [7, 9]
    model.generation_config.eos_token_id = None
    assert generation.stop_tokens(model, tokenizer) == [tokenizer.eos_token_id]


def test_settings_of_the_model_do_not_change_how_tokens_are_chosen(base_model, model, tokenizer, folder):
    other = load_plain(base_model, torch.float32).eval()
    other.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1)
    other.config.use_cache = False
    other.generation_config.use_cache = False
    assert answer_all(other, tokenizer, folder)[2] == answer_all(model, tokenizer, folder)[2]


# What is counted


def answers(*texts: str, stopped: bool = True) -> tuple[list[Answer], list[str]]:
    return [Answer([ord(sign) for sign in text], stopped) for text in texts], list(texts)


def counted(*texts: str, stopped: bool = True):
    return generation._measures(*answers(*texts, stopped=stopped), spec().refusals)


def test_refusals_and_empty_answers_are_told_by_how_they_begin():
    found = counted("I’m sorry,  but I\ncannot.", "as an ai, no", "Cats, as an AI", " \n", "", "a cat")
    assert found["refusal_rate"].numerators == (1, 1, 0, 0, 0, 0)
    assert found["empty_rate"].numerators == (0, 0, 0, 1, 1, 0)
    assert found["refusal_rate"].value == pytest.approx(1 / 3)
    own = generation._measures(*answers("Nein, danke", "Ja"), ("nein",))
    assert own["refusal_rate"].numerators == (1, 0)


def test_an_answer_in_circles_is_one_that_repeats():
    found = counted("abcdabcdabcdabcd", "abcdefghijklmnop", "ab", "aaaaaaaa")
    assert found["repetition_rate"].numerators == (1, 0, 0, 1)
    assert found["length"].numerators == (16, 16, 2, 8)
    assert counted("a", "b", stopped=False)["truncated_rate"].value == 1


def test_distinct_n_by_hand_and_without_each_answer():
    ids = [one.ids for one in answers("abab", "abcd", "xy", "")[0]]
    for n, wanted in ((1, 6 / 10), (2, 5 / 7)):
        found = diversity.distinct(ids, n)
        assert (found.value, found.n, found.better) == (pytest.approx(wanted), 4, "higher")
        without = [diversity.distinct(ids[:at] + ids[at + 1 :], n).value for at in range(4)]
        error = math.sqrt(3 / 4 * sum((one - sum(without) / 4) ** 2 for one in without))
        assert found.standard_error == pytest.approx(error)
        assert math.fsum(found.numerators) / 4 == pytest.approx(wanted)
    assert diversity.distinct([[], []], 1) is None


def test_self_bleu_is_the_mean_over_pairs_of_answers():
    ids = [one.ids for one in answers("the cat sat", "the cat ran", "two dogs", "a bird sang")[0]]
    texts = [" ".join(map(str, one)) for one in ids]
    bleu = BLEU(tokenize="none", effective_order=True)
    scores = {(a, b): bleu.sentence_score(texts[a], [texts[b]]).score for a in range(4) for b in range(4) if a != b}
    found = diversity.self_bleu(ids)
    assert found.value == pytest.approx(sum(scores.values()) / 12)
    without = [sum(score for pair, score in scores.items() if at not in pair) / 6 for at in range(4)]
    error = math.sqrt(3 / 4 * sum((one - sum(without) / 4) ** 2 for one in without))
    assert found.standard_error == pytest.approx(error)
    assert diversity.self_bleu([ids[0]] * 5).value == pytest.approx(100)
    assert diversity.self_bleu(ids[:1]) is None
    assert diversity.self_bleu(ids[:2]).standard_error is None


def test_many_answers_are_compared_with_as_many_others_each():
    pick = random.Random(3)
    ids = [[pick.randrange(9) for _ in range(12)] for _ in range(60)]
    some = diversity.self_bleu(ids)
    every = [
        BLEU(tokenize="none", effective_order=True).sentence_score(" ".join(map(str, a)), [" ".join(map(str, b))]).score
        for a in ids[:20]
        for b in ids[20:40]
    ]
    assert some.value == pytest.approx(sum(every) / 400, rel=0.15)


def test_answers_are_held_against_the_references_that_there_are(model, tokenizer, folder):
    measures, shown, samples = answer_all(model, tokenizer, folder, data={"path": "mixed.jsonl"})
    wanted = CHRF().sentence_score(samples[0]["answer"], ["the cat sat."]).score
    assert measures["chrf"].value == pytest.approx(wanted)
    assert measures["chrf"].weights == (1, 0, 0, 0, 0)
    assert measures["exact_match"].value == 0
    assert shown["references"] == 1
    assert [one["reference"] for one in samples] == ["the cat sat.", None, None, None, None]
    assert set(measures) == set(generation.MEASURES)
    without = answer_all(model, tokenizer, folder)[0]
    assert set(generation.MEASURES) - set(without) == {"chrf", "exact_match"}
    rows = [
        {"prompt": one, "completion": f" {sample['answer']}\n"} for one, sample in zip(QUESTIONS, samples, strict=True)
    ]
    rows = [row for row in rows if row["completion"].strip()]
    assert rows
    write_rows(folder / "right.jsonl", rows)
    right = answer_all(model, tokenizer, folder, data={"path": "right.jsonl"})[0]
    assert right["exact_match"].value == 1


# Rows


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "a"}, ["user"], None),
        ({"prompt": "a", "completion": "b"}, ["user"], "b"),
        ({"messages": [{"role": "user", "content": "a"}]}, ["user"], None),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ["user"], "b"),
        ({"instruction": "a", "input": "x", "output": "b"}, ["user"], "b"),
        ({"instruction": "a", "output": ""}, ["user"], None),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["user"], None),
    ],
)
def test_rows_with_and_without_an_answer(row, prompt, reference):
    found = prompt_row(row)
    assert [one["role"] for one in found["prompt"]] == prompt
    assert found["reference"] == reference
    assert plain_prompt_row(row) == found


TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("schema", "row", "reason"),
    [
        (prompt_row, {"text": "a"}, "expected prompt, or messages, or instruction"),
        (prompt_row, {"prompt": " "}, "column 'prompt' is empty"),
        (prompt_row, {"messages": [{"role": "assistant", "content": "b"}]}, "no question stands before"),
        (prompt_row, {"prompt": [*TALK, {"role": "assistant", "content": "b"}]}, "stands in 'completion'"),
        (plain_prompt_row, {"messages": TALK}, "needs the chat template"),
    ],
)
def test_rows_that_ask_nothing_are_refused(schema, row, reason):
    with pytest.raises(BadRow, match=reason):
        schema(row)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(model, tokenizer, folder):
    wanted = r"metric samples: prompt 1 of plain\.jsonl has \d+ tokens.*raise its sequence_length \(20\)"
    with pytest.raises(InvalidInput, match=wanted):
        answer_all(model, tokenizer, folder, sequence_length=20)


def test_only_the_first_rows_are_asked(model, tokenizer, folder):
    _, shown, samples = answer_all(model, tokenizer, folder, limit=2)
    assert (shown["prompts"], len(samples)) == (2, 2)


# What is kept and what is left alone


def test_answers_are_kept_as_they_are_and_in_bounds(tmp_path):
    kept = evaluate.Evaluation({}, "distinct_2", {}, {}, 0.1, [{"answer": "<script>alert('a')</script>\u0000&amp;"}])
    evaluate.save(kept, tmp_path / "s.json", {})
    assert evaluate.load(tmp_path / "s.json").samples == kept.samples
    assert len(generation._cut("x" * 10_000)) == generation.LONGEST


@pytest.mark.parametrize("kind", ["generation", "lm_eval"])
def test_measuring_leaves_the_model_and_the_random_numbers_as_they_were(kind, base_model, tokenizer, tmp_path):
    write_project(tmp_path / "p", SPEC)
    write_rows(tmp_path / "p/plain.jsonl", [{"prompt": question} for question in QUESTIONS])
    model = load_plain(base_model, torch.float32).train()
    model.model.layers[0].eval()
    model.generation_config.eos_token_id = 5
    modes = [module.training for module in model.modules()]
    weights = {name: one.clone() for name, one in model.named_parameters()}
    settings = model.generation_config.to_dict()

    def draws() -> tuple:
        return torch.get_rng_state().tolist(), random.getstate(), json.dumps(np.random.get_state()[1].tolist())

    before = draws()
    chosen = spec(temperature=1.0)
    if kind == "lm_eval":
        chosen = evaluate.LmEvalSpec.model_validate({"kind": "lm_eval", "task": "tasks/qa.yaml", "limit": 2})
    evaluate.evaluate(chosen, "x", tmp_path / "p", model, tokenizer, chat_template=False, reference=None)
    assert draws() == before
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert all(torch.equal(one, weights[name]) for name, one in model.named_parameters())


def test_answers_are_part_of_a_run(tmp_path, run_spec):
    own = "metrics:\n  samples: {kind: generation, data: {path: data/instructions.heldout.jsonl}, max_new_tokens: 8}\n"
    plan = run_spec(write_project(tmp_path / "p", SPEC.replace("metrics:\n", own)), until="base")
    found = plan.steps[0].evaluation("samples")
    assert found.default == "chrf"
    assert len(found.samples) == found.measures["length"].n == 20
    assert all(one["reference"] for one in found.samples)
    assert plan.steps[0].measurements[0].identity["code"] == evaluate.VERSIONS["generation"]
