"""timm's PiT."""
