"""Every timm entry point of the families that the sweep is about."""
import json
import re
from functools import partial

import timm
import torch
from timm.models._hub import save_config_for_hf

from case import Case, Made, full_or_cut, link, write_weights, write_x
from draw import draw, facts, images, no_init, seed_of

# Module of timm and what its entry points are called in the report.
FAMILIES = {
    "vision_transformer": "VisionTransformer",
    "deit": "VisionTransformer (DeiT)",
    "eva": "Eva",
    "beit": "Beit",
    "swin_transformer": "SwinTransformer",
    "swin_transformer_v2": "SwinTransformerV2",
    "swin_transformer_v2_cr": "SwinTransformerV2Cr",
    "convnext": "ConvNeXt",
}
STAGED = re.compile("swin|convnext")
# All blocks but the first and last ones have half as many heads for keys and values: told by a list, one a block.
SAPIENS_HEADS = {"base": 12, "large": 16, "huge": 16, "giant": 24, "5b": 32}


def cut(name, depth):
    """The arguments that cut an entry point to `depth` blocks, or to as many a stage."""
    if depth is None:
        return {}
    if name.endswith("_sapiens2"):
        heads = SAPIENS_HEADS[name.split("_")[1]]
        return {"depth": depth, "num_kv_heads": (heads, *(depth - 1) * (heads // 2,))}
    return {"depths": (depth,) * 4} if STAGED.search(name) else {"depth": depth}


def cases():
    return [Case(f"timm/{name}", f"timm {family}", partial(write, name=name))
            for module, family in FAMILIES.items() for name in timm.list_models(module=module)]


def image_size(model):
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return tuple(size) if size else tuple(model.pretrained_cfg["input_size"][1:])


def write(folder, options, name):
    with no_init():
        model = full_or_cut(lambda depth: timm.create_model(name, **cut(name, depth)), options)
    draw(model, seed_of(name))
    x = images(image_size(model), seed_of(name))
    with torch.no_grad():
        tokens = model.forward_features(x)
        y = model.forward_head(tokens, pre_logits=True)
    write_x(folder, x, {"y": y, **tokens_by_name(model, tokens)})
    weights = folder / "bare" / "model.safetensors"
    write_weights(weights, model.state_dict())
    link(weights, folder / "hub" / "model.safetensors")
    write_config(model, folder / "hub" / "config.json")
    return Made({"bare": "bare/model.safetensors", "hub": "hub"}, ["y"],
                {**facts(model), "class": type(model).__name__})


def write_config(model, file):
    """As the hub has it: most of its files are older than `model_args`, so that the architecture's name has to do."""
    save_config_for_hf(model, str(file))
    config = json.loads(file.read_text())
    config.pop("model_args", None)
    file.write_text(json.dumps(config, indent=2))


def tokens_by_name(model, tokens):
    """Other outputs, which tell a wrong pooling from another error."""
    if tokens.ndim != 3:
        return {}
    prefix = getattr(model, "num_prefix_tokens", 0)
    return {"first_token": tokens[:, 0] if prefix else None, "mean_of_patches": tokens[:, prefix:].mean(1),
            "mean_of_all": tokens.mean(1)}
