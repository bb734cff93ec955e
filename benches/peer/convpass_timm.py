"""Convpass beside timm's ViT, in the order of operations of the published PyTorch code (arXiv 2207.07039).

    x = x + drop_path(attn(norm1(x))) + drop_path(bypass(norm1(x))) * s
    x = x + drop_path(mlp(norm2(x))) + drop_path(bypass(norm2(x))) * s

The norm is computed for each branch, the class token is convolved as a 1x1 image, the patches as [B, h, 14, 14].
"""
import timm
import torch
from timm.layers import DropPath
from torch import nn


class Bypass(nn.Module):
    """[B, 1 + 196, C] -> the same: 1x1 convolution C -> h, 3x3 convolution, dropout, 1x1 convolution h -> C."""

    def __init__(self, dim, h=8, dropout=0.1):
        super().__init__()
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
        patches = self.convolve(x[:, 1:], 14, 14)
        class_token = self.convolve(x[:, :1], 1, 1)
        x = self.quick_gelu(torch.cat([class_token, patches], dim=1))
        return self.adapter_up(self.dropout(x))


class Block(nn.Module):
    """A block of timm's ViT with a bypass beside each sub-layer."""

    def __init__(self, block, drop_path, s=1.0):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        dim = block.norm1.normalized_shape[0]
        self.adapter_attn, self.adapter_mlp = Bypass(dim), Bypass(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.s = s

    def forward(self, x, **_):
        x = x + self.drop_path(self.attn(self.norm1(x))) + self.drop_path(self.adapter_attn(self.norm1(x))) * self.s
        return x + self.drop_path(self.mlp(self.norm2(x))) + self.drop_path(self.adapter_mlp(self.norm2(x))) * self.s


def adapted(drop_path, classes=100):
    """ViT-B/16 with 24 bypasses, of which they and the head are trained."""
    model = timm.create_model("vit_base_patch16_224", num_classes=classes)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    rates = torch.linspace(0, drop_path, len(model.blocks)).tolist()
    model.blocks = nn.Sequential(*(Block(block, rate) for block, rate in zip(model.blocks, rates)))
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "adapter" in name)
    assert trained == 327_552, trained
    return model
