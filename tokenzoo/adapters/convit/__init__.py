"""timm's ConViT."""
