"""Tiny random models of transformers' architectures: one class and the settings of its config each.

Hidden sizes of 16 to 32, one or two layers, a vocabulary of 64: a forward takes milliseconds.
"""

import copy

import torch
import transformers

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SPECIAL}
_BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_SPECIAL}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_MAMBA = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, **_SPECIAL}
_MAMBA2_LAYERS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4}
_DEBERTA = {
    **_TEXT,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
}
_T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    **_SPECIAL,
}
_BART = {**_SEQ2SEQ, "max_position_embeddings": 64}
_WHISPER = {**_SEQ2SEQ, "num_mel_bins": 8, "max_target_positions": 32}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_ONE_LAYER = {"num_hidden_layers": 1}
_TOWERS = {"text_config": {**_TEXT, **_ONE_LAYER}, "vision_config": {**_VISION, **_ONE_LAYER}}
_SWIN = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 2,
}
_PYRAMID = {
    "image_size": 32,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
}
_DETR = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 8, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 4,
}
_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    **_SPECIAL,
}
_XVECTOR = {
    **_SPEECH,
    "tdnn_dim": (16, 16, 24),
    "tdnn_kernel": (3, 2, 1),
    "tdnn_dilation": (1, 1, 1),
    "xvector_output_dim": 16,
}
_IMAGE_TOKEN = {"image_token_id": 60, "image_token_index": 60}

DECODERS = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _HEAD_DIM),
    "gemma": ("GemmaForCausalLM", _HEAD_DIM),
    "gemma2": ("Gemma2ForCausalLM", _HEAD_DIM),
    "gemma3_text": ("Gemma3ForCausalLM", _HEAD_DIM),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        {
            **_HEAD_DIM,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "layer_types": ["full_attention", "sliding_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "phi": ("PhiForCausalLM", _GROUPED),
    "phi3": ("Phi3ForCausalLM", _GROUPED),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", _GPT2),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "window_size": 8,
            **_SPECIAL,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT),
    "gptj": ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", {**_GPT2, "n_ctx": 64, "rotary_dim": 4}),
    "opt": ("OPTForCausalLM", {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "bloom": ("BloomForCausalLM", _BLOOM),
    "bloom, slow but exact": (
        "BloomForCausalLM",
        {**_BLOOM, "slow_but_exact": True, "pretraining_tp": 2},
    ),
    "falcon": ("FalconForCausalLM", _TEXT),
    "mpt": (
        "MptForCausalLM",
        {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "stablelm": ("StableLmForCausalLM", _GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", _GROUPED),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED),
    "cohere": ("CohereForCausalLM", _GROUPED),
    "granite": ("GraniteForCausalLM", _GROUPED),
    "biogpt": ("BioGptForCausalLM", _TEXT),
    "glm": ("GlmForCausalLM", _HEAD_DIM),
    "xglm": (
        "XGLMForCausalLM",
        {
            "vocab_size": 64,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
            **_SPECIAL,
        },
    ),
}
EXPERTS = {
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, **_LOCAL_MOE}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**_GROUPED, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_HEAD_DIM, **_MOE, "num_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssForCausalLM", {**_HEAD_DIM, **_LOCAL_MOE}),
    "granitemoe": ("GraniteMoeForCausalLM", {**_GROUPED, **_LOCAL_MOE}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **_TEXT,
            **_MOE,
            **_LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        {
            **_LATENT,
            **_SPECIAL,
            "vocab_size": 64,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "num_layers": 1,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "n_routed_experts": 4,
            "num_local_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "head_dim": 8,
        },
    ),
    "phimoe": ("PhimoeForCausalLM", {**_GROUPED, **_LOCAL_MOE}),
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            **_HEAD_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
        },
    ),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            **_T5,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 8,
        },
    ),
}
STATE_SPACE = {
    "mamba": ("MambaForCausalLM", {**_MAMBA, "time_step_rank": 4}),
    "falcon_mamba": ("FalconMambaForCausalLM", {**_MAMBA, "time_step_rank": 4}),
    "mamba2": (
        "Mamba2ForCausalLM",
        {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    ),
    "jamba": (
        "JambaForCausalLM",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("BambaForCausalLM", {**_GROUPED, **_MAMBA2_LAYERS, "attn_layer_indices": [1]}),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {**_HEAD_DIM, **_MAMBA2_LAYERS, "mamba_d_ssm": 64, "num_logits_to_keep": 0},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {**_GROUPED, "lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    ),
    "lfm2": ("Lfm2ForCausalLM", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            **_HEAD_DIM,
            **_MOE,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    # It rescales its weights in evaluation, later layers more; here from the second layer on.
    "rwkv": (
        "RwkvForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "context_length": 64,
            "rescale_every": 1,
            **_SPECIAL,
        },
    ),
}
ENCODERS = {
    "bert": ("BertForSequenceClassification", _TEXT),
    "roberta": ("RobertaForMaskedLM", _TEXT),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "electra": ("ElectraForPreTraining", {**_TEXT, "embedding_size": 16}),
    "deberta": ("DebertaForMaskedLM", _DEBERTA),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        {**_DEBERTA, "position_buckets": 8, "share_att_key": True},
    ),
    "albert": ("AlbertForMaskedLM", {**_TEXT, "embedding_size": 16}),
    "mpnet": ("MPNetForMaskedLM", _TEXT),
    "modernbert": ("ModernBertForMaskedLM", {**_TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "fnet": ("FNetForMaskedLM", _TEXT),
    "esm": ("EsmForMaskedLM", {**_TEXT, "mask_token_id": 3}),
    "longformer": ("LongformerForMaskedLM", {**_TEXT, "attention_window": 4}),
    "mobilebert": (
        "MobileBertForMaskedLM",
        {
            **_TEXT,
            "embedding_size": 16,
            "true_hidden_size": 16,
            "intra_bottleneck_size": 16,
            "num_feedforward_networks": 2,
        },
    ),
    "layoutlmv3": (
        "LayoutLMv3Model",
        {
            **_TEXT,
            "coordinate_size": 5,
            "shape_size": 6,
            "input_size": 16,
            "patch_size": 8,
            "max_2d_position_embeddings": 64,
        },
    ),
    "neomme": ("NeoMMEForMaskedLM", {**_TEXT, "embedding_rank": 16}),
    "perceiver": (
        "PerceiverForMaskedLM",
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_latents": 32,
            "num_latents": 4,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "max_position_embeddings": 16,
        },
    ),
}
ENCODER_DECODERS = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "mt5": ("MT5ForConditionalGeneration", _T5),
    "bart": ("BartForConditionalGeneration", _BART),
    "mbart": ("MBartForConditionalGeneration", _BART),
    "marian": ("MarianMTModel", _BART),
    "pegasus": ("PegasusForConditionalGeneration", _BART),
    "whisper": ("WhisperForConditionalGeneration", {**_WHISPER, "max_source_positions": 10}),
    "speech_to_text": (
        "Speech2TextForConditionalGeneration",
        {**_WHISPER, "input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 32},
    ),
}
VISION = {
    "vit": ("ViTForImageClassification", _VISION),
    "deit": ("DeiTForImageClassificationWithTeacher", _VISION),
    "beit": ("BeitForImageClassification", {**_VISION, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", {**_VISION, "mlp_ratio": 2}),
    "swin": ("SwinForImageClassification", _SWIN),
    "convnext": (
        "ConvNextForImageClassification",
        {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {**_PYRAMID, "num_encoder_blocks": 4, "decoder_hidden_size": 16},
    ),
    "videomae": ("VideoMAEForVideoClassification", {**_VISION, "num_frames": 2}),
    "detr": ("DetrForSegmentation", _DETR),
    "conditional_detr": ("ConditionalDetrForSegmentation", _DETR),
}
SOUND = {
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH),
    "wav2vec2, x-vector": ("Wav2Vec2ForXVector", _XVECTOR),
    "hubert": ("HubertForCTC", _SPEECH),
    "wavlm": ("WavLMForCTC", _SPEECH),
    "sew": ("SEWForCTC", {**_SPEECH, "squeeze_factor": 2}),
    "audio-spectrogram-transformer": (
        "ASTForAudioClassification",
        {
            **_VISION,
            "patch_size": 4,
            "frequency_stride": 4,
            "time_stride": 4,
            "max_length": 16,
            "num_mel_bins": 8,
        },
    ),
}
MULTIMODAL = {
    "clip": ("CLIPModel", {**_TOWERS, "projection_dim": 16}),
    "siglip": ("SiglipModel", _TOWERS),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_GROUPED, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "vision_feature_layer": -1,
            **_IMAGE_TOKEN,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_HEAD_DIM, "model_type": "gemma3_text"},
            "vision_config": {**_VISION, "model_type": "siglip_vision_model", "image_size": 32},
            "mm_tokens_per_image": 4,
            **_IMAGE_TOKEN,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **_GROUPED,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [1, 1, 2],
                    "rope_theta": 10000.0,
                },
            },
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "patch_size": 8,
                "mlp_ratio": 2,
            },
            "video_token_id": 61,
            "vision_start_token_id": 62,
            **_IMAGE_TOKEN,
        },
    ),
}
#: Architecture -> the name of the model's class and the settings of its config.
ARCHITECTURES = {
    **DECODERS,
    **EXPERTS,
    **STATE_SPACE,
    **ENCODERS,
    **ENCODER_DECODERS,
    **VISION,
    **SOUND,
    **MULTIMODAL,
}


def tiny(architecture: str) -> torch.nn.Module:
    """The tiny model of an architecture, in evaluation, always with the same random weights."""
    name, settings = ARCHITECTURES[architecture]
    model_type = getattr(transformers, name)
    torch.manual_seed(0)
    return model_type(model_type.config_class(**copy.deepcopy(settings))).eval()
