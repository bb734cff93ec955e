"""Every open_clip configuration with a ViT, ConvNeXt or Swin of timm or a ViT of its own as the image tower."""
import copy
import logging
from functools import partial
from unittest import mock

import open_clip
import open_clip.timm_model
import timm
import torch
from open_clip.push_to_hf_hub import save_config_for_hf

from case import Case, Made, full_or_cut, link, write_weights, write_x
from draw import draw, facts, images, no_init, seed_of
from timm_models import cut

logging.getLogger().setLevel(logging.ERROR)
TIMM = ("vit_", "eva", "convnext", "swin", "beit", "deit")


def cases():
    found = []
    for name in open_clip.list_models():
        tower = open_clip.get_model_config(name)["vision_cfg"]
        timm_name = tower.get("timm_model_name", "")
        if timm_name.startswith(TIMM) or not timm_name and isinstance(tower["layers"], int):
            family = f"open_clip, {'timm tower' if timm_name else 'its own ViT'}"
            found.append(Case(f"open_clip/{name}", family, partial(write, name=name)))
    return found


def small_text(config, depth):
    """With the image tower cut to `depth`, and a text tower of little size: of the same names, but Hugging Face's ones
    are replaced, because their sizes are not known without the network."""
    config = copy.deepcopy(config)
    text = config["text_cfg"]
    if "hf_model_name" in text:
        config["text_cfg"] = text = {"width": 64, "heads": 1}
        config["custom_text"] = True
    text.update(layers=1, vocab_size=1000)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(layers=1, vocab_size=1000)
    if depth is not None and "timm_model_name" not in config["vision_cfg"]:
        config["vision_cfg"]["layers"] = depth
    return config


def build(name, depth):
    config = small_text(open_clip.get_model_config(name), depth)
    create = timm.create_model

    def cut_model(timm_name, **given):
        return create(timm_name, **given, **cut(timm_name, depth))

    with mock.patch.dict(open_clip.factory._MODEL_CONFIGS, {name: config}), \
            mock.patch.object(open_clip.timm_model.timm, "create_model", cut_model):
        model = open_clip.create_model(name, pretrained=None, load_weights=False)
    return model, config


def write(folder, options, name):
    configs = []

    def kept(depth):
        model, config = build(name, depth)
        configs.append(config)
        return model

    with no_init():
        model = full_or_cut(kept, options)
    draw(model, seed_of(name))
    visual = model.visual
    size = visual.image_size
    x = images(tuple(size) if isinstance(size, (list, tuple)) else (size, size), seed_of(name))
    write_x(folder, x, outputs(visual, x))
    weights = folder / "hub" / "open_clip_pytorch_model.safetensors"
    write_weights(weights, model.state_dict())
    save_config_for_hf(model, folder / "hub" / "open_clip_config.json", configs[-1])
    link(weights, folder / "bare" / weights.name)
    tower = {key: value for key, value in configs[-1]["vision_cfg"].items() if key != "layers"}
    told = {**facts(visual), "tower": tower}
    if configs[-1].get("quick_gelu"):
        told["quick_gelu"] = True
    return Made({"bare": f"bare/{weights.name}", "hub": "hub"}, ["projected", "before_projection"], told)


@torch.no_grad()
def outputs(visual, x):
    def pooled(out):
        return out[0] if isinstance(out, tuple) else out

    projected = pooled(visual(x))
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        before = trunk.forward_head(trunk.forward_features(x), pre_logits=True)
        return {"projected": projected, "before_projection": before}
    if visual.proj is None:
        return {"projected": projected, "before_projection": None}
    projection, visual.proj = visual.proj, None
    before = pooled(visual(x))
    visual.proj = projection
    return {"projected": projected, "before_projection": before}
