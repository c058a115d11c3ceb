"""Random inputs for a transformers model, from its config and the signature of its forward alone.

Text, images, videos, sound, encoder-decoder models, two towers, and images placed in the text.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_BATCH, _TOKENS, _FRAMES, _SAMPLES, _SIDE = 2, 8, 32, 4000, 64
_IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes")
#: Parameters of a forward that take one number for each token.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def sample_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Random inputs that `model(**inputs)` takes.

    Args:
        model: A transformers model; it runs only if images are placed in its text, to count
            the tokens that an image becomes.

    Returns:
        Inputs by their names, on the model's device: two samples of 8 tokens, an image of the
        config's size, sound of 32 frames (one image where images of any size are packed).
    """
    generator = torch.Generator().manual_seed(1)
    names = inspect.signature(model.forward).parameters
    config, main = model.config, getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Tensor] = {}
    if "pixel_values" in names and _sees_images(model):
        inputs |= _images(model, names, generator)
    for name in ("input_values", "input_features"):
        if name in names and (name == main or _hears_sound_beside_text(config)):
            inputs[name] = _sound(config, name, generator)
    if text := next((name for name in ("input_ids", "inputs") if name in names), None):
        if not {"input_values", "input_features"} & {main}:
            inputs[text] = _text(model, generator)
        if "pixel_values" in inputs and _image_token(config) is not None:
            inputs[text] = _with_image_tokens(model, inputs[text], inputs)
            is_image = (inputs[text] == _image_token(config)).long()
            inputs |= {name: is_image for name in _TOKEN_TYPES if name in names}
    if "bbox" in names:
        inputs["bbox"] = torch.zeros(*inputs[text].shape, 4, dtype=torch.long)
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", True):
        inputs["decoder_input_ids"] = _text(model, generator)
    return {name: _moved(tensor, model) for name, tensor in inputs.items()}


def _moved(tensor: Tensor, model) -> Tensor:
    """The tensor on the model's device, a floating-point one in its dtype."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    return tensor.to(like if tensor.is_floating_point() else like.device)


def _configs(config) -> Iterator:
    """A config and those inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _configs(value)


def _setting(config, *names, default=None) -> Any:
    """The first setting of one of these names that the config, or one inside it, has."""
    for name in names:
        for place in _configs(config):
            if (value := getattr(place, name, None)) is not None:
                return value
    return default


def _image_token(config) -> int | None:
    return getattr(config, "image_token_id", None)


def _sees_images(model) -> bool:
    """Whether images go beside the text, or into it by a function that says how many tokens."""
    return _image_token(model.config) is None or hasattr(model, "get_image_features")


def _needs_image_sizes(model) -> bool:
    """Whether each image comes with a size; some models take sizes and break on them."""
    ask = getattr(model, "get_image_features", None)
    sizes = None if ask is None else inspect.signature(ask).parameters.get("image_sizes")
    return sizes is not None and sizes.default is inspect.Parameter.empty


def _hears_sound_beside_text(config) -> bool:
    """Whether sound goes beside the text; what takes it inside the text is given text alone."""
    inside = ("audio_token_id", "audio_token_index")
    return hasattr(config, "audio_config") and not any(hasattr(config, name) for name in inside)


def _images(model, names, generator) -> dict[str, Tensor]:
    config = model.config
    channels = _setting(config, "num_channels", "in_channels", "in_chans", default=3)
    if "image_grid_thw" in names:
        vision = config.vision_config
        side = 2 * vision.spatial_merge_size
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(side * side, width, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]])}
    size = _setting(config, "image_size", "input_size", default=_SIDE)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    several = getattr(config, "num_frames", None)
    if "pixel_attention_mask" in names and "spatial_shapes" not in names:
        several = 1  # images per sample
    shape = (_BATCH, *([several] if several else []), channels, height, width)
    images = {"pixel_values": torch.randn(shape, generator=generator)}
    if _needs_image_sizes(model):
        images["image_sizes"] = torch.tensor([[height, width]] * _BATCH)
    return images


def _sound(config, name: str, generator) -> Tensor:
    return torch.randn(_BATCH, *_sound_shape(config, name), generator=generator)


def _sound_shape(config, name: str) -> tuple[int, ...]:
    """Samples of a wave, (frames, features), or what a fixed window asks for."""
    mel, longest = _setting(config, "num_mel_bins"), _setting(config, "max_source_positions")
    if name == "input_values" and mel:
        return config.max_length, mel
    if name == "input_values":
        return (_samples(config),)
    if side := _setting(config, "spec_size"):
        return 1, side * (side // mel), mel
    if width := _setting(config, "feature_projection_input_dim"):
        return _FRAMES, width
    if width := _setting(config, "input_feat_per_channel"):
        return _FRAMES, width * config.input_channels
    return (mel, 2 * longest) if longest else (4 * _FRAMES, mel)


def _samples(config) -> int:
    """Samples of a wave that become a few frames in the model's convolutions."""
    kernels = _setting(config, "conv_kernel")
    if kernels is None:
        return _SAMPLES
    length = _FRAMES
    for kernel, stride in zip(reversed(kernels), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel
    return length


def _text(model, generator) -> Tensor:
    """Random token ids, none of them special."""
    config = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text_config, "vocab_size", None) or 2
    special = set()
    for place in _configs(config):
        for name, value in vars(place).items():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                special |= set(value) if isinstance(value, list | tuple) else {value}
    usual = torch.tensor([i for i in range(min(vocabulary, 1000)) if i not in special])
    return usual[torch.randint(len(usual), (_BATCH, _TOKENS), generator=generator)]


def _with_image_tokens(model, ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The ids with as many image tokens in each row as the model makes of an image."""
    images = {name: _moved(inputs[name], model) for name in _IMAGE_INPUTS if name in inputs}
    with torch.no_grad():
        features = model.get_image_features(**images)
    features = getattr(features, "pooler_output", features)
    features = [features] if isinstance(features, Tensor) else list(features)
    rows = 1 if "image_grid_thw" in images else len(ids)
    count = sum(f.numel() // f.shape[-1] for f in features) // rows
    start = getattr(model.config, "vision_start_token_id", None)
    place = [start] * (start is not None) + [_image_token(model.config)] * count
    marks = torch.tensor(place).expand(rows, -1)
    return torch.cat([ids[:rows, :2], marks, ids[:rows, 2:]], dim=1)
