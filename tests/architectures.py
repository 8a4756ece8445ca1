"""Tiny random models of the architectures that methods must serve: 3 layers, one shared vocabulary of 320."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 320
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def _without(*names: str, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in _SHAPE.items() if name not in names} | more


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as hf

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return {
        "llama": lambda: hf.LlamaConfig(**_SHAPE),
        "qwen3": lambda: hf.Qwen3Config(**_SHAPE, head_dim=8, tie_word_embeddings=True),
        "gemma3": lambda: hf.Gemma3TextConfig(**_SHAPE | {"vocab_size": 1024}, head_dim=8, sliding_window=16),
        "mistral": lambda: hf.MistralConfig(**_SHAPE, sliding_window=None),
        "phi3": lambda: hf.Phi3Config(**_SHAPE),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
        ),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**_without("num_key_value_heads")),
        "mixtral": lambda: hf.MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
        "qwen2_moe": lambda: hf.Qwen2MoeConfig(**_SHAPE, **experts, shared_expert_intermediate_size=32),
    }


NAMES = ("llama", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen2_moe")
MIXTURES = ("mixtral", "qwen2_moe")


def write_architecture(name: str, folder: Path) -> Path:
    """A random model of the architecture as a plain float32 checkpoint without a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(_configs()[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)  # as drawn, attention is uniform and logits are near zero
            elif float(parameter.abs().max()) == 0:
                parameter.normal_(std=0.1)  # biases
    model.save_pretrained(folder)
    return folder
