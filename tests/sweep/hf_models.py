"""Every Hugging Face class of an image tower that people adapt, as the folder that `save_pretrained` makes."""
from functools import partial

import torch
import transformers

from case import Case, Made, full_or_cut, link, write_x
from draw import draw, facts, images, no_init, seed_of

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def vit(width, heads, hidden=None, **more):
    return dict(hidden_size=width, num_attention_heads=heads, intermediate_size=hidden or 4 * width, **more)


def dino(width, heads, **more):
    return dict(hidden_size=width, num_attention_heads=heads, **more)


SMALL, BASE, LARGE, HUGE = vit(384, 6), vit(768, 12), vit(1024, 16), vit(1280, 16)
VIT = {"base": BASE, "base-384": {**BASE, "image_size": 384}, "base-32": {**BASE, "patch_size": 32}, "large": LARGE,
       "huge-14": {**HUGE, "patch_size": 14}, "small": SMALL, "tiny": vit(192, 3),
       "gelu_new": {**BASE, "hidden_act": "gelu_new"}, "relu": {**BASE, "hidden_act": "relu"},
       "quick_gelu": {**BASE, "hidden_act": "quick_gelu"}, "eps-1e-6": {**BASE, "layer_norm_eps": 1e-6},
       "no-qkv-bias": {**BASE, "qkv_bias": False}, "heads-4": vit(768, 4),
       "non-square": {**BASE, "image_size": [224, 160]}}
CLASSIFIER = {"base": BASE, "large": LARGE, "huge-14": {**HUGE, "patch_size": 14},
              "gelu_tanh": {**BASE, "hidden_act": "gelu_pytorch_tanh"}, "heads-4": vit(768, 4)}
DEIT = {"tiny": vit(192, 3), "small": SMALL, "base": BASE, "base-384": {**BASE, "image_size": 384}}
MSN = {"small": SMALL, "base": BASE, "large": LARGE, "base-4": {**BASE, "patch_size": 4, "image_size": 64},
       "large-7": {**LARGE, "patch_size": 7}}
IJEPA = {"huge-14": {**HUGE, "patch_size": 14}, "giant-16": vit(1408, 16, 6144), "base-eps-1e-12": BASE}
IJEPA = {name: {"layer_norm_eps": 1e-12 if name.endswith("12") else 1e-6, **given} for name, given in IJEPA.items()}
MAE = {name: {**given, "mask_ratio": 0.0} for name, given in
       {"base": BASE, "large": LARGE, "huge-14": {**HUGE, "patch_size": 14}}.items()}
DINO2 = {"small": dino(384, 6, image_size=518), "base": dino(768, 12, image_size=518),
         "large": dino(1024, 16, image_size=518), "giant": dino(1536, 24, image_size=518, use_swiglu_ffn=True),
         "base-224": dino(768, 12, image_size=224)}
DINO2 = {name: {**given, "patch_size": 14} for name, given in DINO2.items()}
DINO2_HEAD = {name: DINO2[name] for name in ("small", "base", "giant")}
GATED = dict(use_gated_mlp=True, hidden_act="silu")
DINO3 = {"small": vit(384, 6), "small-plus": vit(384, 6, **GATED), "base": vit(768, 12), "large": vit(1024, 16),
         "huge-plus": vit(1280, 20, **GATED), "7b": vit(4096, 32, 8192, **GATED)}
DINO3 = {name: {"num_register_tokens": 4, "key_bias": False, **given} for name, given in DINO3.items()}
GELU = dict(hidden_act="gelu")
CLIP = {"base-32": vit(768, 12, patch_size=32), "base-16": vit(768, 12, patch_size=16),
        "large-14": vit(1024, 16, patch_size=14), "large-14-336": vit(1024, 16, patch_size=14, image_size=336),
        "laion-base-32": vit(768, 12, patch_size=32, **GELU), "laion-huge-14": vit(1280, 16, patch_size=14, **GELU),
        "laion-giant-14": vit(1408, 16, 6144, patch_size=14, **GELU),
        "laion-bigG-14": vit(1664, 16, 8192, patch_size=14, **GELU)}
CLIP_TWO = {name: CLIP[name] for name in ("base-32", "large-14", "laion-base-32", "laion-huge-14")}
SIGLIP = {"base-16": vit(768, 12, patch_size=16), "base-32-256": vit(768, 12, patch_size=32, image_size=256),
          "large-16-384": vit(1024, 16, patch_size=16, image_size=384),
          "so400m-14": vit(1152, 16, 4304, patch_size=14),
          "so400m-14-384": vit(1152, 16, 4304, patch_size=14, image_size=384),
          "giantopt-16-256": vit(1536, 16, 6144, patch_size=16, image_size=256)}
SIGLIP_TWO = {name: SIGLIP[name] for name in ("base-16", "so400m-14")}
NAFLEX = {"base-16": vit(768, 12, patch_size=16, num_patches=256)}


def swin(width, window=7, image=224, **more):
    return dict(embed_dim=width, num_heads=[width // 32 * 2**stage for stage in range(4)], window_size=window,
                image_size=image, **more)


SWIN = {"tiny": swin(96), "base": swin(128), "base-384": swin(128, 12, 384), "large": swin(192)}
SWIN2 = {"tiny-8-256": swin(96, 8, 256), "tiny-16-256": swin(96, 16, 256), "base-8-256": swin(128, 8, 256),
         "base-12to16-256": swin(128, 16, 256, pretrained_window_sizes=[12, 12, 12, 6])}


def convnext(width, **more):
    return dict(hidden_sizes=[width * 2**stage for stage in range(4)], image_size=224, **more)


CONVNEXT = {"tiny": convnext(96), "base": convnext(128), "large": convnext(192), "xlarge": convnext(256)}
CONVNEXT2 = {"atto": convnext(40), "nano": convnext(80), "tiny": convnext(96), "large": convnext(192),
             "huge": convnext(352)}
BEIT = {"base": {**BASE, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        "large": {**LARGE, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        "shared-bias": {**BASE, "use_shared_relative_position_bias": True},
        "absolute": {**BASE, "use_absolute_position_embeddings": True}}
AIMV2 = {"large-14": vit(1024, 8, 2816, image_size=224, patch_size=14, is_native=False),
         "huge-14": vit(1536, 12, 4096, image_size=224, patch_size=14, is_native=False),
         "large-14-no-head": vit(1024, 8, 2816, image_size=224, patch_size=14, use_head=False),
         "native": vit(1024, 8, 2816, image_size=224, patch_size=14, is_native=True),
         "with-head": vit(1024, 8, 2816, image_size=224, patch_size=14, is_native=False, use_head=True)}

# What the library's own classifier reads; `pooled` is `pooler_output`.
CLASSES = {
    "ViTModel": (VIT, "class"), "ViTForImageClassification": (CLASSIFIER, "head"),
    "DeiTModel": (DEIT, "class"), "DeiTForImageClassification": (DEIT, "head"),
    "DeiTForImageClassificationWithTeacher": (DEIT, "both_heads"),
    "ViTMAEModel": (MAE, "class"), "ViTMAEForPreTraining": (MAE, "class"),
    "ViTMSNModel": (MSN, "class"), "ViTMSNForImageClassification": (MSN, "head"),
    "IJepaModel": (IJEPA, "mean"), "IJepaForImageClassification": (IJEPA, "head"),
    "Dinov2Model": (DINO2, "pooled"), "Dinov2ForImageClassification": (DINO2_HEAD, "head"),
    "Dinov2WithRegistersModel": (DINO2, "pooled"), "Dinov2WithRegistersForImageClassification": (DINO2_HEAD, "head"),
    "DINOv3ViTModel": (DINO3, "pooled"), "DINOv3ConvNextModel": ({"tiny": {}}, "pooled"),
    "CLIPVisionModel": (CLIP, "pooled"), "CLIPVisionModelWithProjection": (CLIP_TWO, "projected"),
    "CLIPModel": (CLIP_TWO, "projected"), "CLIPForImageClassification": (CLIP_TWO, "pooled"),
    "SiglipVisionModel": (SIGLIP, "pooled"), "SiglipModel": (SIGLIP_TWO, "pooled"),
    "SiglipForImageClassification": (SIGLIP_TWO, "head"), "Siglip2VisionModel": (NAFLEX, "pooled"),
    "SwinModel": (SWIN, "pooled"), "SwinForImageClassification": (SWIN, "head"),
    "Swinv2Model": (SWIN2, "pooled"), "Swinv2ForImageClassification": (SWIN2, "head"),
    "ConvNextModel": (CONVNEXT, "pooled"), "ConvNextForImageClassification": (CONVNEXT, "head"),
    "ConvNextV2Model": (CONVNEXT2, "pooled"), "ConvNextV2ForImageClassification": (CONVNEXT2, "head"),
    "BeitModel": (BEIT, "pooled"), "BeitForImageClassification": (BEIT, "head"),
    "Data2VecVisionForImageClassification": ({"base": BEIT["base"]}, "head"),
    "Aimv2VisionModel": (AIMV2, "aimv2"), "Aimv2Model": ({"large-14": AIMV2["large-14"]}, "projected"),
}


def cases():
    return [Case(f"hf/{name}/{size}", f"transformers {name}",
                 partial(write, name=name, given=given, reads=reads))
            for name, (sizes, reads) in CLASSES.items() if hasattr(transformers, name)
            for size, given in sizes.items()]


def build(kind, given, depth):
    config = kind.config_class
    given = dict(given)
    if depth is not None and "hidden_sizes" in given or "Next" in kind.__name__:
        given["depths"] = [depth or 3] * 4
    elif depth is not None and "embed_dim" in given:
        given["depths"] = [depth] * 4
    elif depth is not None:
        given["num_hidden_layers"] = depth
    if "ForImageClassification" in kind.__name__:
        given["num_labels"] = 10
    if hasattr(config, "sub_configs") and "vision_config" in config.sub_configs:
        labels = {key: given.pop(key) for key in ("num_labels",) if key in given}
        text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=1000)
        more = {"projection_dim": 512} if "CLIP" in kind.__name__ else {}
        config = config(vision_config=given, text_config=text, **labels, **more)
    else:
        config = config(**given)
    return kind(config)


def write(folder, options, name, given, reads):
    kind = getattr(transformers, name)
    with no_init():
        model = full_or_cut(lambda depth: build(kind, given, depth), options)
    seed = seed_of(f"{name}{given}")
    draw(model, seed)
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 224)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if name == "Siglip2VisionModel":
        size = (256, 256)
    x = images(size, seed)
    outputs, right = features(model, x, reads)
    write_x(folder, x, outputs)
    model.save_pretrained(folder / "folder")
    sources = {"folder": "folder"}
    if (folder / "folder" / "model.safetensors").exists():
        link(folder / "folder" / "model.safetensors", folder / "bare" / "model.safetensors")
        sources["bare"] = "bare/model.safetensors"
    return Made(sources, right, facts(image_tower(model)))


def image_tower(model):
    name = type(model).__name__
    if "Classification" in name or name == "ViTMAEForPreTraining":
        model = getattr(model, model.base_model_prefix, model)
    return getattr(model, "vision_model", model)


@torch.no_grad()
def features(model, x, reads):
    """The outputs by name, and the names of those that are right."""
    name = type(model).__name__
    if name == "Siglip2VisionModel":
        patch = model.config.patch_size
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        flat = x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1)
        flat = flat.reshape(1, rows * columns, -1)
        out = model(pixel_values=flat, pixel_attention_mask=torch.ones(1, rows * columns, dtype=torch.long),
                    spatial_shapes=torch.tensor([[rows, columns]]))
        return {"pooler_output": out.pooler_output}, ["pooler_output"]
    seen = {}
    for part in ("classifier", "cls_classifier", "distillation_classifier", "visual_projection"):
        if hasattr(model, part):
            hook = lambda _, args, output, part=part: seen.update({part: args[0], part + "_output": output})
            getattr(model, part).register_forward_hook(hook)
    if name in ("CLIPModel", "Aimv2Model"):
        model.get_image_features(pixel_values=x)
        out = model.vision_model(pixel_values=x)
    elif name == "SiglipModel":
        out = model.vision_model(pixel_values=x)
    else:
        if "classifier" in seen or "ForImageClassification" in name or "WithProjection" in name:
            model(pixel_values=x)
        out = image_tower(model)(pixel_values=x)
    tokens = out.last_hidden_state
    outputs = {"pooler_output": getattr(out, "pooler_output", None),
               "class_token": tokens[:, 0] if tokens.ndim == 3 else None,
               "mean_of_all": tokens.mean(1) if tokens.ndim == 3 else None,
               "mean_without_first": tokens[:, 1:].mean(1) if tokens.ndim == 3 else None,
               "classifier_input": seen.get("classifier"), "before_projection": seen.get("visual_projection"),
               "projected": seen.get("visual_projection_output")}
    if reads == "both_heads":
        outputs["both_tokens"] = (seen["cls_classifier"] + seen["distillation_classifier"]) / 2
    if reads == "aimv2":
        reads = "pooled" if outputs["pooler_output"] is not None else "mean"
    right = {"class": ["class_token"], "mean": ["mean_of_all"], "pooled": ["pooler_output"],
             "head": ["classifier_input"], "both_heads": ["both_tokens"],
             "projected": ["projected", "before_projection"]}
    return outputs, right[reads]
