"""The 2012 network and its relatives."""

from ..variants import VARIANTS, AlexNetConfig
from . import summary
from .alexnet import INITS, AlexNet, alexnet, from_torchvision
from .weights import load_weights

__all__ = ["INITS", "VARIANTS", "AlexNet", "AlexNetConfig", "alexnet", "from_torchvision", "load_weights", "summary"]
