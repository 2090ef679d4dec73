"""timm's Hiera."""
