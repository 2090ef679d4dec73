"""Pure tensor operations: rows, attention, linear layers, scan orders, matching, cells; no word of models."""
