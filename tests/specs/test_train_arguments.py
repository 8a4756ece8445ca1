import importlib.util
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from stages.arguments import extra_problems, known_arguments, trainer_arguments
from stages.objective import ObjectiveSpec
from stages.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]

SPEC = """\
name: arguments
model: {path: base}
stages:
  - name: knowledge
    kind: cpt
    method: {kind: full}
    data: [{path: corpus.txt}]
    train: {learning_rate: 1e-4, max_steps: 12, batch_size: 8, micro_batch_size: 4}
  - name: answers
    kind: ift
    method: {kind: full}
    data: [{path: chats.jsonl}]
    train: {learning_rate: 1e-5, epochs: 3, batch_size: 6, gradient_checkpointing: true}
  - name: manner
    kind: dpo
    method: {kind: full}
    data: [{path: pairs.jsonl}]
    train: {learning_rate: 1e-6, max_steps: 12, loss: robust, label_smoothing: 0.1}
"""
KINDS = ("cpt", "ift", "dpo")

# Another value of every field; choices and truths find theirs themselves.
OTHER: dict[str, Any] = {
    "learning_rate": 0.5,
    "epochs": 2.5,
    "max_steps": 7,
    "sequence_length": 77,
    "batch_size": 32,
    "micro_batch_size": 2,
    "warmup_ratio": 0.0,
    "weight_decay": 0.25,
    "max_grad_norm": 0.5,
    "checkpoint_every": 3,
    "keep_checkpoints": 9,
    "extra": {"neftune_noise_alpha": 5},
    "document_end": "<eod>",
    "beta": 0.7,
    "label_smoothing": 0.2,
}

# Fields that no argument of the trainer carries, with the file that reads them and what they do there.
ELSEWHERE = {
    "precision": ("stages/train.py", "decides the argument bfloat16 of trainer_arguments"),
    "weights_dtype": ("stages/make.py", "the dtype in which the method loads the model"),
    "keep_checkpoints": ("stages/train.py", "how many checkpoints survive pruning"),
    "document_end": ("stages/cpt.py", "the token that the dataset puts after each document"),
}


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, ObjectiveSpec]:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return {stage.kind: stage for stage in load_pipeline(path)[0].stages}


def changed(stage: ObjectiveSpec, **settings: Any) -> ObjectiveSpec:
    """The stage with other settings; past the validators, which often allow no field to change alone."""
    return stage.model_copy(update={"train": stage.train.model_copy(update=settings)})


def arguments(stage: ObjectiveSpec, **settings: Any) -> dict[str, Any]:
    ours = {"seed": 1, "folder": Path("checkpoints"), "bfloat16": False, "cpu": True}
    return trainer_arguments(stage, **ours | settings)


def choices_of(stage: ObjectiveSpec, name: str) -> tuple[Any, ...]:
    """Every value of a field that has only a few."""
    kind = type(stage.train).model_fields[name].annotation
    if kind is bool:
        return (True, False)
    return get_args(kind) if get_origin(kind) is Literal else ()


@pytest.mark.parametrize("kind", KINDS)
def test_no_setting_is_inert(stages: dict[str, ObjectiveSpec], kind: str) -> None:
    stage = stages[kind]
    for name in type(stage.train).model_fields:
        before = getattr(stage.train, name)
        values = choices_of(stage, name) or (before, OTHER.get(name, before))
        assert any(value != before for value in values), f"say in OTHER which other value {name} may have"
        found = [arguments(changed(stage, **{name: value})) for value in values]
        if name in ELSEWHERE:
            assert all(each == found[0] for each in found), f"{name} does reach the trainer: it is not for ELSEWHERE"
        else:
            assert all(found.count(each) == 1 for each in found), f"two values of {name} mean the same"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_settings_that_act_elsewhere_are_read_there(name: str) -> None:
    file, effect = ELSEWHERE[name]
    assert re.search(rf"\btrain\.{name}\b", (ROOT / file).read_text()), f"{name}: {effect}"


def test_what_the_caller_decides_is_passed_on(stages: dict[str, ObjectiveSpec]) -> None:
    before = arguments(stages["cpt"])
    assert before["seed"] == before["data_seed"] == 1
    assert arguments(stages["cpt"], seed=2) == before | {"seed": 2, "data_seed": 2}
    assert arguments(stages["cpt"], bfloat16=True) == before | {"bf16": True}
    assert arguments(stages["cpt"], folder=Path("x")) == before | {"output_dir": "x"}
    assert arguments(stages["cpt"], cpu=False) == before | {"use_cpu": False, "dataloader_pin_memory": True}


def test_settings_in_the_trainers_terms(stages: dict[str, ObjectiveSpec]) -> None:
    everywhere = {
        "output_dir": "checkpoints",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "seed": 1,
        "data_seed": 1,
        "save_strategy": "steps",
        "save_steps": 50,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": 1024,
    }
    assert arguments(stages["cpt"]) == everywhere | {
        "learning_rate": 1e-4,
        "num_train_epochs": 1,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "packing": True,
        "packing_strategy": "bfd_split",
    }
    assert arguments(stages["ift"]) == everywhere | {
        "learning_rate": 1e-5,
        "num_train_epochs": 3,
        "max_steps": -1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 6,
        "activation_checkpointing": True,
        "packing": True,
        "packing_strategy": "bfd",
    }
    assert arguments(stages["dpo"]) == everywhere | {
        "learning_rate": 1e-6,
        "num_train_epochs": 1,
        "max_steps": 12,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "beta": 0.1,
        "loss_type": ["robust"],
        "label_smoothing": 0.1,
        "precompute_ref_log_probs": True,
    }


@pytest.mark.parametrize(
    ("kind", "packing", "expected"),
    [
        ("cpt", "split", (True, "bfd_split")),
        ("cpt", "wrapped", (True, "wrapped")),
        ("cpt", "none", (False, "bfd")),
        ("ift", True, (True, "bfd")),
        ("ift", False, (False, "bfd")),
    ],
)
def test_packing(stages: dict[str, ObjectiveSpec], kind: str, packing: object, expected: tuple[bool, str]) -> None:
    found = arguments(changed(stages[kind], packing=packing))
    assert (found["packing"], found["packing_strategy"]) == expected


def source(package: str, file: str) -> str:
    """The text of a file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / file).read_text()


def values_of(text: str, enumeration: str) -> set[str]:
    body = re.split(r"\n(?=\S)", text[text.index(f"class {enumeration}(") :], maxsplit=1)[0]
    return set(re.findall(r'^    [A-Z0-9_]+ = "(\w+)"', body, re.MULTILINE))


def test_the_library_knows_the_names_that_we_give_to_it(stages: dict[str, ObjectiveSpec]) -> None:
    def given(kind: str, name: str, argument: str) -> set[str]:
        stage = stages[kind]
        return {arguments(changed(stage, **{name: choice}))[argument] for choice in choices_of(stage, name)}

    assert given("cpt", "optimizer", "optim") <= values_of(source("transformers", "training_args.py"), "OptimizerNames")
    schedules = values_of(source("transformers", "trainer_utils.py"), "SchedulerType")
    assert given("cpt", "schedule", "lr_scheduler_type") <= schedules
    strategies = set(re.findall(r'if strategy == "(\w+)"', source("trl", "data_utils.py")))
    assert given("cpt", "packing", "packing_strategy") <= strategies
    assert arguments(stages["ift"])["packing_strategy"] in strategies


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_is_one_of_the_trainers(stages: dict[str, ObjectiveSpec], kind: str) -> None:
    assert set(arguments(stages[kind])) <= known_arguments(*stages[kind].trainer_config)


def test_known_arguments_are_the_classes_own_and_the_inherited_ones() -> None:
    base = known_arguments("transformers.training_args", "TrainingArguments")
    assert {"learning_rate", "neftune_noise_alpha", "lr_scheduler_kwargs", "label_smoothing_factor"} <= base
    sft = known_arguments("trl.trainer.sft_config", "SFTConfig")
    dpo = known_arguments("trl.trainer.dpo_config", "DPOConfig")
    assert base < sft
    assert base < dpo
    assert {"packing", "max_length", "padding_free"} <= sft - base
    assert {"beta", "loss_type", "label_smoothing", "precompute_ref_log_probs"} <= dpo - base
    assert "packing" not in dpo
    assert "beta" not in sft


def test_known_arguments_are_neither_methods_nor_private_nor_constants() -> None:
    for name in ("SFTConfig", "DPOConfig"):
        known = known_arguments(f"trl.trainer.{name[:3].lower()}_config", name)
        assert not {each for each in known if each.startswith("_") or not each.islower()}
        assert not known & {"to_dict", "device", "train_batch_size", "default_optim", "framework"}


@pytest.mark.parametrize("module", ["no_such_package_at_all.x", "trl.trainer.sft_config"])
def test_of_a_class_that_is_not_there_nothing_is_known(module: str) -> None:
    assert known_arguments(module, "NoSuchConfig") == frozenset()


def test_extra_arguments_of_the_trainer_are_taken_as_they_are(stages: dict[str, ObjectiveSpec]) -> None:
    extra = {"neftune_noise_alpha": 5, "adam_beta2": 0.95, "lr_scheduler_kwargs": {"num_cycles": 1}}
    for stage in stages.values():
        assert extra_problems(stage) == []
        more = changed(stage, extra=extra)
        assert extra_problems(more) == []
        assert arguments(more) == arguments(stage) | extra


@pytest.mark.parametrize("kind", KINDS)
def test_no_extra_argument_overrides_one_of_ours(stages: dict[str, ObjectiveSpec], kind: str) -> None:
    ours = arguments(stages[kind])
    found = extra_problems(changed(stages[kind], extra=dict.fromkeys(ours, 0)))
    assert found == [(key, f"{key!r} is decided by the fields of train; remove it here") for key in ours]


def test_an_unknown_extra_argument_is_refused_with_its_neighbours(stages: dict[str, ObjectiveSpec]) -> None:
    assert extra_problems(changed(stages["ift"], extra={"adam_beta": 0.9, "qqqqqq": 1})) == [
        ("adam_beta", "the trainer (SFTConfig) has no argument 'adam_beta'; nearest: adam_beta2, adam_beta1"),
        ("qqqqqq", "the trainer (SFTConfig) has no argument 'qqqqqq'"),
    ]
    (problem,) = extra_problems(changed(stages["dpo"], extra={"packing": True}))
    assert problem[0] == "packing"
    assert problem[1].startswith("the trainer (DPOConfig) has no argument 'packing'")


@pytest.mark.parametrize(
    "key",
    [
        *("gradient_checkpointing", "save_total_limit", "save_only_model", "fp16", "chat_template_path", "hub_token"),
        *("push_to_hub", "hub_model_id", "enable_jit_checkpoint", "resume_from_checkpoint", "trust_remote_code"),
    ],
)
def test_an_argument_that_would_be_ignored_or_break_a_promise_is_refused(stages: dict[str, Any], key: str) -> None:
    stage = stages["dpo"]
    extra = stage.model_copy(update={"train": stage.train.model_copy(update={"extra": {key: True}})})
    [(found, message)] = extra_problems(extra)
    assert found == key
    assert message.startswith(f"{key!r} is not taken: ")


@pytest.mark.parametrize("key", ["deepspeed", "fsdp_config", "accelerator_config", "liger_kernel_config"])
def test_settings_are_written_out_and_not_read_from_a_file(stages: dict[str, ObjectiveSpec], key: str) -> None:
    assert extra_problems(changed(stages["ift"], extra={key: {"a": 1}})) == []
    assert extra_problems(changed(stages["ift"], extra={key: "../settings.json"})) == [
        (
            key,
            f"{key!r} names a file: a file's content would be no part of the stage's identity; write the settings out "
            "as a mapping",
        )
    ]


def test_the_reference_of_dpo_is_ours_to_decide(stages: dict[str, Any]) -> None:
    stage = stages["dpo"]
    train = stage.train.model_copy(update={"extra": {"precompute_ref_log_probs": True}})
    [(_, message)] = extra_problems(stage.model_copy(update={"train": train}))
    assert message == "'precompute_ref_log_probs' is decided by the fields of train; remove it here"
