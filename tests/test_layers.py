"""Which layer a name belongs to: real models, files without a model, adapters, names nobody would choose."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from llmtailor.errors import IncompatibleError, InvalidInputError, NotFoundError
from llmtailor.layers import (
    ROOT_STACK,
    Layer,
    LayerKind,
    LayerMap,
    canonical_name,
    file_stem,
    find_ties,
    map_module,
    map_names,
)

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# For configurations without some of these.
FEW: dict[str, Any] = {key: SIZES[key] for key in list(SIZES)[:5]}
TOWER: dict[str, Any] = {**FEW, "image_size": 8, "patch_size": 4}
del TOWER["vocab_size"]
MOE: dict[str, Any] = {**SIZES, "num_experts": 2, "moe_intermediate_size": 16}

HF: Any = transformers
CAUSAL = HF.AutoModelForCausalLM
# name -> how to make the model
MODELS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "llama": (CAUSAL, lambda: HF.LlamaConfig(**SIZES)),
    "llama-tied": (CAUSAL, lambda: HF.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": (CAUSAL, lambda: HF.Qwen2Config(**SIZES)),
    "qwen3": (CAUSAL, lambda: HF.Qwen3Config(**SIZES, head_dim=8)),
    "mistral": (CAUSAL, lambda: HF.MistralConfig(**SIZES)),
    "gemma2": (CAUSAL, lambda: HF.Gemma2Config(**SIZES, head_dim=8)),
    "gemma3": (CAUSAL, lambda: HF.Gemma3TextConfig(**SIZES, head_dim=8)),
    "gpt2": (CAUSAL, lambda: HF.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
    "gpt-neox": (CAUSAL, lambda: HF.GPTNeoXConfig(**FEW)),
    "phi3": (CAUSAL, lambda: HF.Phi3Config(**SIZES)),
    "opt": (CAUSAL, lambda: HF.OPTConfig(**FEW, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=16)),
    "bert": (HF.AutoModelForMaskedLM, lambda: HF.BertConfig(**FEW)),
    "t5": (
        HF.AutoModelForSeq2SeqLM,
        lambda: HF.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
    ),
    "vit": (HF.AutoModelForImageClassification, lambda: HF.ViTConfig(**TOWER)),
    "clip": (HF.AutoModel, lambda: HF.CLIPConfig(text_config=FEW, vision_config=TOWER, projection_dim=16)),
    "mixtral": (CAUSAL, lambda: HF.MixtralConfig(**SIZES, num_local_experts=2)),
    "qwen2-moe": (CAUSAL, lambda: HF.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=16)),
    "qwen3-moe": (CAUSAL, lambda: HF.Qwen3MoeConfig(**MOE, head_dim=8)),
    "mamba": (CAUSAL, lambda: HF.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)),
    # Mamba, attention, dense and expert blocks in one stack.
    "jamba": (
        CAUSAL,
        lambda: HF.JambaConfig(
            **{**SIZES, "num_hidden_layers": 4}, num_experts=2, attn_layer_period=2, attn_layer_offset=1
        ),
    ),
    "llava": (
        HF.AutoModelForImageTextToText,
        lambda: HF.LlavaConfig(
            vision_config=HF.CLIPVisionConfig(**TOWER), text_config=HF.LlamaConfig(**SIZES), image_token_index=3
        ),
    ),
    "qwen2-vl": (
        HF.AutoModelForImageTextToText,
        lambda: HF.Qwen2VLConfig(
            text_config=SIZES, vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
        ),
    ),
}

LLAMA = "embed_tokens+ layers.0 layers.1 norm lm_head^"
TIED = "embed_tokens+ layers.0 layers.1 norm"
# name -> layers in order; + marks an embedding, ^ a head
EXPECTED = {
    "llama": LLAMA,
    "llama-tied": TIED,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": TIED,
    "gemma3": TIED,
    "gpt2": "wte+ wpe+ h.0 h.1 ln_f",
    "gpt-neox": "embed_in+ layers.0 layers.1 final_layer_norm lm_head^",
    "phi3": LLAMA,
    "opt": "embed_tokens+ embed_positions+ final_layer_norm layers.0 layers.1",
    "bert": "embeddings+ layer.0 layer.1 cls^",
    "t5": "shared+ encoder.block.0 encoder.block.1 encoder.final_layer_norm"
    " decoder.block.0 decoder.block.1 decoder.final_layer_norm",
    "vit": "embeddings+ layers.0 layers.1 layernorm classifier^",
    "clip": "logit_scale text_model.embeddings+ text_model.encoder.layers.0 text_model.encoder.layers.1"
    " text_model.final_layer_norm vision_model.embeddings+ vision_model.pre_layrnorm vision_model.encoder.layers.0"
    " vision_model.encoder.layers.1 vision_model.post_layernorm visual_projection text_projection",
    "mixtral": LLAMA,
    "qwen2-moe": LLAMA,
    "qwen3-moe": LLAMA,
    "mamba": "embeddings+ layers.0 layers.1 norm_f",
    "jamba": "embed_tokens+ layers.0 layers.1 layers.2 layers.3 final_layernorm lm_head^",
    "llava": "vision_tower.embeddings+ vision_tower.pre_layrnorm vision_tower.encoder.layers.0"
    " vision_tower.encoder.layers.1 vision_tower.post_layernorm multi_modal_projector language_model.embed_tokens+"
    " language_model.layers.0 language_model.layers.1 language_model.norm lm_head^",
    "qwen2-vl": "visual.patch_embed+ visual.blocks.0 visual.blocks.1 visual.merger language_model.embed_tokens+"
    " language_model.layers.0 language_model.layers.1 language_model.norm lm_head^",
}
MARKS = {LayerKind.BLOCK: "", LayerKind.EMBEDDING: "+", LayerKind.HEAD: "^", LayerKind.OTHER: ""}


@functools.cache
def build(name: str) -> nn.Module:
    """The model on the meta device; not to be changed."""
    factory, configure = MODELS[name]
    # transformers warns of token ids outside these tiny vocabularies and of missing kernels.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model: nn.Module = factory.from_config(configure())
    return model


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def shapes(names: str | Iterable[str], shape: tuple[int, ...] = (4, 4)) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names.split() if isinstance(names, str) else names, shape)


def describe(layers: LayerMap) -> str:
    return " ".join(layer.name + MARKS[layer.kind] for layer in layers)


def names_of(names: str | Mapping[str, tuple[int, ...]], **options: Any) -> str:
    return " ".join(map_names(shapes(names) if isinstance(names, str) else names, **options).names)


def block(stack: str, index: int, *leaves: str) -> str:
    return " ".join(f"{stack}.{index}.{leaf}" for leaf in leaves or ("attn.q.weight", "norm.weight"))


def test_every_model_of_the_table_is_expected() -> None:
    assert EXPECTED.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_map_module_names_layers_as_users_do(name: str) -> None:
    assert describe(map_module(build(name))) == EXPECTED[name]


@pytest.mark.parametrize("name", MODELS)
def test_map_module_puts_every_tensor_in_one_layer(name: str) -> None:
    model = build(name)
    layers = map_module(model)
    held = [fqn for layer in layers for fqn in layer.fqns]
    assert sorted([*held, *find_ties(model)]) == sorted(model.state_dict())
    assert all(fqn in layers.layer_of(fqn).fqns for fqn in held)


@pytest.mark.parametrize("name", MODELS)
def test_map_module_numbers_blocks_as_the_model_does(name: str) -> None:
    for stack, blocks in itertools.groupby(map_module(build(name)).blocks, key=lambda layer: layer.stack):
        numbered = list(blocks)
        assert [layer.index for layer in numbered] == list(range(len(numbered)))
        assert all(layer.name == f"{stack}.{layer.index}" for layer in numbered)
        assert all(re.search(rf"(^|\.){re.escape(layer.name)}\.", fqn) for layer in numbered for fqn in layer.fqns)


@pytest.mark.parametrize("name", MODELS)
def test_map_names_equals_map_module(name: str) -> None:
    model = build(name)
    untied = {fqn: shape for fqn, shape in shapes_of(model).items() if fqn not in find_ties(model)}
    assert map_names(untied) == map_module(model)
    # A file lists names in the order of the alphabet.
    assert set(map_names(dict(sorted(untied.items()))).names) == set(map_module(model).names)


@pytest.mark.parametrize("name", MODELS)
def test_names_do_not_depend_on_which_blocks_are_there(name: str) -> None:
    layers = map_module(build(name))
    kept = {layer.name for layer in layers if layer.index in (None, 1)}
    names = {fqn: (4,) for layer in layers if layer.name in kept for fqn in layer.fqns}
    assert set(map_names(names).names) == kept


@pytest.mark.parametrize("name", MODELS)
def test_file_stem_is_unique_and_sorts_blocks(name: str) -> None:
    layers = map_module(build(name))
    assert len({file_stem(layer).casefold() for layer in layers}) == len(layers)
    blocks = [layer for layer in layers if layer.stack == layers.blocks[0].stack]
    assert sorted(blocks, key=file_stem) == blocks


def test_layer_of_knows_later_names_of_tied_tensors() -> None:
    layers = map_module(build("llama-tied"))
    assert layers.layer_of("lm_head.weight").name == "embed_tokens"
    assert layers["embed_tokens"].fqns == ("model.embed_tokens.weight",)


def test_layer_of_refuses_unknown_tensor() -> None:
    with pytest.raises(NotFoundError, match=r"model\.norm\.weight") as caught:
        map_module(build("llama")).layer_of("model.norm.weigth")  # codespell:ignore
    assert caught.value.kind == "unknown-tensor"


def test_getitem_refuses_unknown_layer() -> None:
    with pytest.raises(NotFoundError, match=r"did you mean layers\.[01]") as caught:
        map_module(build("llama"))["layers.7"]
    assert caught.value.layer == "layers.7"


def test_layer_map_is_a_sequence_of_layers() -> None:
    layers = map_module(build("llama"))
    assert len(layers) == 5
    assert list(layers) == list(layers.layers)
    assert layers["norm"] == layers.layers[3]
    assert hash(layers) == hash(map_module(build("llama")))


def test_canonical_name_removes_wrappers() -> None:
    name = "_orig_mod.model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp.weight"
    assert canonical_name(name) == "model.layers.0.mlp.weight"
    assert canonical_name("_orig_mod") == "_orig_mod"


def test_wrappers_change_no_layer() -> None:
    model = Toy()
    expected = map_module(model)
    compiled = cast("nn.Module", torch.compile(model, backend="eager"))
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_buffers())
    assert map_module(model) == expected
    assert map_module(compiled) == expected
    # A file has the wrapper's names; they lead to the same layers.
    names = shapes_of(compiled)
    assert all(name.startswith("_orig_mod.") for name in names)
    assert map_names(names).names == expected.names


def test_two_tensors_of_one_canonical_name_are_refused() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2))
    module._orig_mod = nn.Linear(2, 2, bias=False)
    with pytest.raises(IncompatibleError) as caught:
        map_module(module)
    assert caught.value.kind == "name-collision"


def test_find_ties_names_the_first_holder() -> None:
    assert find_ties(build("t5")) == dict.fromkeys(
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"], "shared.weight"
    )
    assert find_ties(build("llama")) == {}


def test_find_ties_sees_shared_modules_and_buffers() -> None:
    module = nn.Module()
    module.one = nn.BatchNorm1d(2)
    module.two = module.one
    assert set(find_ties(module).values()) == {f"one.{leaf}" for leaf in module.one.state_dict()}
    assert set(find_ties(module)) == {f"two.{leaf}" for leaf in module.one.state_dict()}


class Toy(nn.Module):
    """Two blocks; buffers of both sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
        self.scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("mask", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_map_module_holds_what_state_dict_holds() -> None:
    model = Toy()
    model.layers[0].requires_grad_(False)
    layers = map_module(model)
    assert [fqn for layer in layers for fqn in layer.fqns] == list(model.state_dict())
    assert layers.names == ("scale", "mask", "layers.0", "layers.1")


def test_without_a_stack_each_module_is_a_layer() -> None:
    assert describe(map_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))) == "0 2"
    assert names_of("net.0.weight net.0.bias net.2.weight scale") == "net.0 net.2 scale"


def test_stack_of_the_model_itself() -> None:
    layers = map_names(shapes(f"{block('', 0)} {block('', 1)} norm.weight".replace(" .", " ").lstrip(".")))
    assert [(layer.name, layer.kind, layer.stack, layer.index) for layer in layers] == [
        ("0", LayerKind.BLOCK, ROOT_STACK, 0),
        ("1", LayerKind.BLOCK, ROOT_STACK, 1),
        ("norm", LayerKind.OTHER, None, None),
    ]
    assert [file_stem(layer) for layer in layers] == ["000", "001", "norm"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Shallow blocks of a stack that has deep ones; tensors held by the block, the list and the trunk themselves.
        (f"m.h.0.weight {block('m.h', 1)} m.h.2.gate m.h.bias m.scale", "h.0 h.1 h.2 h.bias scale"),
        # A gap, as in a file of adapters.
        (f"{block('m.h', 3)} {block('m.h', 11)} {block('m.h', 7)}", "h.3 h.7 h.11"),
        # Inner lists stay with their block.
        ("encoder.block.0.layer.0.q.weight encoder.block.0.layer.1.q.weight", "block.0"),
        # Not numbers.
        (f"{block('m.h', 0)} m.x.01.a.b m.x.1a.a.b", "h.0 x"),
        # A projector of Linears and activations is one layer, a list of parameters too.
        (f"{block('m.h', 0)} m.proj.0.weight m.proj.2.weight m.proj.4.weight", "h.0 proj"),
        (f"{block('m.h', 0)} m.prompts.0 m.prompts.1 m.prompts.2", "h.0 prompts"),
        # Three or more equal modules are a stack, but two are not, and heads are heads.
        ("m.blocks.0.weight m.blocks.1.weight m.blocks.2.weight m.norm.weight", "blocks.0 blocks.1 blocks.2 norm"),
        (f"{block('m.h', 0)} m.blocks.0.weight m.blocks.1.weight", "h.0 blocks"),
        (f"{block('m.h', 0)} m.lm_heads.0.weight m.lm_heads.1.weight m.lm_heads.2.weight", "h.0 lm_heads"),
        (f"{block('m.h', 0)} m.b.0.weight m.b.1.weight m.b.2.bias", "h.0 b"),
        # Names that would meet keep their whole path; a later one may be pushed, too.
        (
            f"{block('m.h', 0)} {block('m.m.k', 0)} m.norm.weight norm.weight m.m.norm.weight",
            "h.0 m.k.0 m.norm norm m.m.norm",
        ),
        (f"{block('m.h', 0)} {block('m.t.h', 0)} m.t.embed.weight", "h.0 t.h.0 t.embed"),
    ],
)
def test_map_names_of_awkward_names(names: str, expected: str) -> None:
    assert names_of(names) == expected


def test_equal_modules_of_unequal_shapes_are_no_stack() -> None:
    names = shapes(f"{block('m.h', 0)} m.mlp.layers.0.weight m.mlp.layers.1.weight")
    assert names_of({**names, "m.mlp.layers.2.weight": (4, 1)}) == "h.0 mlp"
    assert names_of({**names, "m.mlp.layers.2.weight": (4, 4)}) == "h.0 mlp.layers.0 mlp.layers.1 mlp.layers.2"


def test_list_of_equal_modules_renames_no_other_layer() -> None:
    names = f"{block('m.h', 0)} x.blocks.0.weight x.blocks.1.weight"
    assert names_of(names) == "h.0 x"
    assert names_of(f"{names} x.blocks.2.weight") == "h.0 x.blocks.0 x.blocks.1 x.blocks.2"


def test_blocks_of_a_sorted_file_are_in_order_of_index() -> None:
    names = sorted(f"model.layers.{i}.mlp.experts.{e}.w1.weight" for i in range(12) for e in range(11))
    assert map_names(shapes(names)).names == tuple(f"layers.{i}" for i in range(12))
    names += [f"model.layers.{i}.attn.q.weight" for i in range(12)]
    expected = ((f"layers.{i}", *(f"layers.{i}.mlp.experts.{e}" for e in range(11))) for i in range(12))
    assert map_names(shapes(names), split_experts=True).names == tuple(itertools.chain(*expected))


def test_split_experts_makes_each_a_block() -> None:
    leaves = [f"mlp.experts.{e}.{w}.weight" for e in range(2) for w in ("w1", "w2")]
    names = f"model.embed_tokens.weight {block('model.layers', 3, 'attn.q.weight', 'mlp.gate.weight', *leaves)}"
    assert names_of(names) == "embed_tokens layers.3"
    layers = map_names(shapes(names), split_experts=True)
    assert layers.names == ("embed_tokens", "layers.3", "layers.3.mlp.experts.0", "layers.3.mlp.experts.1")
    assert layers["layers.3.mlp.experts.1"] == Layer(
        name="layers.3.mlp.experts.1",
        kind=LayerKind.BLOCK,
        stack="layers.3.mlp.experts",
        index=1,
        fqns=("model.layers.3.mlp.experts.1.w1.weight", "model.layers.3.mlp.experts.1.w2.weight"),
    )
    assert layers["layers.3"].fqns == ("model.layers.3.attn.q.weight", "model.layers.3.mlp.gate.weight")
    assert file_stem(layers["layers.3.mlp.experts.1"]) == "layers.3.mlp.experts.001"


def test_split_experts_leaves_fused_ones_alone() -> None:
    assert map_module(build("mixtral"), split_experts=True) == map_module(build("mixtral"))
    assert map_module(build("t5"), split_experts=True) == map_module(build("t5"))


def test_adapters_fall_in_their_blocks() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    base = CAUSAL.from_config(HF.LlamaConfig(**SIZES))
    # peft 0.21 asks transformers 5.23 by a deprecated name.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(base, config)
    layers = map_module(model)
    assert describe(layers) == LLAMA
    assert sorted(fqn for layer in layers for fqn in layer.fqns) == sorted(model.state_dict())
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert layers.layer_of(f"{prefix}.lora_A.default.weight").name == "layers.0"
    # The file of adapters that PEFT writes.
    saved = {
        name: tuple(tensor.shape)
        for name, tensor in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    assert set(map_names(saved).names) == {"embed_tokens", "layers.0", "layers.1", "lm_head"}


def test_adapters_make_no_stack_of_a_projector() -> None:
    leaves = "base_layer.weight lora_A.default.weight lora_B.default.weight lora_magnitude_vector.default.weight"
    adapted = " ".join(f"m.projector.{i}.{leaf}" for i in (0, 2) for leaf in leaves.split())
    assert names_of(f"{block('m.h', 0)} {adapted}") == "h.0 projector"
    without = "emb.lora_embedding_A.default emb.base_layer.weight fc.lora_A.default.weight fc.base_layer.weight"
    assert names_of(without) == "emb fc"


def test_overrides_take_their_tensors_in_order() -> None:
    overrides = {
        "vision": ["*vision_tower*", "*projector*"],
        "lm_head": ["lm_head*"],
        "rest": ["*.norm.*", "*projector*"],
    }
    layers = map_module(build("llava"), overrides=overrides)
    assert describe(layers) == (
        "vision language_model.embed_tokens+ language_model.layers.0 language_model.layers.1 rest lm_head^"
    )
    plain = map_module(build("llava"))
    taken = [layer.fqns for layer in plain if layer.name.startswith(("vision_tower", "multi_modal"))]
    assert layers["vision"].fqns == tuple(itertools.chain(*taken))
    assert layers["vision"].kind is LayerKind.OTHER
    assert layers["vision"].stack is None
    assert layers["rest"].fqns == ("model.language_model.norm.weight",)


def test_overrides_match_canonical_names() -> None:
    assert names_of("_orig_mod.norm._orig_mod.weight fc.weight", overrides={"all": ["norm.weight"]}) == "all fc"


def test_override_may_take_over_the_name_of_a_layer_it_empties() -> None:
    layers = map_module(build("gpt2"), overrides={"wte": ["*.wte.*", "*.wpe.*"]})
    assert describe(layers) == "wte+ h.0 h.1 ln_f"


def test_layer_called_like_an_override_keeps_its_whole_path() -> None:
    assert names_of(f"{block('m.h', 0)} m.norm.weight m.x.weight", overrides={"norm": ["m.x.*"]}) == "h.0 m.norm norm"
    # All blocks of a stack together.
    overrides = {"h.1": ["m.x.*"]}
    assert names_of(f"{block('m.h', 0)} {block('m.h', 1)} m.x.w", overrides=overrides) == "m.h.0 m.h.1 h.1"


@pytest.mark.parametrize(
    ("overrides", "kind", "said"),
    [
        ({"vision": ["*norm*", "*vision*"]}, "glob-matches-nothing", r"'\*vision\*'"),
        ({"a": ["*"], "b": ["*norm*"]}, "override-empty", "b"),
        ({"lm_head": ["*norm*"]}, "layer-name-taken", "lm_head"),
        ({"a": "*norm*"}, "override-form", r"\*norm\*"),
        ({"": ["*norm*"]}, "override-form", "empty"),
        ({"a": []}, "override-empty", "a"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(overrides: Any, kind: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said) as caught:
        map_module(build("llama"), overrides=overrides)
    assert caught.value.kind == kind


def auxiliary(name: str) -> Layer:
    return Layer(name=name, kind=LayerKind.OTHER, stack=None, index=None, fqns=("x",))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("embed_tokens", "embed_tokens"),
        ("layers.007", "layers.%3007"),
        ("layers.0007", "layers.0007"),
        ("007", "%3007"),
        (".hidden", "%2Ehidden"),
        ("..", "%2E."),
        ("", "%"),
        ("a/b c~%", "a%2Fb%20c%7E%25"),
        ("\u00e9", "%C3%A9"),
    ],
)
def test_file_stem_is_safe(name: str, stem: str) -> None:
    assert file_stem(auxiliary(name)) == stem


@pytest.mark.parametrize(("index", "stem"), [(7, "layers.007"), (70, "layers.070"), (1234, "layers.1234")])
def test_file_stem_pads_blocks(index: int, stem: str) -> None:
    block = Layer(name=f"layers.{index}", kind=LayerKind.BLOCK, stack="layers", index=index, fqns=("x",))
    assert file_stem(block) == stem


PART = st.sampled_from(
    ["a", "b", "0", "1", "2", "007", "10", "experts", "lm_head", "_orig_mod", "lora_A", "~", " ", ""]
)
FQN = st.lists(PART, min_size=1, max_size=6).map(".".join)
SHAPES = st.dictionaries(FQN, st.sampled_from([(), (2,), (2, 2)]), max_size=25)


@settings(deadline=None, max_examples=400)
@given(names=SHAPES, split_experts=st.booleans())
def test_map_names_partitions_any_names(names: dict[str, tuple[int, ...]], split_experts: bool) -> None:
    layers = map_names(names, split_experts=split_experts)
    held = [fqn for layer in layers for fqn in layer.fqns]
    assert sorted(held) == sorted(names)
    assert all(layer.fqns for layer in layers)
    assert len(set(layers.names)) == len(layers)
    stems = [file_stem(layer) for layer in layers]
    assert len(set(stems)) == len(stems)
    assert all(re.fullmatch(r"[A-Za-z0-9_%-][A-Za-z0-9_.%-]*", stem) for stem in stems)
    for layer in layers:
        assert (layer.kind is LayerKind.BLOCK) == (layer.index is not None) == (layer.stack is not None)
    assert map_names(names, split_experts=split_experts) == layers


@settings(deadline=None, max_examples=200)
@given(names=SHAPES, data=st.data())
def test_map_names_gives_same_layers_in_any_order(names: dict[str, tuple[int, ...]], data: st.DataObject) -> None:
    shuffled = {fqn: names[fqn] for fqn in data.draw(st.permutations(list(names)))}
    cut = {layer.name: set(layer.fqns) for layer in map_names(names)}
    assert {layer.name: set(layer.fqns) for layer in map_names(shuffled)} == cut


def test_importing_layers_does_not_import_torch() -> None:
    code = "import sys, llmtailor.layers, llmtailor.strategies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
