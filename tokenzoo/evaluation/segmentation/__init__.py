"""Scores of segmentation models, and the data that they are computed on."""
