"""timm's image encoders of Segment Anything."""
