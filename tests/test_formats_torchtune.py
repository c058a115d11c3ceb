"""torchtune's names, and its order of the rotary rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.convert.layout import AttentionLayout, interleave_halves, part_halves
from bridge.peft.formats.convert.torchtune import from_torchtune, to_torchtune
from tests.helpers.formats_llama import LAYOUT, adapted, file_of, updates

QWEN = dataclasses.replace(LAYOUT, interleaved=False)


def rotated_by_halves(x, angles):
    """transformers' rotary embedding: feature i turns with feature i + d/2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotated_in_pairs(x, angles):
    """torchtune's rotary embedding: feature 2i turns with feature 2i + 1."""
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return pairs.flatten(-2)


def test_permuted_rows_give_the_attention_of_transformers_under_torchtune_s_rotation():
    torch.manual_seed(0)
    d, tokens = 8, 5
    q, k = torch.randn(d, 16, dtype=torch.float64), torch.randn(d, 16, dtype=torch.float64)
    x = torch.randn(tokens, 16, dtype=torch.float64)
    angles = torch.arange(tokens)[:, None] * 100.0 ** -torch.arange(0, 1, 2 / d).double()
    expected = rotated_by_halves(x @ q.T, angles) @ rotated_by_halves(x @ k.T, angles).T
    q, k = interleave_halves(q, d), interleave_halves(k, d)
    scores = rotated_in_pairs(x @ q.T, angles) @ rotated_in_pairs(x @ k.T, angles).T
    torch.testing.assert_close(scores, expected)


def test_permutations_undo_each_other():
    rows = torch.randn(24, 3)
    assert torch.equal(part_halves(interleave_halves(rows, 8), 8), rows)
    assert not torch.equal(interleave_halves(rows, 8), rows)


@pytest.mark.parametrize("layout", [LAYOUT, QWEN])
def test_the_update_is_that_of_the_permuted_weight(layout):
    model = adapted()
    converted = to_torchtune(file_of(model), layout)
    delta = updates(file_of(model))
    scale = converted.extra["alpha"] / converted.extra["dim"]

    def tune(name):
        a, b = (converted.tensors[f"{name}.lora_{m}.weight"].double() for m in "ab")
        return scale * b @ a

    q = delta["model.layers.1.self_attn.q_proj"]
    wanted = interleave_halves(q, layout.head_dim) if layout.interleaved else q
    torch.testing.assert_close(tune("layers.1.attn.q_proj"), wanted)
    for name, ours in {"attn.output_proj": "self_attn.o_proj", "mlp.w3": "mlp.up_proj"}.items():
        torch.testing.assert_close(tune(f"layers.0.{name}"), delta[f"model.layers.0.{ours}"])


@pytest.mark.parametrize("layout", [LAYOUT, QWEN])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj"], ["lm_head", "v_proj"]])
def test_there_and_back_is_the_same_file(layout, targets):
    adapter = file_of(adapted(target_modules=targets))
    converted = to_torchtune(adapter, layout)
    restored, _ = from_torchtune(
        converted.tensors, converted.extra, layout, converted.extra["alpha"]
    )
    assert restored.config == adapter.config and restored.extra == adapter.extra
    for fqn in adapter.tensors:
        assert all(map(torch.equal, restored.tensors[fqn], adapter.tensors[fqn]))


def test_a_file_of_torchtune_itself_gets_a_config():
    tensors = to_torchtune(file_of(adapted(target_modules=["q_proj"])), LAYOUT).tensors
    adapter, steps = from_torchtune(tensors, {}, LAYOUT, alpha=6)
    assert adapter.config["r"] == 3 and adapter.config["lora_alpha"] == 6
    assert adapter.config["target_modules"] == ["q_proj"]
    assert {step.how for step in steps} == {"rows of B permuted"}


def test_what_torchtune_has_no_place_for_is_refused():
    with pytest.raises(AdapterError, match="torchtune has one of each"):
        to_torchtune(file_of(adapted(rank_pattern={"q_proj": 5})), LAYOUT)
    with pytest.raises(AdapterError, match="q_proj has 32 rows"):
        to_torchtune(file_of(adapted()), AttentionLayout(heads=8, groups=2, head_dim=8))
    trained_head = adapted()
    trained_head.lm_head.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match="saved in full"):
        to_torchtune(file_of(trained_head), LAYOUT)


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.attn.z_proj.lora_a.weight",
        "layers.0.attn.q_proj.magnitude",
        "layers.x.attn.q_proj.lora_a.weight",
        "attn.q_proj.lora_a.weight",
    ],
)
def test_strange_keys_are_refused(key):
    tensors = to_torchtune(file_of(adapted()), LAYOUT).tensors
    with pytest.raises(AdapterFileError, match="not a key of a torchtune adapter"):
        from_torchtune({**tensors, key: torch.ones(3, 32)}, {}, LAYOUT, alpha=6)


def test_half_pairs_are_refused():
    tensors = dict(to_torchtune(file_of(adapted()), LAYOUT).tensors)
    del tensors["layers.0.attn.q_proj.lora_a.weight"]
    with pytest.raises(AdapterFileError, match="holds only the B of"):
        from_torchtune(tensors, {}, LAYOUT, alpha=6)


@pytest.mark.parametrize("half", ["a", "b"])
def test_matrices_without_values_are_refused(half):
    tensors = dict(to_torchtune(file_of(adapted()), LAYOUT).tensors)
    key = f"layers.0.attn.q_proj.lora_{half}.weight"
    tensors[key] = tensors[key][:0] if half == "a" else tensors[key][:, :0]
    with pytest.raises(AdapterFileError, match="is not a matrix"):
        from_torchtune(tensors, {}, LAYOUT, alpha=6)
