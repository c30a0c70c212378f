"""Vision transformers (Dosovitskiy et al., ICLR 2021), with timm's parameter names, so that its state dicts load unchanged.

`vit_tiny` has the size of DeiT-tiny (Touvron et al., ICML 2021). Attention is written as matrix products and softmax, so that
the exported graph has only these operators: softmax(q kᵀ / √d) v for q, k, v ∈ R^{N×d} of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens."""
        tokens, dim = x.shape[1:]
        q, k, v = (
            part.reshape(-1, tokens, self.heads, dim // self.heads).transpose(1, 2)  # (B, heads, N, d)
            for part in self.qkv(x).split(dim, dim=-1)
        )
        attention = torch.softmax(torch.matmul(q * self.scale, k.transpose(-2, -1)), dim=-1)
        mixed = torch.matmul(attention, v).transpose(1, 2).reshape(-1, tokens, dim)
        out: Tensor = self.proj(mixed)
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to each token: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens."""
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block, attention and MLP, each with a shortcut: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbedding(nn.Module):
    """Embed each square patch of an image as a token: (B, channels, S, S) → (B, (S / patch)², D)."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, row by row."""
        return torch.flatten(self.proj(x), 2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patches, a class token, `depth` blocks and a linear head: (B, channels, size, size) → (B, classes).

    Raises `ValueError` if `size` is not a multiple of `patch`, or `dim` is not a multiple of `heads`.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 1000,
        size: int = 224,
        patch: int = 16,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"VisionTransformer: expected size to be a multiple of patch={patch}, got size={size}")
        if dim % heads:
            raise ValueError(f"VisionTransformer: expected dim to be a multiple of heads={heads}, got dim={dim}")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, dim))
        self.patch_embed = PatchEmbedding(channels, dim, patch)
        self.blocks = nn.Sequential(*(Block(dim, heads, expansion * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores, computed from the class token."""
        patches = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        scores: Tensor = self.head(x[:, 0])
        return scores


def vit_tiny(
    channels: int = 3, classes: int = 1000, size: int = 224, patch: int = 16, dim: int = 192, depth: int = 12, heads: int = 3
) -> VisionTransformer:
    """Return a vision transformer with the sizes of DeiT-tiny as defaults."""
    return VisionTransformer(channels, classes, size, patch, dim, depth, heads)
