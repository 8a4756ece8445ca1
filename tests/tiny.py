"""A tiny random Llama with its own tokenizer and chat template, and a tiny spec around it."""

import json
import random
from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = tuple(
    "the cat sat on a mat and saw one red bird sing to two old dogs by the blue sea at night".split()  # noqa: SIM905
)


def sentences(count: int, seed: int) -> list[str]:
    """Seeded sentences over a small vocabulary with some structure to learn."""
    pick = random.Random(seed)
    return [
        " ".join(WORDS[(start + 3 * number) % len(WORDS)] for number in range(pick.randint(6, 14))) + "."
        for start in (pick.randrange(len(WORDS)) for _ in range(count))
    ]


def write_model(folder: Path, *, template: bool = True, tied: bool = False, layers: int = 2) -> Path:
    """A 2-layer Llama (hidden 32) with a byte-level BPE tokenizer, as a plain checkpoint."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences(200, 0), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=512,
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[dict]) -> None:
    """JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path) -> None:
    """Text, conversations, pairs and one multiple-choice task."""
    texts = sentences(120, 1)
    write_rows(folder / "data/corpus.jsonl", [{"text": " ".join(texts[n : n + 4])} for n in range(0, 100, 4)])
    write_rows(folder / "data/heldout.jsonl", [{"text": text} for text in texts[100:]])
    asked = [(f"say {text.split()[0]}", text) for text in sentences(80, 2)]
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in asked]
    write_rows(folder / "data/instructions.jsonl", chats[:60])
    write_rows(folder / "data/instructions.heldout.jsonl", chats[60:])
    pairs = [{"prompt": q, "chosen": a, "rejected": "night night night " + a[::-1]} for q, a in asked]
    write_rows(folder / "data/pairs.jsonl", pairs[:60])
    write_rows(folder / "data/pairs.heldout.jsonl", pairs[60:])
    choices = [{"question": q, "choices": [a, a[::-1]], "answer": 0} for q, a in asked[:20]]
    write_rows(folder / "tasks/qa.jsonl", choices)
    (folder / "tasks/qa.yaml").write_text(TASK)


TASK = """\
task: tiny_qa
dataset_path: json
dataset_kwargs: {data_files: {test: qa.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""

SPEC = """\
name: tiny
model: {path: base, dtype: float32}
seed: 3
metrics:
  domain: {kind: perplexity, data: {path: data/heldout.jsonl}, sequence_length: 128}
  answers: {kind: perplexity, data: {path: data/instructions.heldout.jsonl}, sequence_length: 128}
  qa: {kind: lm_eval, task: tasks/qa.yaml, metric: acc_norm, sequence_length: 128}
  pairs: {kind: preference, data: {path: data/pairs.heldout.jsonl}, sequence_length: 128}
stages:
  - name: knowledge
    kind: cpt
    method: {kind: spectrum, top_percent: 50}
    data: [{path: data/corpus.jsonl}]
    train: {learning_rate: 5e-3, max_steps: 12, sequence_length: 64, batch_size: 4, micro_batch_size: 2}
    gates: [{metric: domain, improves_on: base, by: 1%}]
  - name: answers
    kind: ift
    method: {kind: lora, rank: 4}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 12, sequence_length: 128, batch_size: 2}
    gates: [{metric: answers, improves_on: previous}]
  - name: manner
    kind: dpo
    method: {kind: qlora, rank: 4}
    data: [{path: data/pairs.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 10, sequence_length: 128, batch_size: 4, micro_batch_size: 4}
    gates: [{metric: pairs, at_least: 0.6}]
"""


def write_project(folder: Path, spec: str = SPEC) -> Path:
    """Model, data, tasks and spec; returns the spec's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "base")
    write_data(folder)
    path = folder / "spec.yaml"
    path.write_text(spec)
    return path
