"""timm's CrossViT."""
