"""What a model costs: by formula, and by tracing."""
