"""Vision towers of Hugging Face transformers; imported once a model of that package is met."""
