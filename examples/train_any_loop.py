"""Train with a plain torch loop: branches and a new classification head; save, load, compare."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from bridge.peft import LoRA, load_adapter, save_adapter

config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
)


def base() -> LlamaForSequenceClassification:
    """The same random model each time; its head `score` is new, as on any base model."""
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


tokens = torch.randint(1, 64, (48, 8))
labels = tokens[:, -1] % 2  # to learn: whether the last token is odd
model = LoRA(dim=8, modules_to_train=["score"])(base())

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
for step in range(61):
    loss = torch.nn.functional.cross_entropy(model(input_ids=tokens).logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:2}: loss {loss.item():.4f}")

with tempfile.TemporaryDirectory() as directory, torch.no_grad():
    save_adapter(model, directory)  # A, B and the head
    again = load_adapter(base(), directory)
    assert torch.equal(again.eval()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
print("loaded into the base model again, the adapter gives the same logits")
