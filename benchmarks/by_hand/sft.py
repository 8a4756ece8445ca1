"""Instruction fine-tuning with TRL and a LoRA adapter; only the assistant's words are learned.

    python sft.py --spec spec.yaml --model CPT --output SFT

Rows become prompt and completion: `assistant_only_loss` needs a chat template with generation markers,
which neither of the race's models has and TRL does not know how to patch.
"""

from datasets import Dataset
from peft import LoraConfig
from settings import arguments, messages, read_spec, stage_of, training_arguments, training_rows
from trl import SFTConfig, SFTTrainer


def prompt_and_completion(row: dict) -> dict:
    if "messages" in row:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    return {"prompt": messages(row["prompt"], "user"), "completion": messages(row["completion"], "assistant")}


def main() -> None:
    paths = arguments("model", "output")
    stage = stage_of(read_spec(paths.spec), "ift")
    rows = [prompt_and_completion(row) for row in training_rows(paths.spec, stage)]
    rank = stage["method"].get("rank", 16)
    trainer = SFTTrainer(
        model=str(paths.model),  # TRL loads a name in float32
        args=SFTConfig(
            **training_arguments(paths.spec, stage, paths.output),
            packing=stage["train"].get("packing", True),
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            r=rank,
            lora_alpha=stage["method"].get("alpha", 2 * rank),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    trainer.save_model(str(paths.output))


if __name__ == "__main__":
    main()
