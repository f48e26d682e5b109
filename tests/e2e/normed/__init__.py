"""A task in more than one file: ill or not, by one logit of a network with batch norm."""

from .task import Normed

__all__ = ["Normed"]
