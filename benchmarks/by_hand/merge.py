"""Fold an adapter into its base, in float32: after SFT into the base as it is, after DPO into the 4-bit one.

    python merge.py --spec spec.yaml --stage ift --model CPT --adapter SFT --output SFT-MERGED
    python merge.py --spec spec.yaml --stage dpo --model SFT-MERGED --adapter DPO --output DPO-MERGED --release OUT

A QLoRA adapter was trained over quantised weights, so it is merged into those, dequantised: merging into the
4-bit layers would round the update away, and the original weights are another model.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from settings import read_spec, stage_of
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("spec", "model", "adapter", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--stage", choices=("ift", "dpo"), required=True)
    parser.add_argument("--release", type=Path, help="also write a copy in the dtype that the spec releases")
    paths = parser.parse_args()
    spec = read_spec(paths.spec)
    method = stage_of(spec, paths.stage)["method"]
    if method["kind"] == "qlora":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method.get("quantization", "nf4"),
            bnb_4bit_use_double_quant=method.get("double_quantization", True),
            bnb_4bit_compute_dtype=torch.float32,
        )
        base = AutoModelForCausalLM.from_pretrained(
            paths.model, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
        )
        base = base.dequantize().float()
    else:
        base = AutoModelForCausalLM.from_pretrained(paths.model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, paths.adapter).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(paths.model)
    merged.save_pretrained(paths.output)
    tokenizer.save_pretrained(paths.output)
    if paths.release is not None:
        merged.to(getattr(torch, spec["model"].get("dtype", "bfloat16"))).save_pretrained(paths.release)
        tokenizer.save_pretrained(paths.release)


if __name__ == "__main__":
    main()
