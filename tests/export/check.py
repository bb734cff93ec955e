"""Checks exported models by the programs that they are for: onnxruntime, timm and transformers.

Versions: torch 2.13, onnx 1.23, onnxruntime 1.32, timm 1.0.31, transformers 5.24. It is run by hand:

    CONVPASS_EXPORT_CASES=FOLDER cargo test --features testing --test integration \
        export::cases_are_written
    python tests/export/check.py FOLDER

A case is a folder with the images, the logits and the features of a model (random weights), the
model as ONNX, and its merged weights under the names of each class that computes the same. A
difference is the largest one of the batch, divided by the largest logit or feature.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from functools import partial

import numpy
import onnx
import onnxruntime
import timm.layers
import timm.models.deit
import timm.models.eva
import timm.models.vision_transformer
import torch
import transformers
from safetensors.torch import load_file

TOLERANCE = 1e-4
POOLS = {
    "class_token": "token",
    "class_and_distillation": "token",
    "average": "avg",
    "average_then_norm": "avg",
    "attention": "map",
}
ACTIVATIONS = {
    "gelu": ("gelu", "gelu"),
    "gelu_tanh": ("gelu_tanh", "gelu_pytorch_tanh"),
    "quick_gelu": ("quick_gelu", "quick_gelu"),
    "swi_glu": ("silu", "gelu"),
}


def gap(found, expected):
    found, expected = numpy.asarray(found), numpy.asarray(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(numpy.abs(found - expected).max() / numpy.abs(expected).max())


def check_onnx(path, images, expected):
    """Batches of one and of all images, with the optimizations of the runtime and without them."""
    onnx.checker.check_model(str(path), full_check=True)
    worst = 0.0
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        for count in (1, len(images)):
            (found,) = session.run(None, {"images": images[:count]})
            worst = max(worst, gap(found, expected[:count]))
    return worst


def timm_model(name, config, classes):
    """The class of timm with the settings of the backbone."""
    norm = partial(timm.layers.LayerNorm, eps=config["norm_eps"])
    act, _ = ACTIVATIONS[config["activation"]]
    common = {
        "img_size": tuple(config["image_size"]),
        "patch_size": config["patch_size"],
        "embed_dim": config["embed_dim"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "num_classes": classes,
        "global_pool": POOLS[config["pooling"]],
        "qkv_bias": config["qkv_bias"],
        "norm_layer": norm,
    }
    gated = config["activation"] == "swi_glu"
    hidden = config["mlp_dim"] * (2 if gated else 1)
    if name == "Eva":
        return timm.models.eva.Eva(
            **common,
            mlp_ratio=config["mlp_dim"] / config["embed_dim"],
            swiglu_mlp=gated,
            swiglu_align_to=8,
            init_values=1e-5,
            class_token=True,
            num_reg_tokens=config["num_registers"],
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_temperature=100,
            rope_rotate_half=True,
            use_fc_norm=False,
        )
    common |= {
        "mlp_ratio": hidden / config["embed_dim"],
        "act_layer": act,
        "init_values": 1e-5 if config["layer_scale"] else None,
        "pre_norm": config["pre_norm"],
    }
    if gated:
        common["mlp_layer"] = timm.layers.SwiGLUPacked
    if name == "VisionTransformerDistilled":
        return timm.models.deit.VisionTransformerDistilled(**common)
    prefix = config["num_registers"] + config["class_token"]
    return timm.models.vision_transformer.VisionTransformer(
        **common,
        class_token=config["class_token"],
        reg_tokens=config["num_registers"],
        no_embed_class=config["pos_embed_prefix"] != prefix,
        fc_norm=config["pooling"] == "average_then_norm",
    )


def transformers_config(name, config, classes):
    """The config of the class of transformers with the settings of the backbone."""
    _, act = ACTIVATIONS[config["activation"]]
    size = config["image_size"]
    common = {
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "hidden_act": act,
        "layer_norm_eps": config["norm_eps"],
        "image_size": size if size[0] != size[1] else size[0],
        "patch_size": config["patch_size"],
        "num_labels": classes,
    }
    width = {"intermediate_size": config["mlp_dim"]}
    registers = {"num_register_tokens": config["num_registers"]}
    gated = config["activation"] == "swi_glu"
    ratio = 4 if gated else config["mlp_dim"] // config["embed_dim"]
    dinov2 = {"mlp_ratio": ratio, "use_swiglu_ffn": gated}
    if name.startswith("Dinov2WithRegisters"):
        return transformers.Dinov2WithRegistersConfig(**common, **dinov2, **registers)
    if name.startswith("Dinov2"):
        return transformers.Dinov2Config(**common, **dinov2)
    if name.startswith("DINOv3"):
        act = {"hidden_act": "silu"} if gated else {}
        return transformers.DINOv3ViTConfig(
            **common | act, **width, **registers, use_gated_mlp=gated
        )
    if name.startswith("CLIP"):
        return transformers.CLIPVisionConfig(**common, **width)
    if name == "SiglipForImageClassification":
        labels = {"num_labels": common.pop("num_labels")}
        return transformers.SiglipConfig(vision_config=common | width, **labels)
    if name.startswith("Siglip"):
        return transformers.SiglipVisionConfig(**common, **width)
    return transformers.ViTConfig(**common, **width)


def transformers_output(folder, path, case, with_head, images):
    """Loads the file as a user does, and returns the logits or the features."""
    config, name = case["config"], case["class"]
    with tempfile.TemporaryDirectory() as loaded:
        loaded = pathlib.Path(loaded)
        transformers_config(name, config, case["classes"]).save_pretrained(loaded)
        (loaded / "model.safetensors").write_bytes(path.read_bytes())
        arguments = {"add_pooling_layer": False} if name == "ViTModel" else {}
        model, info = getattr(transformers, name).from_pretrained(
            loaded, output_loading_info=True, **arguments
        )
    left = {kind: names for kind, names in info.items() if names}
    assert not left, (name, left)
    output = model.eval()(pixel_values=images)
    if with_head:
        return output.logits
    prefix = config["num_registers"] + config["class_token"]
    tokens = output.last_hidden_state
    if name.startswith("CLIP") or config["pooling"] == "attention":
        return output.pooler_output
    mean = tokens[:, prefix:].mean(dim=1)
    return {
        "class_token": tokens[:, 0],
        "average": mean,
        "class_token_and_average": torch.cat([tokens[:, 0], mean], dim=1),
    }[config["pooling"]]


def check_merged(folder, case, merged, images, expected):
    path = folder / merged["file"]
    case = case | {"class": merged["class"]}
    with_head = merged["with_head"]
    with torch.no_grad():
        if merged["library"] == "timm":
            model = timm_model(merged["class"], case["config"], case["classes"] * with_head)
            model.load_state_dict(load_file(path), strict=True)
            found = model.eval()(images)
        else:
            found = transformers_output(folder, path, case, with_head, images)
    return gap(found, expected["logits" if with_head else "features"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    worst, lines = {}, 0
    for path in sorted(parser.parse_args().folder.glob("*/case.json")):
        folder, case = path.parent, json.loads(path.read_text())
        for field, default in (("rotary", None), ("attention_pool", None)):
            case["config"].setdefault(field, default)
        expected = load_file(folder / "expected.safetensors")
        images = expected["images"]
        found = []
        for output in ("logits", "features"):
            result = check_onnx(folder / f"{output}.onnx", images.numpy(), expected[output])
            found.append((f"onnxruntime {output}", result))
        for merged in case["merged"]:
            result = check_merged(folder, case, merged, images, expected)
            found.append((f"{merged['library']} {merged['class']}", result))
        for what, result in found:
            print(f"{folder.name:40} {what:55} {result:.1e}")
            kind = what.split()[0]
            worst[kind] = max(worst.get(kind, 0.0), result)
            lines += 1
    print(f"{lines} comparisons, the largest difference of each kind:", worst)
    sys.exit(not lines or max(worst.values()) > TOLERANCE)


if __name__ == "__main__":
    main()
