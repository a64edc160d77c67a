"""The engine says what does not fit before a forward can fail on it; code, pyproject and lock have the same bounds."""

import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tiny_models import ALL_FAMILIES, make_model

from visor.engine import compat, requirements, selfcheck
from visor.engine.decoder import ElasticDecoder, install
from visor.engine.requirements import KNOWN, NEWEST, Unsupported

pytestmark = pytest.mark.compat
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_passes(family):
    assert isinstance(install(make_model(family)).get_decoder(), ElasticDecoder)


def renamed_layer(model):
    """A layer class as a later release might have it: the cache under another name, ours swallowed by `**kwargs`."""
    layer = type(model.get_decoder().layers[0])

    class Layer(layer):
        def forward(self, hidden_states, attention_mask=None, position_embeddings=None, kv_store=None, **kwargs):
            raise AssertionError("never called: the self-check comes first")

    return Layer


def test_a_renamed_argument_of_a_layer_is_refused_in_a_sentence(monkeypatch):
    model = make_model("llava")
    monkeypatch.setattr(selfcheck, "installed", lambda package: "5.31.0")
    layers, decoder = model.get_decoder().layers, model.get_decoder()
    layers[1].__class__ = renamed_layer(model)
    said = (
        rf"transformers 5.31.0: Layer.forward takes no `{compat.CACHE}` \(but hidden_states, .*kv_store\), which the "
        r"engine needs; known to work: 5.18 to 5.24; pip install 'transformers>=5.18,<5.25'"
    )
    with pytest.raises(Unsupported, match=said):
        install(model)
    assert not isinstance(decoder, ElasticDecoder), "what is refused stays as it was"


def test_arguments_in_another_order_are_refused():
    def forward(self, input_ids, position_ids, attention_mask, cache, inputs_embeds, use_cache, **kwargs):
        raise AssertionError

    names = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds", "use_cache")
    with pytest.raises(Unsupported, match="in another order"):
        selfcheck.check_arguments(forward, "Decoder.forward", names, in_order=True)


def test_other_mask_functions_cache_layers_and_outputs_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compat, "create_causal_mask", lambda config, inputs_embeds, **kwargs: None)
        with pytest.raises(Unsupported, match="create_causal_mask takes no `attention_mask`"):
            install(make_model("llava"))
    with monkeypatch.context() as patch:
        patch.setattr(compat, "DynamicLayer", type("DynamicLayer", (), {}))
        with pytest.raises(Unsupported, match="DynamicLayer has no `batch_repeat_interleave`"):
            selfcheck.check_library()
    monkeypatch.setattr(compat, "BaseModelOutputWithPast", make_output())
    with pytest.raises(Unsupported, match=f"BaseModelOutputWithPast has no `{compat.CACHE}`"):
        selfcheck.check_library()


def make_output():
    from dataclasses import make_dataclass

    return make_dataclass("BaseModelOutputWithPast", ["last_hidden_state", "kv_store"])


def test_too_old_is_refused_and_too_new_is_said_once(monkeypatch, caplog):
    with pytest.raises(Unsupported, match=r"transformers 5.17.2 is too old .* pip install 'transformers>=5.18,<5.25'"):
        requirements.check("transformers", "5.17.2")
    with pytest.raises(ValueError, match=r"torch 2.5.1\+cpu is too old"):
        requirements.check("torch", "2.5.1+cpu")
    assert requirements.check("torch", "2.13.0+cpu") is None and requirements.check("transformers", "5.24.0") is None
    monkeypatch.setattr(requirements, "version", lambda package: {"torch": "2.13.0", "transformers": "5.31.0"}[package])
    requirements.check_installed.cache_clear()
    with caplog.at_level(logging.WARNING, "visor"):
        requirements.check_installed()
        requirements.check_installed()
    (record,) = caplog.records
    assert record.message.startswith("transformers 5.31.0 is newer than all that VISOR was run on; known to work: 5.18")
    requirements.check_installed.cache_clear()


def test_an_absent_package_is_named_with_its_pip_line(monkeypatch):
    def version(package):
        raise requirements.PackageNotFoundError(package)

    monkeypatch.setattr(requirements, "version", version)
    with pytest.raises(Unsupported, match="torch is not installed; .*pip install 'torch>=2.6,<"):
        requirements.installed("torch")


def test_a_broken_optional_package_counts_as_absent_and_its_reason_is_said_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "torchvisor").mkdir()
    (tmp_path / "torchvisor" / "__init__.py").write_text("raise RuntimeError('operator torchvisor::nms is not there')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("torchvisor") is not None
    monkeypatch.setitem(sys.modules, "torchvisor", None)  # so that the test leaves no trace
    del sys.modules["torchvisor"]
    with caplog.at_level(logging.WARNING, "visor"):
        for _ in range(2):
            assert requirements.set_aside_broken(("torchvisor", "no_such_package")) == ("torchvisor",)
    (record,) = caplog.records
    assert "torchvisor is installed but broken, and counts as absent: operator torchvisor::nms" in record.message
    assert find_spec("torchvisor") is None
    with pytest.raises(ImportError):
        import torchvisor  # noqa: F401


def test_python_39_is_refused_in_a_sentence():
    import budgets

    with pytest.raises(SystemExit, match="needs Python 3.10 or newer, and this is 3.9"):
        budgets.check_python((3, 9, 7))
    budgets.check_python(sys.version_info)


def test_bounds_of_pyproject_and_lock_are_those_of_the_check():
    text = (ROOT / "pyproject.toml").read_text()
    for package, (oldest, beyond) in KNOWN.items():
        (line,) = re.findall(rf'^    "({package}>=.*)",$', text, re.M)
        assert Requirement(line).specifier == SpecifierSet(f">={oldest},<{beyond}")
        assert NEWEST[package] in Requirement(line).specifier
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    assert f"transformers=={NEWEST['transformers']}" in lock
    assert not re.search(r"^(torch|nvidia|triton|cuda)\b", lock, re.M), "torch is TORCH's to choose"


def test_the_cache_goes_by_either_name_and_by_one_only():
    cache = SimpleNamespace()
    assert compat.cache_argument({"cache": cache}) is compat.cache_argument({"past_key_values": cache}) is cache
    assert compat.cache_argument({}) is None
    with pytest.raises(ValueError, match="give the KV cache once"):
        compat.one_cache(cache, torch.ones(1))


def test_a_release_that_merges_image_tokens_in_blocks_is_refused(monkeypatch):
    model = make_model("llava")

    def inputs_merger(input_ids, inputs_embeds, image_hidden_states):
        return image_hidden_states.view(-1, 14, 2)

    monkeypatch.setattr(model.model, "inputs_merger", inputs_merger, raising=False)
    with pytest.raises(Unsupported, match="LlavaModel merges only so many image tokens"):
        install(model)
