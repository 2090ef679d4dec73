"""Backbone families. An adapter says where the halves of a block are; it never names a method."""
