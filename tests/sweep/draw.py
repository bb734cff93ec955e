"""Random weights in which nothing is at its identity, so that whatever is left out or misread changes the features.

What is added to the residual stream is small: variances near 4e-4 let an epsilon of 1e-5 instead of 1e-6 show.
"""
import contextlib
import math
import re
import zlib
from unittest import mock

import timm.layers.weight_init
import torch

# Weights that write into the residual stream, or whose output is normalized at once.
STREAM = re.compile(
    r"patch_embed\w*\.(.*\.)?proj|patch_embeddings?\.?(projection|weight|bias|$)|patch_embedder|visual\.conv1|conv_proj"
    r"|attn\.proj|attn_pool\.proj|o_proj|out_proj|output\.dense|fc2|fc3|c_proj|down_proj|mlp\.w3|weights_out|mlp\.3\."
    r"|downsample|reduction|dwconv|conv_dw|depthwise|pwconv2|features\.0\.0|features\.[246]\.1|block\.[05]\.|stem")
WIDE = re.compile(r"fc1|c_fc|intermediate|up_proj|gate_proj|weights_in|mlp\.w\d|mlp\.0\.|pwconv1|block\.3\.")
MLP_OUT = re.compile(r"fc2|fc3|mlp\.c_proj|down_proj|mlp\.w3|weights_out|mlp\.3\.|pwconv2|block\.5|\d\.output\.dense")
PROBE = re.compile(r"latent|probe|\.query$|queries")
TOKEN = re.compile(r"pos_embed|position|pos_embedding|positional|token|class_embedding|register")
PRE_NORM = re.compile(r"norm_pre|ln_pre|pre_layr?norm")


def seed_of(name):
    return zlib.crc32(name.encode())


@contextlib.contextmanager
def no_init():
    """Leaves out the initialization, which takes longer than all the rest and is drawn over."""
    def keep(tensor, *_, **__):
        return tensor

    names = ("trunc_normal_", "normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_",
             "xavier_normal_")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.nn.init, name, keep))
        stack.enter_context(mock.patch.object(timm.layers.weight_init, "_trunc_normal_", keep))
        yield


@torch.no_grad()
def draw(model, seed):
    """Draws every parameter of `model` anew."""
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        kind = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            mean, std = mean_and_std(full, name, kind, parameter)
            if std is not None:
                parameter.normal_(generator=generator).mul_(std).add_(mean)
    return model.eval().requires_grad_(False)


def mean_and_std(full, name, kind, parameter):
    """Of a parameter called `full` in a module of this kind; a `std` of None leaves it."""
    if "ResponseNorm" in kind or "GRN" in kind.upper():
        return 0.0, 0.5
    if "Norm" in kind:
        # A norm before the blocks makes the stream: it is to stay small as well.
        scale = 0.05 if PRE_NORM.search(full) else 1.0
        return (scale, 0.2 * scale) if "weight" in name else (0.0, 0.1 * scale)
    if re.search(r"gamma|lambda|layer_scale", name):
        return 0.5, 0.2
    if "logit_scale" in name:
        return (2.3, 0.2) if parameter.ndim == 3 else (0.0, None)
    if parameter.ndim == 0 or "logit_bias" in name or "freqs" in name or "inv_freq" in name:
        return 0.0, None
    if "relative_position_bias" in full:
        return 0.0, 0.5
    if PROBE.search(full):
        return 0.0, 1.0
    if name not in ("weight", "bias") and TOKEN.search(full) or kind == "Embedding":
        return 0.0, 0.02
    if parameter.ndim == 1:
        # Units of an MLP that are at one place for all tokens keep the difference of two activations.
        return 0.0, 0.02 if STREAM.search(full) else 1.5 if WIDE.search(full) else 0.3
    gain = 0.06 if MLP_OUT.search(full) else 0.02 if STREAM.search(full) else 1.5
    fan_in = parameter.shape[0] if name in ("proj", "text_projection") else math.prod(parameter.shape[1:])
    return 0.0, gain / math.sqrt(fan_in)


def images(size, seed):
    """Images [1, 3, H, W]."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def facts(model):
    """What the library computes with and a file may not tell, for the report."""
    found = {}
    for module in model.modules():
        for key in ("num_heads", "num_attention_heads", "n_head"):
            if isinstance(getattr(module, key, None), int):
                found.setdefault("heads", getattr(module, key))
        for key in ("act", "activation_fn", "intermediate_act_fn", "act_fn", "gelu", "activation"):
            act = getattr(module, key, None)
            if isinstance(act, torch.nn.Module) and not isinstance(act, torch.nn.Identity):
                found.setdefault("activation", repr(act))
        if "Norm" in type(module).__name__:
            eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)
            if eps is not None:
                found["eps"] = sorted({*found.get("eps", []), eps})
    if hasattr(model, "global_pool"):
        found["pool"] = str(model.global_pool)
    if hasattr(model, "num_prefix_tokens"):
        found["prefix"] = model.num_prefix_tokens
    return found
