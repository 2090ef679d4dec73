"""timm's naflexvit.py: images of any size, and batches of patches whose images have grids of their own."""
