"""timm's CaiT."""
