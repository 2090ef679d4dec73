"""SViT, stage by stage."""
