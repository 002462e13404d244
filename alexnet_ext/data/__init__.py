"""Images to train on: 5,000 digits from a package, folders of pictures, or synthetic ones."""

from typing import TYPE_CHECKING

from .._command import COMMAND
from .._errors import BadImage, CommandError

if TYPE_CHECKING or not COMMAND:
    from .batches import Batch, batches
    from .digits import Digits
    from .folder import ImageFolder
    from .packed_folder import PackedFolder
    from .preprocessing import Preprocessing
    from .readers import Readers
    from .sources import Split, open_split
    from .synthetic import Synthetic

__all__ = [
    "BadImage",
    "Batch",
    "CommandError",
    "Digits",
    "ImageFolder",
    "PackedFolder",
    "Preprocessing",
    "Readers",
    "Split",
    "Synthetic",
    "batches",
    "open_split",
]
