"""The 2012 network and its relatives."""

from . import summary
from .alexnet import INITS, VARIANTS, AlexNet, AlexNetConfig, alexnet, from_torchvision

__all__ = ["INITS", "VARIANTS", "AlexNet", "AlexNetConfig", "alexnet", "from_torchvision", "summary"]
