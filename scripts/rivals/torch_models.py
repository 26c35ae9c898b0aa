"""The models as a PyTorch user writes them: channels first, layers with their own initial weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from cases import NUM_CLASSES, Case
from torch import Tensor, nn

# Keras' default; PyTorch's is 1e-5.
EPSILON = 1e-3


def build(case: Case) -> nn.Module:
    """The case's model, from [batch, channels, height, width] to logits."""
    return {"mlp": mlp, "cnn": cnn, "transformer": PatchTransformer}[case.model.name](case)


def tensors(case: Case) -> tuple[Tensor, Tensor]:
    """Images channels first and labels, in memory."""
    arrays = case.load()
    x = torch.from_numpy(arrays.train_x).permute(0, 3, 1, 2).contiguous()
    return x, torch.from_numpy(arrays.train_y).long()


def mlp(case: Case) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise([case.features, *case.model.hidden]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(case.model.hidden[-1], NUM_CLASSES))


def cnn(case: Case) -> nn.Sequential:
    options = case.model
    height, width, channels = case.input_shape
    normalized = options.normalization == "batch"
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([channels, *options.filters]):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not normalized))
        if normalized:
            layers.append(nn.BatchNorm2d(outputs, eps=EPSILON))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        height, width = height // 2, width // 2
    layers.append(nn.Flatten())
    if options.dropout:
        layers.append(nn.Dropout(options.dropout))
    return nn.Sequential(*layers, nn.Linear(options.filters[-1] * height * width, NUM_CLASSES))


class PatchTransformer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        options = case.model
        height, width, channels = case.input_shape
        # A convolution whose stride is its size cuts into patches and embeds them.
        self.patches = nn.Conv2d(channels, options.width, options.patch, stride=options.patch, bias=False)
        num_patches = (height // options.patch) * (width // options.patch)
        self.positions = nn.Parameter(torch.randn(num_patches, options.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(options) for _ in range(options.depth)))
        self.normalization = nn.LayerNorm(options.width, eps=EPSILON)
        self.logits = nn.Linear(options.width, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.logits(self.normalization(self.blocks(x)).mean(1))


class Block(nn.Module):
    def __init__(self, options: Any) -> None:
        super().__init__()
        width = options.width
        self.heads = options.heads
        self.attention_normalization = nn.LayerNorm(width, eps=EPSILON)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=EPSILON), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(self.attention_normalization(x))
        return x + self.mlp(x)

    def attended(self, x: Tensor) -> Tensor:
        batch, positions, width = x.shape
        split = self.query_key_value(x).view(batch, positions, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).reshape(batch, positions, width))
