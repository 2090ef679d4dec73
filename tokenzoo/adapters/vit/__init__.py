"""timm's plain ViTs and the stems that share them."""
