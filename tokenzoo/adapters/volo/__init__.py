"""timm's VOLO."""
