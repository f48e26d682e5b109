"""A task in several files: ill or not, from one logit of a network with batch norm."""

from .task import Normed

__all__ = ["Normed"]
