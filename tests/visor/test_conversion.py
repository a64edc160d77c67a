"""From a base to a VISOR model: with every layer SELF it is the base; new blocks change nothing."""

import json
import subprocess
import sys

import pytest
import torch
from schedules import schedules
from tiny_checkpoint import make_image, make_llava, make_processor
from tiny_models import ALL_FAMILIES, generate, make_model, make_prompt, visual_counts
from visor_models import CROSS_LAYERS, SLOTS, VISOR_FAMILIES, make_visor

from visor.convert import main
from visor.engine.decoder import install, running
from visor.model.conversion import convert

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_layer_self_is_the_base(family):
    base = make_model(family)
    prompt = make_prompt(base, 3)
    with torch.no_grad():
        expected = base(**prompt).logits
    sequences = generate(base, prompt).sequences
    model = convert(make_model(family))
    with torch.no_grad():
        assert torch.equal(model(**prompt, configuration="dense").logits, expected)
    assert torch.equal(generate(model, prompt, configuration="dense").sequences, sequences)


@pytest.mark.parametrize("family", VISOR_FAMILIES)
def test_new_blocks_change_nothing(family):
    ablation = install(make_model(family))
    prompt = make_prompt(ablation, 2)
    with torch.no_grad():
        with running(ablation, schedules("tttttt", visual_counts(prompt))):
            expected = ablation(**prompt).logits[:, -1]
        model = make_visor(family, awake=False)
        assert torch.equal(model(**prompt, configuration=0).logits[:, -1], expected)


def test_default_layers_are_a_third_each():
    config = convert(make_model("llava", num_layers=12)).config
    assert config.cross_layers == [0, 3, 6, 9] and config.self_layers == [1, 4, 7, 10]
    assert config.configurations == [[], [1, 4, 7, 10]]


def test_weights_stay_the_bases_own():
    base = make_model("llava")
    before = {name: x.clone() for name, x in base.state_dict().items()}
    model = convert(base)
    assert model.base is base
    own = model.base.state_dict()
    assert all(torch.equal(own[name], x) for name, x in before.items())
    assert all("cross_blocks" in name for name in own.keys() - before.keys())


def test_what_cannot_be_converted():
    from transformers import BertConfig, BertModel

    with pytest.raises(ValueError, match="'bert', which has no adapter"):
        convert(BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)))
    with pytest.raises(ValueError, match="a VISOR model already"):
        convert(make_visor("llava"))
    with pytest.raises(ValueError, match=r"cross_layers names layers \[9\]"):
        convert(make_model("llava"), cross_layers=[9])


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_llava().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def test_command(base_folder, tmp_path, capsys):
    out = tmp_path / "converted"
    arguments = [
        str(base_folder),
        str(out),
        "--cross-layers",
        "0,3",
        "--self-layers",
        "1,4",
        "--router-hidden-size",
        "8",
    ]
    assert main(arguments) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["cross_layers"] == [0, 3] and said["self_layers"] == [1, 4] and said["out"] == str(out)
    assert "trained: false" in (out / "README.md").read_text()
    assert str(base_folder) not in (out / "config.json").read_text()

    from visor.inference import LoadedModel

    loaded = LoadedModel.load(out)
    assert loaded.geometry.visor.configurations == ((), (1, 4))
    assert said["new_parameters"] == said["parameters"] - sum(p.numel() for p in make_llava().parameters())
    sample = loaded.prepare(make_image(1), "what is this")
    plan = loaded.model.schedules([1], [sample.num_visual])
    base = LoadedModel.load(base_folder)
    answers = [
        m.generate([sample], m.encode([sample]), [schedule], 4)[0].token_ids
        for m, schedule in ((loaded, plan[0]), (loaded, dense_of(loaded, sample)), (base, dense_of(base, sample)))
    ]
    assert answers[1] == answers[2]
    assert main(arguments) == 2
    assert "not an empty folder" in capsys.readouterr().err


def dense_of(loaded, sample):
    from budgets.schedule import dense

    return dense(loaded.geometry.num_layers, sample.num_visual)


def test_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["dens-tiny", str(tmp_path / "x")]) == 2
    assert "unknown model 'dens-tiny'" in capsys.readouterr().err
    assert main(["dense-tiny", str(tmp_path / "x"), "--cross-layers", "12"]) == 2
    assert (
        "cross_layers names layers [12], which do not exist: the decoder has layers 0 to 11" in capsys.readouterr().err
    )
    assert not (tmp_path / "x").exists()


def test_help_needs_no_torch():
    code = "import sys, visor.convert as c; c.make_parser().format_help(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
def test_dense_is_refused_where_training_has_changed_the_base():
    model = make_visor("llava")
    prompt = make_prompt(model.base, 2)
    model(**prompt, configuration="dense")
    model.config.trained_from = "dense-tiny"
    for wanted in ("dense", [0, "dense"]):
        with pytest.raises(ValueError, match="trained on from 'dense-tiny'.*Load 'dense-tiny' for the dense model"):
            model(**prompt, configuration=wanted)
        with pytest.raises(ValueError, match="Load 'dense-tiny'"):
            model.generate(**prompt, configuration=wanted, max_new_tokens=1)
    model(**prompt, configuration=0)


@torch.no_grad()
def test_dense_takes_a_static_cache():
    model = make_visor("llava")
    prompt = make_prompt(model.base, 2)
    expected = generate(model.base, prompt, cache_implementation="static").sequences
    found = generate(model, prompt, configuration="dense", cache_implementation="static").sequences
    assert torch.equal(found, expected)


def test_blocks_and_router_of_a_quantised_base_are_floats():
    base = make_model("llava").to(torch.bfloat16)
    linears = [m for layer in base.get_decoder().layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    for module in (*linears, base.lm_head):
        quantised = torch.zeros(module.weight.shape, dtype=torch.int8)
        module.weight = torch.nn.Parameter(quantised, requires_grad=False)
    model = convert(base, CROSS_LAYERS, SLOTS, configurations=[[], [1]], router={"hidden_size": 8})
    new = [*model.get_decoder().cross_blocks.parameters(), *model.router.parameters()]
    assert {weight.dtype for weight in new} == {torch.bfloat16}
