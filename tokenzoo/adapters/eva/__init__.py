"""timm's rotary ViTs."""
