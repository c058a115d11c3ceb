"""Save an adapter, load it in Hugging Face PEFT, and compare the logits."""

import tempfile

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from bridge.peft import LoRA, load_adapter, save_adapter

config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def base() -> LlamaForCausalLM:
    """The same random model each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


ids = torch.arange(12)[None]
model = LoRA(target_modules=["q_proj", "v_proj"], dim=4)(base())
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_b" in name:  # as if it had been trained
            parameter.normal_(std=0.02)
    ours = model(input_ids=ids).logits
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, directory)
        theirs = PeftModel.from_pretrained(base(), directory)(input_ids=ids).logits
        again = load_adapter(base(), directory)(input_ids=ids).logits

print(f"largest difference to PEFT: {(ours - theirs).abs().max():.1e}")
print(f"largest difference after loading here: {(ours - again).abs().max():.1e}")
assert (ours - theirs).abs().max() < 1e-5 and torch.equal(ours, again)
