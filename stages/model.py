"""Checkpoints in and out: load a plain one, convert a GGUF, write one that any tool reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stages.depth import check_depth
from stages.errors import InvalidInput
from stages.formats import gguf_problem, tokenizer_problem
from stages.pickles import refuse_pickled_weights
from stages.remote_code import copy_code, trusted
from stages.template import bind_renderings

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GGUF_PRE_TOKENIZERS = ("default", "gpt-2", "smollm")
"""Values of `tokenizer.ggml.pre` whose rule we restore; the import of transformers drops it."""


def training_device() -> str:
    """Where stages train and evaluate: the first GPU, or the CPU. Merges and checks are always on the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_plain(folder: Path, dtype: "torch.dtype", device: str = "cpu", **settings: Any) -> "PreTrainedModel":
    """A causal language model from safetensors; code that comes with it runs only where the spec names its hash.

    Raises:
        InvalidInput: the folder holds no such model; the library's own reason is in the message.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    refuse_pickled_weights(folder)
    trust = trusted(folder)
    check_depth(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=trust,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise InvalidInput(
            f"{folder}: cannot be loaded as a causal language model: {_why(error)}; if the model is one, its "
            "config.json and its weights do not belong together, or a file is damaged: fetch it again"
        ) from error
    if info["missing_keys"]:  # the library would draw them at random and go on
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise InvalidInput(
            f"{folder}: {len(info['missing_keys'])} weights are missing from its files: {names}; fetch it again, "
            "or name a causal language model"
        )
    _keep_embedding_scale(model)
    return cast("PreTrainedModel", model)


def _no_tokenizer(folder: Path, error: Exception) -> str:
    """Why, and what to do: what the libraries say of a missing or broken file seldom names it."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        files = "the files of one (tokenizer.json, tokenizer_config.json)"
        return f"it has no tokenizer.json, and {_why(error)}; put {files} beside the weights"
    return tokenizer_problem(folder) or f"{_why(error)}; fetch tokenizer.json and tokenizer_config.json again"


def _why(error: Exception) -> str:
    """What a library says, on one line: its first sentences, where it goes on to say how to change the library."""
    if "ignore_mismatched_sizes" in str(error):  # it speaks of a table that it printed
        return "the shapes of its weights are others than its config.json says"
    said = " ".join(str(error).partition("\n\n")[0].split())
    if isinstance(error, KeyError):
        return f"{said} is missing in it"
    return said if len(said) <= 400 else f"{said[:399]}…"


def _keep_embedding_scale(model: Any) -> None:
    """Hold Gemma's factor on its embeddings in float32: loaded in bfloat16 it is rounded, and stays so when widened."""
    import torch

    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=module.embed_scale.device)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint.

    Raises:
        InvalidInput: there is none, or it is not a fast one (masks need character offsets).
    """
    from transformers import AutoTokenizer

    trust = trusted(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    except Exception as error:  # the libraries raise what they like, a bare Exception among it
        raise InvalidInput(f"{folder}: no tokenizer can be loaded: {_no_tokenizer(folder, error)}") from error
    if not tokenizer.is_fast:
        raise InvalidInput(f"{folder}: the tokenizer is a slow one; convert it to tokenizer.json first")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    bind_renderings()
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_config(folder: Path) -> "PretrainedConfig":
    """The config of a checkpoint, under the rule of `load_plain` for code that comes with it.

    Raises:
        InvalidInput: the model needs code that the spec does not allow.
    """
    from transformers import AutoConfig

    trust = trusted(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    return cast("PretrainedConfig", config)


def without_weights(config: "PretrainedConfig", **settings: Any) -> "PreTrainedModel":
    """The model that a config of `load_config` describes, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    trust = trusted(Path(config.name_or_path))
    check_depth(Path(config.name_or_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **settings)
    return cast("PreTrainedModel", model)


def save_plain(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, *, code_of: Path | None = None
) -> None:
    """Write model, config, generation config, tokenizer and chat template in the standard layout.

    Args:
        model: what is written.
        tokenizer: written beside the weights.
        folder: where to.
        code_of: the checkpoint that the model started from; code that it needs, and that the spec allows, is copied.
    """
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    if code_of is not None:
        copy_code(code_of, folder)


def set_stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let generation stop at the end of a chat turn and at the end of text: stages teach both."""
    from stages.conversation import end_of_text, turn_terminator

    config = model.generation_config
    if config is None:
        return
    stops = config.eos_token_id
    known = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    turn_end = turn_terminator(tokenizer) if tokenizer.chat_template else None
    wanted = [tokenizer.eos_token_id, turn_end, end_of_text(tokenizer, None)]
    known += [token for token in dict.fromkeys(wanted) if token is not None and token not in known]
    config.eos_token_id = known[0] if len(known) == 1 else known
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a plain checkpoint: float weights, config, tokenizer.

    Raises:
        InvalidInput: not a GGUF file, or its tokenizer has a pre-tokenizer whose rule we cannot restore.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (problem := gguf_problem(file)) is not None:
        raise InvalidInput(problem)
    rule, context = _gguf_metadata(file)
    bind_renderings()  # the file may bring a chat template, and stop tokens are looked for with it
    try:
        source = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidInput(f"{file}: cannot be converted: {error}") from error
    config = source.config
    # Left in, it marks the weights as quantised, and the plain checkpoint could not be written.
    config.__dict__.pop("quantization_config", None)
    if hasattr(config, "rms_norm_eps"):
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.3g}")  # GGUF keeps it as float32: 9.9999997e-06
    model = type(source)(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    restore_pre_tokenizer(tokenizer, rule)
    tokenizer.model_max_length = context
    set_stop_tokens(model, tokenizer)
    save_plain(model, tokenizer, folder)


def restore_pre_tokenizer(tokenizer: "PreTrainedTokenizerBase", rule: str) -> None:
    """Put back the splitting rule that GGUF names and the import drops: other ids mean another model."""
    from tokenizers import pre_tokenizers

    if rule == "smollm":
        backend = cast("Any", tokenizer).backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )


def _gguf_metadata(file: Path) -> tuple[str, int]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (OSError, ValueError, IndexError) as error:
        raise InvalidInput(
            f"{file}: not a GGUF file that can be read ({_why(error)}); fetch it again, or name a folder with "
            "safetensors files (model.path)"
        ) from error

    def value(name: str, default: Any) -> Any:
        field = reader.get_field(name)
        return default if field is None else field.contents()

    kind = value("tokenizer.ggml.model", "gpt2")
    rule = value("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and rule not in GGUF_PRE_TOKENIZERS:
        raise InvalidInput(
            f"{file}: its tokenizer splits text by the rule {rule!r}, which cannot be restored from a GGUF "
            f"(known: {', '.join(GGUF_PRE_TOKENIZERS)}); use the model's original safetensors folder"
        )
    architecture = value("general.architecture", "llama")
    return rule, int(value(f"{architecture}.context_length", 2048))
