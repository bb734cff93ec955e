"""torchvision's ViT, Swin and ConvNeXt, as the `.pth` files that it downloads."""
from functools import partial
from unittest import mock

import torch
import torchvision.models as models
from torchvision.models import convnext, swin_transformer, vision_transformer

from case import Case, Made, full_or_cut, write_x
from draw import draw, facts, images, no_init, seed_of

NAMES = {
    "ViT": ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"],
    "Swin": ["swin_t", "swin_s", "swin_b"],
    "Swin V2": ["swin_v2_t", "swin_v2_s", "swin_v2_b"],
    "ConvNeXt": ["convnext_tiny", "convnext_small", "convnext_base", "convnext_large"],
}


def cases():
    return [Case(f"torchvision/{name}", f"torchvision {family}", partial(write, name=name))
            for family, names in NAMES.items() for name in names]


def build(name, depth):
    if depth is None:
        return models.get_model(name)
    if name.startswith("vit"):
        made = vision_transformer.VisionTransformer
        with mock.patch.object(vision_transformer, "VisionTransformer",
                               lambda **given: made(**{**given, "num_layers": depth})):
            return models.get_model(name)
    if name.startswith("swin"):
        made = swin_transformer.SwinTransformer
        with mock.patch.object(swin_transformer, "SwinTransformer",
                               lambda **given: made(**{**given, "depths": [depth] * 4})):
            return models.get_model(name)
    made = convnext.ConvNeXt

    def cut(settings, *args, **given):
        for setting in settings:
            setting.num_layers = min(setting.num_layers, depth)
        return made(settings, *args, **given)

    with mock.patch.object(convnext, "ConvNeXt", cut):
        return models.get_model(name)


def write(folder, options, name):
    with no_init():
        model = full_or_cut(lambda depth: build(name, depth), options)
    draw(model, seed_of(name))
    side = 256 if "v2" in name else 224
    x = images((side, side), seed_of(name))
    head = {"vit": lambda: model.heads, "swi": lambda: model.head, "con": lambda: model.classifier[2]}[name[:3]]()
    seen = []
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    write_x(folder, x, {"y": seen[0].flatten(1)})
    torch.save(model.state_dict(), folder / f"{name}-01234567.pth")
    return Made({"pth": f"{name}-01234567.pth"}, ["y"], facts(model))
