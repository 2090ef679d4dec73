"""Vision towers of Hugging Face transformers; imported once a model of that package is met."""

from importlib.metadata import version

if tuple(map(int, version("transformers").split(".")[:2])) < (5, 18):
    raise ImportError(f"transformers {version('transformers')} is older than 5.18, which its families were written for")
