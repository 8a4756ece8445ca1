"""What a base says of itself for the model card: read from strangers' files, believed only in the right shape."""

import json

import pytest
from headers import GGUF_HEADER

from specs.model import ModelSpec
from stages.origin import Origin, origin_of

CARD = "---\nlicense: {license}\nlicense_name: ours\nlicense_link: https://example.org/l\n---\n# A model\n"


def of_folder(tmp_path, card: str | None = None, **settings) -> Origin:
    (tmp_path / "base").mkdir()
    if card is not None:
        (tmp_path / "base/README.md").write_text(card)
    return origin_of(ModelSpec(path="base", **settings), tmp_path)


def test_a_base_says_its_licence_in_its_own_card(tmp_path):
    found = of_folder(tmp_path, CARD.format(license="other"))
    assert found == Origin(None, "other", "ours", "https://example.org/l", "its model card")
    assert found.as_record() == {
        "license": "other",
        "license_name": "ours",
        "license_link": "https://example.org/l",
        "said_by": "its model card",
    }


def test_the_word_of_the_spec_counts_more(tmp_path):
    found = of_folder(tmp_path, CARD.format(license="mit"), license="apache-2.0", origin="owner/base")
    assert found == Origin("owner/base", "apache-2.0", said_by="the spec")


HOSTILE = {
    "none": None,
    "empty": "",
    "no block": "# MIT\nlicense: mit\n",
    "an open block": "---\nlicense: mit\n",
    "no YAML": "---\nlicense: [mit\n---\n",
    "a list": "---\n- license\n---\n",
    "another type": "---\nlicense: [mit, gpl]\n---\n",
    "no licence": "---\nlicense: '<script>alert(1)</script>'\n---\n",
    "a long one": f"---\nlicense: {'x' * 5000}\n---\n",
    "a tag": "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
    "no truth": "---\nlicense: !!bool maybe\n---\n",
    "no number": "---\nlicense: mit\nx: !!int ''\n---\n",
    "a bomb": "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: *b\n---\n",
    "deep": "---\nlicense: " + "[" * 5000 + "\n---\n",
    "twice": "---\nlicense: mit\nlicense: gpl\n---\n",
}


@pytest.mark.parametrize("card", HOSTILE.values(), ids=HOSTILE)
def test_a_card_that_says_nothing_believable_leaves_the_licence_unknown(tmp_path, card):
    assert of_folder(tmp_path, card).license is None


def test_the_name_in_a_config_is_not_believed(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"_name_or_path": "models/base"}))
    assert origin_of(ModelSpec(path="base"), tmp_path).hub is None


def test_a_gguf_says_it_in_its_settings(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("Apache-2.0")
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/owner/base")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = origin_of(ModelSpec(gguf="m.gguf"), tmp_path)
    assert found == Origin("owner/base", "apache-2.0", said_by="the GGUF file")


@pytest.mark.parametrize("content", [b"", b"junk", GGUF_HEADER, GGUF_HEADER + b"\xff" * 100, None])
def test_a_file_that_is_no_gguf_says_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "m.gguf").write_bytes(content)
    assert origin_of(ModelSpec(gguf="m.gguf"), tmp_path) == Origin()


def test_the_id_of_a_hub_model_is_its_origin_and_its_card_is_read_where_it_was_fetched(tmp_path):
    spec = ModelSpec(hub="owner/base", revision="0" * 40)
    assert origin_of(spec, tmp_path) == Origin("owner/base")
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n")
    assert origin_of(spec, tmp_path, tmp_path / "README.md") == Origin("owner/base", "mit", said_by="its model card")


def test_an_origin_beside_a_hub_id_is_refused():
    with pytest.raises(ValueError, match="origin goes with path or gguf"):
        ModelSpec(hub="owner/base", revision="0" * 40, origin="other/base")
