"""METER-shaped fusion models: two towers, and a stack of co-attention layers for each stream.

Dou et al., "An Empirical Study of Training End-to-End Vision-and-Language Transformers", arXiv
2111.02387; the teacher of DCD (arXiv 2207.01426).
"""

from crosstill.teachers.meter.model import RECORD, Meter
from crosstill.teachers.meter.stack import CoAttention, Shape

__all__ = ["RECORD", "CoAttention", "Meter", "Shape"]
