"""timm's XCiT."""
