"""Cells of the grid: hard and soft assignment, centres, and the way back."""
