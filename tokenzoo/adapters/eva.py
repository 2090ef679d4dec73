"""placeholder until the family is written"""
from .family import Family

FAMILY = Family("eva", "timm eva.py", {}, {}, lambda model: None, lambda block: None)
