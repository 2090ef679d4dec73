"""Models that scan their tokens: Vision Mamba and PlainMamba."""
