"""The model of the stand-in."""

import torch
from torch import nn

from ..layers.attention import MemEffAttention
from ..layers.block import NestedTensorBlock


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, dim):
        super().__init__()
        self.img_size, self.patch_size = (img_size,) * 2, (patch_size,) * 2
        self.patches_resolution = (img_size // patch_size,) * 2
        self.proj, self.norm = nn.Conv2d(3, dim, patch_size, patch_size), nn.Identity()

    def forward(self, x):
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class DinoVisionTransformer(nn.Module):
    def __init__(self, img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_register_tokens=0):
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        self.num_tokens, self.n_blocks, self.num_heads, self.patch_size = 1, depth, num_heads, patch_size
        self.num_register_tokens, self.chunked_blocks = num_register_tokens, False
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        registers = torch.randn(1, num_register_tokens, embed_dim)
        self.register_tokens = nn.Parameter(registers) if num_register_tokens else None
        blocks = [NestedTensorBlock(embed_dim, num_heads, attn_class=MemEffAttention) for _ in range(depth)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(embed_dim, eps=1e-6)
        self.head, self.mask_token = nn.Identity(), nn.Parameter(torch.zeros(1, embed_dim))

    def interpolate_pos_encoding(self, x, w, h):
        return self.pos_embed

    def prepare_tokens_with_masks(self, x, masks=None):
        w, h = x.shape[2:]
        x = self.patch_embed(x)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token, x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.interpolate_pos_encoding(x, w, h)
        if self.register_tokens is not None:
            x = torch.cat((x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)
        return x

    def forward_features(self, x, masks=None):
        x = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        done, first = self.norm(x), 1 + self.num_register_tokens
        names = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm", "masks")
        return dict(zip(names, (done[:, 0], done[:, 1:first], done[:, first:], x, masks)))

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        grid, x, outs = [side // self.patch_size for side in x.shape[2:]], self.prepare_tokens_with_masks(x), []
        for block in self.blocks:
            x = block(x)
            outs.append(self.norm(x) if norm else x)
        outs = outs[-n:] if isinstance(n, int) else [outs[index] for index in n]
        patches = [out[:, 1 + self.num_register_tokens :] for out in outs]
        if reshape:
            patches = [out.transpose(1, 2).unflatten(2, grid) for out in patches]
        return tuple(zip(patches, (out[:, 0] for out in outs))) if return_class_token else tuple(patches)

    def forward(self, *args, is_training=False, **kwargs):
        features = self.forward_features(*args, **kwargs)
        return features if is_training else self.head(features["x_norm_clstoken"])
