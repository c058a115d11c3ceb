"""Small random transformers models, one per architecture, for the tests."""

import torch
import transformers


def _small(**more):
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **more,
    }


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_small(**more)))


def qwen2(**more):
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_small(**more)))


def mixtral(**more):
    config = transformers.MixtralConfig(**_small(num_local_experts=4, **more))
    return transformers.MixtralForCausalLM(config)


def gpt2(**more):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **more
    )
    return transformers.GPT2LMHeadModel(config)


def bert(**more):
    settings = _small(**more)
    del settings["num_key_value_heads"]
    return transformers.BertForSequenceClassification(transformers.BertConfig(**settings))


def t5(**more):
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, **more
    )
    return transformers.T5ForConditionalGeneration(config)


ALL = {"llama": llama, "qwen2": qwen2, "bert": bert, "t5": t5, "mixtral": mixtral}


def inputs(model, batch=2, length=7):
    """A batch of token ids that `model(**inputs)` takes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (batch, length), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def train_a_little(model, steps=3):
    """Move A and B away from their start with real gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs(model)).logits.float().pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
