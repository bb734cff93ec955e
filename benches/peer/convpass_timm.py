"""Convpass beside timm's ViT, in the order of operations of the published PyTorch code (arXiv 2207.07039).

    x = x + drop_path(attn(norm1(x))) + drop_path(bypass(norm1(x))) * s
    x = x + drop_path(mlp(norm2(x))) + drop_path(bypass(norm2(x))) * s

The norm is computed for each branch, the class token is convolved as a 1x1 image, the patches as [B, h, 14, 14].
Models that the paper does not have are adapted in the same way: each register token is a 1x1 image as well, and layer
scale acts on attn and mlp alone.
"""
import timm
import torch
from timm.layers import DropPath
from torch import nn


class Bypass(nn.Module):
    """[B, P + N, C] -> the same: 1x1 convolution C -> h, 3x3 convolution, dropout, 1x1 convolution h -> C.

    P is the number of prefix tokens, N = rows * columns that of patches.
    """

    def __init__(self, dim, h=8, dropout=0.1, prefix=1, grid=(14, 14)):
        super().__init__()
        self.prefix, self.grid = prefix, grid
        self.adapter_down = nn.Linear(dim, h)
        self.adapter_conv = nn.Conv2d(h, h, 3, padding=1)
        self.adapter_up = nn.Linear(h, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.adapter_down.weight)
        nn.init.zeros_(self.adapter_conv.weight)
        self.adapter_conv.weight.data[:, :, 1, 1] = torch.eye(h)
        nn.init.zeros_(self.adapter_up.weight)
        for layer in (self.adapter_down, self.adapter_conv, self.adapter_up):
            nn.init.zeros_(layer.bias)

    @staticmethod
    def quick_gelu(x):
        return x * torch.sigmoid(1.702 * x)

    def convolve(self, tokens, rows, columns):
        batch, count, h = tokens.shape
        image = tokens.reshape(batch, rows, columns, h).permute(0, 3, 1, 2)
        return self.adapter_conv(image).permute(0, 2, 3, 1).reshape(batch, count, h)

    def forward(self, tokens):
        x = self.quick_gelu(self.adapter_down(tokens))
        hidden = self.convolve(x[:, self.prefix:], *self.grid)
        if self.prefix > 0:
            batch, h = len(x), x.shape[2]
            tokens = x[:, :self.prefix].reshape(batch * self.prefix, 1, h)
            tokens = self.convolve(tokens, 1, 1).reshape(batch, self.prefix, h)
            hidden = torch.cat([tokens, hidden], dim=1)
        return self.adapter_up(self.dropout(self.quick_gelu(hidden)))


class ChannelScale(nn.Module):
    """The layer scale of timm's EvaBlock, which keeps it as a bare parameter."""

    def __init__(self, gamma):
        super().__init__()
        self.gamma = gamma

    def forward(self, x):
        return self.gamma * x


class Block(nn.Module):
    """A block of timm's ViT, or of its Eva without gated attention, with a bypass beside each sub-layer."""

    def __init__(self, block, drop_path, bypasses, s=1.0):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        if hasattr(block, "ls1"):
            self.scale1, self.scale2 = block.ls1, block.ls2
        else:
            self.scale1, self.scale2 = ChannelScale(block.gamma_1), ChannelScale(block.gamma_2)
        self.adapter_attn, self.adapter_mlp = bypasses
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.s = s

    def forward(self, x, rope=None, **_):
        rotary = {} if rope is None else {"rope": rope}
        attended = self.scale1(self.attn(self.norm1(x), **rotary))
        x = x + self.drop_path(attended) + self.drop_path(self.adapter_attn(self.norm1(x))) * self.s
        mixed = self.scale2(self.mlp(self.norm2(x)))
        return x + self.drop_path(mixed) + self.drop_path(self.adapter_mlp(self.norm2(x))) * self.s


def plain(name="vit_base_patch16_224", classes=100, image_size=None):
    """timm's model with random weights; images are as large as its name says without `image_size`."""
    size = {} if image_size is None else {"img_size": image_size}
    return timm.create_model(name, num_classes=classes, **size)


def adapted(drop_path, name="vit_base_patch16_224", classes=100, image_size=None):
    """A ViT-B/16 with 24 bypasses, of which they and the head are trained."""
    model = plain(name, classes, image_size)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    bypass = lambda: Bypass(model.embed_dim, prefix=model.num_prefix_tokens, grid=model.patch_embed.grid_size)
    rates = torch.linspace(0, drop_path, len(model.blocks)).tolist()
    model.blocks = nn.Sequential(*(Block(block, rate, (bypass(), bypass())) for block, rate in zip(model.blocks, rates)))
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "adapter" in name)
    assert trained == 327_552, trained
    return model
