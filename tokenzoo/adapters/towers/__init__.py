"""Vision towers of multimodal models in timm: encoders with a projector over the grid, and classifiers around them."""
