"""Public paths of version 0.1 whose modules have moved: `tokenzoo.tokens` is `tokenzoo.core.tokens`, and so on."""
