"""VisorConfig: what it refuses, and what it derives."""

import pytest
import transformers

from visor.model.configuration import VisorConfig


def config(**fields):
    text = transformers.Qwen2Config(hidden_size=32, num_hidden_layers=6, num_attention_heads=4)
    base = transformers.LlavaConfig(text_config=text)
    return VisorConfig(base_config=base, **{"cross_layers": [0, 3], "self_layers": [1, 2, 4], **fields})


def test_defaults():
    made = config()
    assert made.configurations == [[], [1, 2, 4]]
    assert made.check_index(made.default_configuration) == 1
    assert (made.cross_kernel, made.visual_source, made.router, made.reduction) == (7, "latest", None, None)
    assert made.num_layers == 6
    assert made.image_token_id == made.base_config.image_token_id  # pipelines ask the outer config


def test_json_and_back(tmp_path):
    made = config(
        configurations=[[], [4]],
        default_configuration=0,
        router={"hidden_size": 8, "inputs": ["last"]},
        visual_source="initial",
        cross_kernel=5,
        reduction={"method": "pooling", "params": {"side": 2}},
    )
    made.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    path = {"_name_or_path": ""}
    assert type(again) is VisorConfig and {**again.to_dict(), **path} == made.to_dict()


@pytest.mark.parametrize(
    "subsets, layer",
    [
        ([[], [4]], 4),
        ([[], [4], [1, 4]], 1),
        ([[1], [1, 2], [1, 2, 4]], 2),
        ([[1]], None),
    ],
)
def test_router_stands_where_configurations_part(subsets, layer):
    assert config(configurations=subsets).router_layer == layer


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(cross_layers=[6]), r"cross_layers names layers \[6\].*layers 0 to 5"),
        (dict(self_layers=[1, -1]), r"self_layers names layers \[-1\]"),
        (dict(self_layers=[2, 1]), "different layers in ascending order"),
        (dict(self_layers=[1, 3]), r"layers \[3\] are in cross_layers and in self_layers"),
        (
            dict(configurations=[[], [5]]),
            r"configurations\[1\] names layers \[5\], no slots; the slots are \[1, 2, 4\]",
        ),
        (dict(configurations=[[1], []]), "ordered from cheapest to costliest"),
        (dict(configurations=[[1], [1]]), "listed twice"),
        (dict(configurations=[]), "configurations is empty"),
        (dict(default_configuration=2), r"default_configuration 2 does not exist.*1: \[1, 2, 4\]"),
        (dict(default_configuration=True), "default_configuration True does not exist"),
        (dict(cross_kernel=4), "cross_kernel must be odd"),
        (dict(visual_source="last"), "visual_source must be one of latest, initial"),
        (dict(router={"hidden": 8}), "router must be None or"),
        (dict(router={"hidden_size": 0}), "hidden_size must be a positive integer"),
        (dict(router={"hidden_size": 8, "inputs": ["text", "last"]}), "in this order"),
        (dict(reduction={"method": "pool"}), "unknown method 'pool'.*pooling"),
        (dict(reduction={"method": "fastv"}), "does not act between tower and decoder"),
        (dict(reduction={"method": "pooling", "params": {"sides": 2}}), "reduction 'pooling'.*sides"),
        (dict(base_config={"model_type": "lava"}), "model_type 'lava', which transformers does not know"),
        (dict(base_config={"model_type": "visor"}), "itself a VISOR model"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields) if "base_config" not in fields else VisorConfig(**fields)
