"""timm's LeViT."""
