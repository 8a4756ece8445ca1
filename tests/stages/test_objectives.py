"""What each objective really trains on: masks, packing, and DPO's reference."""

import json
import math
from collections import Counter
from typing import get_args

import pytest
import torch
from tiny import sentences
from transformers import TrainerCallback, set_seed

from specs.train import SMOOTHED_LOSSES, DpoLoss
from stages.arguments import trainer_arguments
from stages.conversation import turn_terminator
from stages.cpt import Cpt
from stages.data import Count
from stages.dpo import Dpo
from stages.errors import InvalidInput, StageFailed
from stages.finite import IGNORED
from stages.ift import Ift
from stages.methods.base import Start
from stages.methods.full import Full
from stages.model import load_plain, load_tokenizer
from stages.train import fit

pytestmark = pytest.mark.model

OBJECTIVES = {"cpt": Cpt, "ift": Ift, "dpo": Dpo}
METHODS = {
    "full": {"kind": "full"},
    "spectrum": {"kind": "spectrum", "top_percent": 50},
    "lora": {"kind": "lora", "rank": 4},
    "qlora": {"kind": "qlora", "rank": 4},
}


def stage_of(kind: str, method: str = "full", **train):
    settings = {"learning_rate": 1e-2, "max_steps": 3, "sequence_length": 128, "batch_size": 4, "micro_batch_size": 4}
    document = {
        "name": "it",
        "kind": kind,
        "method": METHODS[method],
        "data": [{"path": "rows.jsonl"}],
        "train": settings | {"precision": "float32", "warmup_ratio": 0.0} | train,
    }
    return OBJECTIVES[kind].model_validate_json(json.dumps(document))


@pytest.fixture(scope="module")
def tokenizer(base_model):
    return load_tokenizer(base_model)


def trainer_of(stage, model, tokenizer, rows, folder):
    arguments = trainer_arguments(stage, seed=1, folder=folder, bfloat16=False, cpu=True)
    dataset, _ = stage.dataset(rows, tokenizer)
    return stage.trainer(model, tokenizer, dataset, arguments, [])


def trained_texts(tokenizer, ids, labels) -> list[str]:
    """The trained tokens as text, one string per unbroken run."""
    runs: list[list[int]] = [[]]
    for token, target in zip(ids, labels, strict=True):
        if target == IGNORED:
            runs.append([])
        else:
            assert target == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def ask(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


# Continued pre-training


def test_documents_end_with_the_end_of_text_and_never_with_the_end_of_a_turn(tokenizer, base_model, tmp_path):
    end, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert tokenizer.eos_token_id == turn  # the trap: the library appends eos
    stage = stage_of("cpt")
    texts = [*sentences(9, 4), "it ends already.<|endoftext|>"]
    dataset, report = stage.dataset([{"text": text} for text in texts], tokenizer)
    for text, ids, labels in zip(texts, dataset["input_ids"], dataset["labels"], strict=True):
        assert tokenizer.decode(ids) == text.removesuffix("<|endoftext|>") + "<|endoftext|>"
        assert labels == ids
    assert report.terminator_trained is True
    trainer = trainer_of(
        stage, load_plain(base_model, torch.float32), tokenizer, [{"text": t} for t in texts], tmp_path
    )
    seen = Counter(token for row in trainer.train_dataset for token in row["input_ids"])
    assert (seen[end], seen[turn]) == (10, 0)
    assert tokenizer.eos_token_id == turn


def test_the_end_of_a_document_can_be_chosen(tokenizer):
    dataset, _ = stage_of("cpt", document_end="<|im_start|>").dataset([{"text": "a cat"}], tokenizer)
    assert tokenizer.decode(dataset["input_ids"][0]) == "a cat<|im_start|>"
    with pytest.raises(InvalidInput, match="'<end>' is not a token of this model"):
        stage_of("cpt", document_end="<end>").dataset([{"text": "a cat"}], tokenizer)


DOCUMENTS = [{"text": " ".join(sentences(n, n))} for n in (1, 2, 1, 3, 12, 1, 2, 2)]
"""Short ones, and one longer than a sequence."""


@pytest.mark.parametrize("packing", ["split", "wrapped"])
def test_packing_keeps_every_token(packing, tokenizer, base_model, tmp_path):
    stage = stage_of("cpt", packing=packing, sequence_length=48)
    dataset, report = stage.dataset(DOCUMENTS, tokenizer)
    assert max(map(len, dataset["input_ids"])) > 48
    trainer = trainer_of(stage, load_plain(base_model, torch.float32), tokenizer, DOCUMENTS, tmp_path)
    packed = trainer.train_dataset["input_ids"]
    assert len(packed) < len(dataset)
    assert max(map(len, packed)) <= 48
    assert Counter(t for ids in packed for t in ids) == Counter(t for ids in dataset["input_ids"] for t in ids)
    assert report.tokens == report.trained_tokens == sum(map(len, packed))
    assert (report.truncated_rows, report.dropped_rows) == (0, 0)


def test_without_packing_the_ends_of_long_documents_are_lost_and_counted(tokenizer, base_model, tmp_path):
    stage = stage_of("cpt", packing="none", sequence_length=48)
    _, report = stage.dataset(DOCUMENTS, tokenizer)
    trainer = trainer_of(stage, load_plain(base_model, torch.float32), tokenizer, DOCUMENTS, tmp_path)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert len(lengths) == report.rows == len(DOCUMENTS)
    assert report.trained_tokens == sum(lengths) < report.tokens
    assert report.truncated_rows == lengths.count(48) > 0


class Captured:
    """The final hidden states of a trainer's own forward passes."""

    def __init__(self, trainer) -> None:
        self.trainer, self.states = trainer, []
        trainer.model.get_decoder().register_forward_hook(lambda _m, _i, out: self.states.append(out[0].detach()))

    def logits(self, batch) -> torch.Tensor:
        self.trainer.model.eval()
        self.states.clear()
        with torch.no_grad():
            self.trainer.compute_loss(self.trainer.model, dict(batch))
            return self.trainer.model.lm_head(self.states[0])[0]


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def chats(count: int) -> list[dict]:
    return [{"messages": ask(f"say {number}", text)} for number, text in enumerate(sentences(count, 6))]


@pytest.mark.parametrize(("kind", "rows"), [("cpt", DOCUMENTS), ("ift", chats(8))])
def test_packed_rows_do_not_see_one_another(kind, rows, tokenizer, base_model, tmp_path):
    stage = stage_of(kind, sequence_length=96)
    model = load_plain(base_model, torch.float32)
    trainer = trainer_of(stage, model, tokenizer, rows, tmp_path)
    capture, batch = Captured(trainer), first_batch(trainer)
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    assert len(starts) >= 4
    assert len(starts) > len(trainer.train_dataset) or len(trainer.train_dataset) > 4
    before = capture.logits(batch)
    for start, end in zip(starts, ends, strict=True):
        other = batch | {"input_ids": batch["input_ids"].clone()}
        other["input_ids"][0, start:end] = (other["input_ids"][0, start:end] + 17) % 300
        change = (capture.logits(other) - before).abs().amax(dim=1)
        assert float(change[start:end].min()) > 1e-2
        change[start:end] = 0
        assert float(change.max()) <= 1e-5
        with torch.no_grad():  # and each is scored as if it were alone
            alone = model(input_ids=batch["input_ids"][:, start:end], use_cache=False).logits[0]
        assert torch.allclose(before[start:end], alone, atol=1e-4)
    if kind == "cpt":  # all is learned but what nothing precedes
        expected = batch["input_ids"].clone()
        expected[0, starts] = IGNORED
        assert torch.equal(batch["labels"], expected)


def test_wrapped_documents_do_see_their_neighbours(tokenizer, base_model, tmp_path):
    stage = stage_of("cpt", packing="wrapped", sequence_length=96)
    trainer = trainer_of(stage, load_plain(base_model, torch.float32), tokenizer, DOCUMENTS, tmp_path)
    capture, batch = Captured(trainer), first_batch(trainer)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    row = next(row for row, ids in enumerate(batch["input_ids"].tolist()) if end in ids[:80])
    batch = {key: value[row : row + 1] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    boundary = batch["input_ids"][0].tolist().index(end) + 1
    before = capture.logits(batch)
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :boundary] = (other["input_ids"][0, :boundary] + 17) % 300
    assert float((capture.logits(other) - before).abs()[boundary:].max()) > 1e-2


# Instruction fine-tuning

LONG = ask("the blue sea?", "one red bird.", "and?", "two old dogs\nat night.")


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"messages": ask("say cat", "the cat sat.")}, ["the cat sat."]),
        ({"messages": LONG}, ["one red bird.", "two old dogs\nat night."]),
        ({"messages": [{"role": "system", "content": "be kind"}, *LONG]}, ["one red bird.", "two old dogs\nat night."]),
        ({"prompt": "say cat", "completion": " the cat."}, [" the cat."]),
        ({"prompt": LONG, "completion": ask("", "yes.")[1:]}, ["one red bird.", "two old dogs\nat night.", "yes."]),
        ({"instruction": "translate", "input": "gatto", "output": "cat"}, ["cat"]),
        ({"instruction": "say user", "output": "<|im_start|>user\nno<|im_end|>"}, None),
    ],
)
def test_only_what_the_assistant_says_is_trained_and_the_token_that_ends_it(row, answers, tokenizer):
    stage = stage_of("ift")
    normal = stage.normalise(row)
    dataset, report = stage.dataset([normal], tokenizer)
    ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(normal["messages"], tokenize=False)
    found = trained_texts(tokenizer, ids, labels)
    if answers is None:  # control tokens inside content: whatever is trained, the user's part is not
        assert not any("say user" in text for text in found)
        return
    assert found == [f"{answer}<|im_end|>" for answer in answers]
    assert report.terminator_trained is True
    assert report.trained_tokens == sum(label != IGNORED for label in labels)


def test_the_trainer_keeps_the_masks(tokenizer, base_model, tmp_path):
    rows = chats(8)
    for packing in (True, False):
        stage = stage_of("ift", packing=packing, micro_batch_size=1, batch_size=1)
        dataset, report = stage.dataset(rows, tokenizer)
        trainer = trainer_of(stage, load_plain(base_model, torch.float32), tokenizer, rows, tmp_path)
        trained: Counter = Counter()
        for batch in trainer.get_train_dataloader():
            trained.update(batch["labels"][batch["labels"] != IGNORED].tolist())
        assert trained == Counter(t for labels in dataset["labels"] for t in labels if t != IGNORED)
        assert trained.total() == report.trained_tokens
        assert trained[turn_terminator(tokenizer)] == 8


def test_rows_cut_or_left_without_an_answer_are_counted(tokenizer):
    answer = " ".join(sentences(3, 1))
    rows = [
        {"messages": ask("say it", "cat.")},
        {"messages": ask("say it", answer)},
        {"messages": ask(answer, "cat.")},
    ]
    dataset, report = stage_of("ift", sequence_length=32).dataset(rows, tokenizer)
    assert (report.rows, report.truncated_rows, report.dropped_rows) == (3, 2, 1)
    assert [len(ids) for ids in dataset["input_ids"]][1:] == [32]
    assert report.terminator_trained is False
    assert report.tokens == sum(map(len, dataset["input_ids"]))
    pairs = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": ask("", "no.")[1:]} for row in rows
    ]
    dataset, report = stage_of("dpo", sequence_length=32).dataset(pairs, tokenizer)
    assert (report.rows, report.truncated_rows, report.dropped_rows, len(dataset)) == (3, 2, 1, 2)
    assert report.terminator_trained is False


@pytest.mark.parametrize("kind", ["ift", "dpo"])
def test_nothing_to_train_on_is_refused(kind, tokenizer):
    rows = [
        {
            "messages": ask("say it again", "cat"),
            "prompt": ask("a"),
            "chosen": ask("", "b")[1:],
            "rejected": ask("", "c")[1:],
        }
    ]
    _, report = stage_of(kind, sequence_length=3).dataset(rows, tokenizer)
    with pytest.raises(InvalidInput, match=r"stage it: no token would be trained: .*sequence_length"):
        report.checked("it", [Count("a.jsonl", 3)])


# Preferences


PAIRS = [
    {
        "prompt": ask(f"say {n}"),
        "chosen": ask("", text)[1:],
        "rejected": ask("", "night " * (1 + n % 3) + text[::-1])[1:],
    }
    for n, text in enumerate(sentences(16, 8))
]


def log_probabilities(model, batch) -> torch.Tensor:
    """Summed log-probabilities of the answers, by hand: the chosen ones', then the rejected ones'."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    model.train(training)
    scores = logits[:, :-1].double().log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (scores * batch["completion_mask"][:, 1:]).sum(1)


class Spy(TrainerCallback):
    """Looks at a trainer before its first step and after its last."""

    def __init__(self) -> None:
        self.trainer, self.before, self.after = None, None, None

    def look(self) -> dict[str, torch.Tensor]:
        trainer = self.trainer
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(8)])
        if "ref_chosen_logps" in batch:
            reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        else:
            reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
        training = trainer.model.training
        trainer.model.eval()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, dict(batch))
        trainer.model.train(training)
        return {
            "batch": batch,
            "reference": reference.double(),
            "policy": log_probabilities(trainer.model, batch),
            "loss": loss,
        }

    def on_train_begin(self, args, state, control, **_):
        self.before = self.look()

    def on_train_end(self, args, state, control, **_):
        self.after = self.look()


@pytest.fixture
def run_dpo(base_model, tokenizer, tmp_path, monkeypatch):
    """A function that trains DPO as a stage does; `harm` may change the trainer before it starts."""

    def run(stage, harm=None, spy=None):
        make = Dpo.trainer

        def trainer(self, model, tokenizer, dataset, arguments, callbacks):
            found = make(self, model, tokenizer, dataset, arguments, [*callbacks, *([spy] if spy else [])])
            if spy is not None:
                spy.trainer = found
            if harm is not None:
                harm(found)
            return found

        set_seed(1)
        prepared = stage.method.prepare(stage.method.load(base_model, torch.float32, torch.float32), Start(base_model))
        dataset, _ = stage.dataset(PAIRS, tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(Dpo, "trainer", trainer)
            record = fit(stage, prepared, tokenizer, dataset, seed=1, folder=tmp_path, preemption=None)
        return prepared, record

    return run


@pytest.mark.parametrize("method", METHODS)
def test_policy_and_reference_are_the_start_before_training_and_the_reference_after(method, base_model, run_dpo):
    stage, spy = stage_of("dpo", method), Spy()
    _, record = run_dpo(stage, spy=spy)
    start = stage.method.load(base_model, torch.float32, torch.float32)  # quantised where the method quantises
    expected = log_probabilities(start, spy.before["batch"])
    assert torch.allclose(spy.before["policy"], expected, atol=1e-3)
    assert torch.allclose(spy.before["reference"], expected, atol=1e-3)
    assert torch.allclose(spy.after["reference"], expected, atol=1e-3)
    assert float((spy.after["policy"] - expected).abs().max()) > 1  # or the line above would prove nothing
    assert record["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert float(spy.before["loss"]) == pytest.approx(math.log(2), abs=1e-4)
    rewards = stage.train.beta * (spy.after["policy"] - expected)
    by_hand = -torch.nn.functional.logsigmoid(rewards[:8] - rewards[8:]).mean()
    assert float(spy.after["loss"]) == pytest.approx(float(by_hand), abs=1e-4)


def test_the_answers_and_their_ends_are_what_is_compared(tokenizer, base_model, tmp_path):
    trainer = trainer_of(stage_of("dpo"), load_plain(base_model, torch.float32), tokenizer, PAIRS, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(16)])
    for number, pair in enumerate(PAIRS):
        for row, side in ((number, "chosen"), (16 + number, "rejected")):
            ids = batch["input_ids"][row][batch["completion_mask"][row] == 1]
            assert tokenizer.decode(ids).rstrip("\n") == f"{pair[side][0]['content']}<|im_end|>"


def shift_reference(trainer) -> None:
    """A reference that is another model than the start."""
    if "ref_chosen_logps" in trainer.train_dataset.column_names:
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {"ref_chosen_logps": row["ref_chosen_logps"] + 5})
        return
    score = trainer.compute_ref_log_probs
    trainer.compute_ref_log_probs = lambda *inputs: tuple(side + 5 for side in score(*inputs))


def shift_both(trainer) -> None:
    """Policy and reference are moved alike, as a second initialisation does it: the loss is ln 2 all the same."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_reference_that_is_not_the_start_is_refused(method, loss, run_dpo):
    with pytest.raises(StageFailed, match="reference"):
        run_dpo(stage_of("dpo", method, loss=loss), harm=shift_reference)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_policy_that_the_trainer_moved_is_refused_though_the_loss_looks_right(method, run_dpo):
    with pytest.raises(StageFailed):
        run_dpo(stage_of("dpo", method), harm=shift_both)


@pytest.mark.parametrize("loss", get_args(DpoLoss))
def test_every_loss_trains(loss, run_dpo):
    smoothing = {"label_smoothing": 1e-2} if loss in SMOOTHED_LOSSES else {}
    prepared, record = run_dpo(stage_of("dpo", "lora", loss=loss, max_steps=1, **smoothing))
    assert record["steps"] == 1
    assert math.isfinite(record["curve"][0]["loss"])
    assert record["curve"][0]["grad_norm"] > 0
    moved = [p for n, p in prepared.model.named_parameters() if "lora_B.default" in n]
    assert all(bool((parameter != 0).any()) for parameter in moved)


def test_attention_that_lets_packed_documents_meet_is_refused(base_model, monkeypatch):
    """A backend that ignores restarting positions would train documents on one another, with a lower loss."""
    from stages import probe, train
    from stages.errors import StageFailed
    from stages.model import load_plain

    model = load_plain(base_model, torch.float32)
    assert probe.packing_leak(model) == 0
    original = type(model).forward

    def leaky(self, *args, position_ids=None, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", leaky)
    assert probe.packing_leak(model) > 1e-3
    with pytest.raises(StageFailed, match="packed documents see one another"):
        train._check_packing(_Named, {"packing": True, "packing_strategy": "bfd"}, model, mixed=False)
    assert train._check_packing(_Named, {"packing": False}, model, mixed=False) is None


class _Named:
    name = "only"
    method = Full(kind="full")
