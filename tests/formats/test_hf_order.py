"""The order of parameters that is written down is that of the real models; any other is asked for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer

from llmtailor.errors import FormatError, IncompatibleError, IncompleteError, UnsupportedError
from llmtailor.formats.hf import asking
from llmtailor.formats.hf.asking import ask_transformers, find_order
from llmtailor.formats.hf.config import ModelConfig, parse_config
from llmtailor.formats.hf.parameter_order import FAMILIES, check_blocks, is_spared_decay, known_order

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 11,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}


def config_of(**values: Any) -> ModelConfig:
    return parse_config(json.dumps(values).encode(), Path("config.json"))


def real_model(model_type: str, **options: Any) -> tuple[Any, ModelConfig]:
    config = transformers.AutoConfig.for_model(model_type, **(_SIZES | options))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.tie_weights()
    return model, parse_config(config.to_json_string().encode(), Path("config.json"))


def names_in_file(model: torch.nn.Module) -> list[str]:
    """In an order that says nothing."""
    names = [name for name, _ in model.named_parameters()]
    random.Random(0).shuffle(names)
    return names


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_order_of_a_known_family_is_that_of_the_real_model(model_type: str, has_biases: bool) -> None:
    options = {"attention_bias": True, "mlp_bias": True, "use_bias": True} if has_biases else {}
    model, config = real_model(model_type, **options)

    order = known_order(config, names_in_file(model))

    assert order is not None
    assert list(order.names) == [name for name, _ in model.named_parameters()]
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    assert order.undecayed == {name for name in order.names if name not in decayed}
    check_blocks(config, {*order.names, "lm_head.weight"}, Path("checkpoint"))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_tying_of_a_known_family_is_that_of_its_configuration(model_type: str) -> None:
    assert transformers.AutoConfig.for_model(model_type).tie_word_embeddings == FAMILIES[model_type].is_tied


@pytest.mark.parametrize("is_tied", [False, True])
def test_order_follows_what_the_configuration_says_of_tying(is_tied: bool) -> None:
    model, config = real_model("llama", tie_word_embeddings=is_tied)

    order = known_order(config, [*names_in_file(model), *(["lm_head.weight"] if is_tied else [])])

    assert order is not None
    assert list(order.names) == [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in order.names) is not is_tied


def test_model_with_a_tensor_its_family_has_not_is_not_known() -> None:
    model, config = real_model("llama")

    assert known_order(config, [*names_in_file(model), "score.weight"]) is None
    assert known_order(config, [*names_in_file(model), "model.layers.0.self_attn.rotary_emb.inv_freq"]) is None
    assert known_order(config, [*names_in_file(model), "model.layers.00.mlp.up_proj.weight"]) is None


def test_decay_rule_by_name_is_the_trainers() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ["norm", "Norm", "q_norm", "normal", "abnorm", "RMSNormish", "layernorm2", "biased", "norm_q"]
            for name in names:
                self.add_module(name, torch.nn.Linear(2, 2, bias=False))

    decayed = set(Trainer.get_decay_parameter_names(None, Odd()))

    assert {name: is_spared_decay(name) for name, _ in Odd().named_parameters()} == {
        name: name not in decayed for name, _ in Odd().named_parameters()
    }
    assert "normal.weight" in decayed


def test_missing_module_of_a_known_family_is_named() -> None:
    model, config = real_model("llama")
    names = {name for name, _ in model.named_parameters()} - {"model.layers.7.mlp.up_proj.weight"}

    with pytest.raises(IncompleteError) as caught:
        check_blocks(config, names, Path("checkpoint"))

    assert caught.value.fqn == "model.layers.7.mlp.up_proj.weight"
    assert caught.value.kind == "missing-layer"


def test_missing_block_and_missing_head_are_told() -> None:
    model, config = real_model("llama")
    names = {name for name, _ in model.named_parameters()}

    with pytest.raises(IncompleteError, match="9 tensors"):
        check_blocks(config, {name for name in names if ".10." not in name}, Path("checkpoint"))
    with pytest.raises(IncompleteError, match="lm_head"):
        check_blocks(config, names - {"lm_head.weight"}, Path("checkpoint"))


def test_partial_model_may_lack_layers_but_no_part_of_one() -> None:
    model, config = real_model("llama")
    saved = {name for name, _ in model.named_parameters() if ".3." in name or name == "model.norm.weight"}

    check_blocks(config, saved, Path("checkpoint"), allow_partial=True)
    with pytest.raises(IncompleteError, match=r"layers\.3\.input_layernorm"):
        check_blocks(config, saved - {"model.layers.3.input_layernorm.weight"}, Path("c"), allow_partial=True)


def test_block_beyond_the_configuration_is_refused() -> None:
    model, _ = real_model("llama", num_hidden_layers=3)
    _, config = real_model("llama", num_hidden_layers=2)

    with pytest.raises(FormatError, match="more blocks"):
        check_blocks(config, {name for name, _ in model.named_parameters()}, Path("checkpoint"))


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_order_of_another_model_is_asked_of_transformers() -> None:
    model, config = real_model("gpt2", n_layer=2, n_embd=16, n_head=4)

    order = find_order(config, shapes_of(model))

    assert list(order.names) == list(shapes_of(model))
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    assert order.undecayed == {name for name in order.names if name not in decayed}
    assert "transformer.h.0.ln_1.weight" in order.undecayed  # by its class alone
    assert "transformers 5" in order.origin


def test_model_that_keeps_its_weights_under_other_names_is_refused() -> None:
    model, config = real_model("qwen2_moe", num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    in_file = {name.replace("experts.gate_up_proj", "experts.0.gate_proj.weight"): () for name in shapes_of(model)}

    with pytest.raises(UnsupportedError) as caught:
        find_order(config, in_file)

    assert caught.value.kind == "converted-weights"


def test_configuration_of_another_size_is_refused() -> None:
    model, _ = real_model("gpt2", n_layer=2, n_embd=16, n_head=4)
    _, config = real_model("gpt2", n_layer=2, hidden_size=32, n_head=4)

    with pytest.raises(IncompatibleError) as caught:
        find_order(config, shapes_of(model))

    assert caught.value.kind == "config-mismatch"


def test_configuration_of_a_billion_blocks_is_refused_unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ask_transformers", lambda text: pytest.fail("was asked"))

    with pytest.raises(FormatError, match="another model"):
        find_order(config_of(model_type="gpt2", n_layer=10**9), {"wte.weight": (4, 4)})


@pytest.mark.parametrize("config", [None, config_of(), config_of(model_type="nobody-knows")])
def test_order_nobody_knows_is_refused_with_the_way_out(config: ModelConfig | None) -> None:
    with pytest.raises(IncompatibleError) as caught:
        find_order(config, {"a.weight": (2, 2)})

    assert caught.value.kind == "unknown-order"
    assert "--parameter-names" in str(caught.value)


def test_missing_transformers_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A Python without the environment's packages, but with ours.
    source = Path(asking.__file__).parents[3]
    python = tmp_path / "python"
    script = "import sys; sys.modules['transformers'] = None; sys.argv[:4] = sys.argv[3:4]; import runpy; "
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH={source} exec {sys.executable} -P -c "{script}runpy.run_module('
        "'llmtailor.formats.hf.model_process', run_name='__main__')\"\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    ask_transformers.cache_clear()

    with pytest.raises(IncompatibleError, match=r"llmtailor\[hf\]"):
        find_order(config_of(model_type="gpt2"), {"a.weight": (2, 2)})
    ask_transformers.cache_clear()


def test_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(asking, "_TIMEOUT_SECONDS", 0.2)
    ask_transformers.cache_clear()

    with pytest.raises(IncompatibleError, match=r"0\.2 s"):
        find_order(config_of(model_type="gpt2"), {"a.weight": (2, 2)})
    ask_transformers.cache_clear()


def test_configuration_cannot_make_the_child_run_code_or_import_from_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    (tmp_path / "transformers.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    config = {
        "model_type": "gpt2",
        "architectures": ["os"],
        "auto_map": {"AutoModelForCausalLM": "evil.C", "AutoConfig": "evil.C"},
        "experts_implementation": "evil",
        "_name_or_path": str(tmp_path),
        "_attn_implementation": "kernels-community/evil",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "n_layer": 1,
        "n_embd": 8,
        "n_head": 2,
    }

    answer = ask_transformers(json.dumps(config).encode())

    assert answer["parameters"][0] == ["transformer.wte.weight", [50257, 8]]
    assert not (tmp_path / "ran").exists()


def test_asking_needs_no_torch_in_this_process() -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom llmtailor.formats.hf.config import parse_config\n"
        "from llmtailor.formats.hf.asking import ask_transformers\n"
        'ask_transformers(b\'{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}\')["parameters"]\n'
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
