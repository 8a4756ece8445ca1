"""What is said of a base that cannot be loaded: which file, why, and what to do; never a wait without end."""

import shutil
from pathlib import Path

import pytest
from hostile import edit_json

from stages.errors import InvalidInput
from stages.model import load_config, load_plain, load_tokenizer, without_weights

pytestmark = pytest.mark.model
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 130\n"


@pytest.fixture
def base(base_model, tmp_path) -> Path:
    return Path(shutil.copytree(base_model, tmp_path / "base"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"it has no tokenizer\.json, .*put the files of one .* beside the weights"),
        (POINTER, r".*/base/tokenizer\.json: a Git LFS pointer; .*git lfs pull"),
        ("{", r".*/base/tokenizer\.json: cannot be read as JSON: .*; fetch it again"),
        ("[" * 100_000, r".*/base/tokenizer\.json: cannot be read as JSON: nested too deeply; fetch it again"),
        ('{"a": 1}', r".*/base/tokenizer\.json: JSON, but no tokenizer that can be loaded \(.*\); fetch it again"),
        (
            '{"added_tokens": [], "model": {"type": "None"}}',
            r".*\.json: JSON, but no tokenizer .*fetch it again",
        ),
    ],
)
def test_a_tokenizer_that_is_missing_or_broken_is_told_in_one_line_with_its_remedy(base, content, said):
    file = base / "tokenizer.json"
    if content is None:
        file.unlink()
        (base / "tokenizer_config.json").unlink()
    else:
        file.write_text(content)
    with pytest.raises(InvalidInput, match=rf"^.*/base: no tokenizer can be loaded: {said}") as caught:
        load_tokenizer(base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 64}, r"the shapes of its weights are others than its config\.json says; .*fetch it again"),
        ({"model_type": "llama9"}, r"model type `llama9` but Transformers does not recognize .*fetch it again"),
        ({"num_hidden_layers": 9}, r"weights are missing from its files: .*; fetch it again"),
    ],
)
def test_a_config_that_is_not_the_weights_own_is_told_in_one_line_with_its_remedy(base, config, said):
    import torch

    edit_json(base / "config.json", **config)
    with pytest.raises(InvalidInput, match=rf"^.*/base: .*{said}") as caught:
        load_plain(base, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_config_that_asks_for_layers_without_end_is_refused_before_one_is_built(base):
    import torch

    edit_json(base / "config.json", num_hidden_layers=10**9)
    refused = (
        r"base/config\.json: num_hidden_layers is 1,000,000,000, and the files of the model hold \d+ weights in all"
    )
    with pytest.raises(InvalidInput, match=refused):
        load_plain(base, torch.float32)
    with pytest.raises(InvalidInput, match=refused):
        without_weights(load_config(base))


def test_a_config_that_leaves_layers_out_is_refused_before_a_pruned_model_is_loaded(base):
    import torch

    edit_json(base / "config.json", num_hidden_layers=3)
    refused = r"base/config\.json: num_hidden_layers is 3, and the weights hold 4 layers: layer 3 would be left out"
    with pytest.raises(InvalidInput, match=refused):
        load_plain(base, torch.float32)
