"""DPO with TRL on a 4-bit base (QLoRA); the reference is the base with its adapter switched off.

Usage: python dpo.py --spec spec.yaml --model SFT-MERGED --output DPO
"""

import bitsandbytes as bnb
import torch
from datasets import Dataset
from peft import LoraConfig
from settings import arguments, messages, read_spec, stage_of, training_arguments, training_rows
from transformers import BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer


def main() -> None:
    paths = arguments("model", "output")
    stage = stage_of(read_spec(paths.spec), "dpo")
    method, train = stage["method"], stage["train"]
    rows = [
        {
            "prompt": messages(row["prompt"], "user"),
            "chosen": messages(row["chosen"], "assistant"),
            "rejected": messages(row["rejected"], "assistant"),
        }
        for row in training_rows(paths.spec, stage)
    ]
    rank = method.get("rank", 16)
    trainer = DPOTrainer(
        model=str(paths.model),
        args=DPOConfig(
            **training_arguments(paths.spec, stage, paths.output),
            beta=train.get("beta", 0.1),
            loss_type=[train.get("loss", "sigmoid")],
        ),
        train_dataset=Dataset.from_list(rows),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method.get("quantization", "nf4"),
            bnb_4bit_use_double_quant=method.get("double_quantization", True),
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        peft_config=LoraConfig(
            r=rank,
            lora_alpha=method.get("alpha", 2 * rank),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    for module in trainer.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # bitsandbytes 0.50.2 otherwise repacks the weights on any eval-mode forward pass on a CPU with
            # AVX512-BF16, and reads them wrongly from then on, without an error.
            module.support_avx512bf16_for_cpu = False
    trainer.train()
    trainer.save_model(str(paths.output))


if __name__ == "__main__":
    main()
