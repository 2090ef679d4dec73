"""A local page on which one's own photograph loses tokens: `tokenzoo serve`, extra `serve`."""

from .app import create_app
from .models import Shelf, Shown

__all__ = ["Shelf", "Shown", "create_app"]
