"""Layers that a config leaves out: refused where they are ordinary ones, known where they are legitimate extras."""

from pathlib import Path

import pytest
from headers import llama, write_headers

from stages.depth import depth_problem, predictors
from stages.layout import Layout, read_layout


def layers(count: int, stem: str = "model.layers.", experts: int = 0) -> dict[str, tuple[int, ...]]:
    one = llama(experts)
    inside = {name.removeprefix("model.layers.0."): shape for name, shape in one.items() if ".0." in name}
    found = {name: shape for name, shape in one.items() if ".layers." not in name}
    return found | {f"{stem}{n}.{name}": shape for n in range(count) for name, shape in inside.items()}


def layout_of(folder: Path, shapes: dict[str, tuple[int, ...]], **config) -> Layout:
    write_headers(folder, shapes, **config)
    return read_layout(folder)


@pytest.mark.parametrize(("asked", "which"), [(3, "layer 3"), (2, "layers 2 to 3")])
@pytest.mark.parametrize("experts", [0, 2])
def test_layers_beyond_the_config_are_refused_with_both_counts(tmp_path, asked, which, experts):
    found = depth_problem(layout_of(tmp_path, layers(4, experts=experts), num_hidden_layers=asked))
    assert found is not None
    assert found.startswith(
        f"{tmp_path / 'config.json'}: num_hidden_layers is {asked}, and the weights hold 4 layers: {which} would be "
        "left out without a word. "
    )


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_every_name_of_the_number_of_layers_counts(tmp_path, name):
    assert depth_problem(layout_of(tmp_path / "fewer", layers(3), **{name: 2})) is not None
    assert depth_problem(layout_of(tmp_path / "same", layers(3), **{name: 3})) is None


def test_the_config_of_the_language_model_inside_another_counts_and_a_vision_tower_does_not(tmp_path):
    shapes = layers(2, "model.language_model.layers.") | layers(6, "model.vision_tower.layers.")
    assert depth_problem(layout_of(tmp_path / "a", shapes, text_config={"num_hidden_layers": 2})) is None
    assert depth_problem(layout_of(tmp_path / "b", shapes, text_config={"num_hidden_layers": 1})) is not None


EXTRAS = {
    "rotary frequencies": {"model.layers.2.self_attn.rotary_emb.inv_freq": (16,)},
    "a mask": {"model.layers.2.attn.bias": (1, 1, 8, 8)},
    "a stack for prediction": layers(1, "mtp.layers."),
    "a layer for prediction by its own matrices": {
        name.replace(".0.", ".2."): shape for name, shape in layers(1).items() if ".0." in name
    }
    | {"model.layers.2.eh_proj.weight": (32, 64)},
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_legitimate_extras_are_no_layers_that_were_left_out(tmp_path, extra):
    assert depth_problem(layout_of(tmp_path, layers(2) | extra, num_hidden_layers=2)) is None


def test_layers_for_prediction_are_known_by_the_config_or_by_their_matrices(tmp_path):
    by_config = layout_of(tmp_path / "a", layers(3), num_hidden_layers=2, num_nextn_predict_layers=1)
    by_matrix = EXTRAS["a layer for prediction by its own matrices"]
    assert (depth_problem(by_config), predictors(by_config)) == (None, (2,))
    assert predictors(layout_of(tmp_path / "b", layers(2) | by_matrix, num_hidden_layers=2)) == (2,)
    assert predictors(layout_of(tmp_path / "c", layers(2), num_hidden_layers=2)) == ()


@pytest.mark.parametrize("odd", [None, "4", True, -1, 2.5, [2]])
def test_a_config_that_does_not_say_is_left_to_the_library(tmp_path, odd):
    assert depth_problem(layout_of(tmp_path, layers(2), num_hidden_layers=odd)) is None
