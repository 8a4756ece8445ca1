"""Continued pre-training with TRL: the matrices that `spectrum.py` listed, in full.

Usage: python cpt.py --spec spec.yaml --model BASE --unfrozen unfrozen.yaml --output CPT
"""

import torch
import yaml
from datasets import Dataset
from settings import arguments, read_spec, stage_of, training_arguments, training_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import SFTConfig, SFTTrainer

DOCUMENT_END = "<|endoftext|>"


def main() -> None:
    paths = arguments("model", "unfrozen", "output")
    stage = stage_of(read_spec(paths.spec), "cpt")
    rows = [{"text": row["text"]} for row in training_rows(paths.spec, stage)]
    model = AutoModelForCausalLM.from_pretrained(paths.model, dtype=torch.float32)
    unfrozen = set(yaml.safe_load(paths.unfrozen.read_text(encoding="utf-8"))["unfrozen_parameters"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in unfrozen)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **training_arguments(paths.spec, stage, paths.output),
            packing=True,
            packing_strategy="bfd_split",
            # The tokenizer's own eos ends a chat turn; raw text must not teach that.
            eos_token=DOCUMENT_END,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(paths.model),
    )
    trainer.train()
    # `eos_token` above has rewritten the tokenizer and both configs in place.
    model.config.eos_token_id = AutoConfig.from_pretrained(paths.model).eos_token_id
    model.generation_config = GenerationConfig.from_pretrained(paths.model)
    model.save_pretrained(paths.output)
    AutoTokenizer.from_pretrained(paths.model).save_pretrained(paths.output)


if __name__ == "__main__":
    main()
