"""Putting a recipe onto a model, solving its strength, changing it, exporting the result."""
