"""Methods over a quantised base, and what their tests have in common."""

from pathlib import Path

import torch
from methods_table import method_of
from transformers import set_seed

from stages.merge import hand_over
from stages.methods.base import MethodSpec, Prepared, Start
from stages.model import load_tokenizer

QLORAS = [
    method_of("qlora"),
    method_of("qlora", double_quantization=False),
    method_of("qlora", quantization="fp4"),
    method_of("qlora", quantization="fp4", double_quantization=False),
    method_of("qlora", quantization="int8"),
]
STARTED = [method_of("loftq"), method_of("lq_lora", quantization="fp4")]
"""Methods whose adapters start where they undo a part of the quantisation error."""
METHODS = [QLORAS[0], *QLORAS[3:], *STARTED, method_of("qa_lora")]
IDS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(7))


def rows(count: int = 4, learned: bool = True):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        ids = torch.randint(0, 300, (1, 24), generator=generator)
        yield ids, ids.clone() if learned else torch.full_like(ids, -100)


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def prepared(method: MethodSpec, start: Path, compute: torch.dtype = torch.float32) -> Prepared:
    set_seed(1)
    return method.prepare(method.load(start, torch.float32, compute), Start(start, rows=rows))


def train(model, rate: float, steps: int = 4, *, autocast: bool = False) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for ids, labels in rows(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def handed_over(method: MethodSpec, model, start: Path, folder: Path):
    return hand_over(method, model, load_tokenizer(start), Start(start, rows=rows), folder)


def write_wide(folder: Path, tokenizer) -> Path:
    """A model whose sides divide by bitsandbytes' block size, as those of real models do."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
