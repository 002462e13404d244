"""Networks for other programs: ONNX with standard nodes, torch.export, AOTInductor, safetensors."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _library
from ._errors import CommandError, os_error, path_text
from ._optional import missing
from .accelerate import accelerate
from .data.folder import imagenet_preprocessing
from .models import AlexNet, alexnet, load_weights
from .models.weights import find_variant
from .ops import use_backend
from .ops._register import RECORDS

if TYPE_CHECKING:
    from .training import checkpoint


def to_onnx(model: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> None:
    """Write ``model`` as an ONNX file, its weights inside, for any batch size.

    Every ``LocalResponseNorm`` over (N, C, H, W) in fp32 with an odd window and positive ``alpha`` and ``beta`` is one
    ``LRN`` node (PyTorch's own exporter splits it). Any other is Mul, Pad, Slice, Sum and Pow: an even window of ONNX's
    leans to the other side, and onnxruntime's takes no other rank or constants. All other layers are ``Conv``,
    ``Relu``, ``MaxPool`` and ``Gemm`` as in the model, in evaluation.

    Args:
        model: stock, fused or accelerated, on any device; a copy of it on the CPU is exported.
        example: an input; the sizes of all dimensions but the first are fixed.
        path: the file.

    Raises:
        ImportError: onnx and onnxscript are not installed.
        RuntimeError: the compiled CPU library, whose ops become the nodes, is not loaded.
    """
    translations = onnx_translations()
    from ._onnx import OPSET  # onnxscript is installed

    twin = copy.deepcopy(model).cpu().eval()
    accelerate(twin, relu_pool=False, conv_relu=False, fused_block=False)
    with use_backend("auto"):
        exported = _exported(twin, example.cpu())
    program = torch.onnx.export(
        exported, dynamo=True, opset_version=OPSET, custom_translation_table=translations, verbose=False
    )
    assert program is not None
    program.save(os.fspath(path), external_data=False)


def to_torch_export(model: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> None:
    """Write ``model`` with ``torch.export.save``, for any batch size; ``import alexnet_ext`` before it is loaded."""
    # Written to memory first, here and below: PyTorch's writer aborts the process if the disk is full.
    with _evaluating(model), io.BytesIO() as whole:
        torch.export.save(_exported(model, example), whole)
        Path(path).write_bytes(whole.getbuffer())


def to_aoti(model: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> None:
    """Compile ``model`` with AOTInductor into a ``.pt2`` package, for any batch size.

    ``torch._inductor.aoti_load_package(path)`` loads it. That needs torch and this package's compiled library, which
    ``torch.ops.load_library`` loads, but neither this package nor a compiler.
    """
    with _evaluating(model), io.BytesIO() as whole:
        torch._inductor.aoti_compile_and_package(_exported(model, example), package_path=whole)
        Path(path).write_bytes(whole.getbuffer())


def _exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    # A batch of 1 would be taken for a constant.
    example = example if example.shape[0] > 1 else torch.cat([example, example])
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def write(
    kind: str,
    path: Path,
    variant: str | None,
    weights: Path | None,
    warn: Callable[[str], None] = lambda text: None,
    last: bool = False,
) -> None:
    """The work of ``alexnet export``: build a network, load weights, and write it whole or not at all.

    Args:
        kind: ``"onnx"``, ``"torch-export"``, ``"aoti"`` or ``"safetensors"``.
        path: the file to write.
        variant: None takes the one of the weights: a run's own, or the first that a file of others fits.
        weights: a run or checkpoint folder, or a file for ``models.load_weights``; None makes a fresh start.
        warn: called for each damaged checkpoint that was passed over.
        last: of a run its newest checkpoint, not its best.

    Raises CommandError, with one sentence, for an error that the user can fix.
    """
    from .training import checkpoint
    from .training.files import check_target, new_file

    check_target(path, weights)
    if kind in ("torch-export", "aoti") and path.suffix != ".pt2":
        raise CommandError(f"{path_text(path)}: the name of such a file must end in .pt2", 2)
    try:
        if kind == "onnx":
            onnx_translations()
    except (ImportError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    model, description = _network(kind in ("torch-export", "aoti"), variant, weights, warn, last)
    side = model.config.image_size
    example = torch.zeros(2, 3, side, side)
    with new_file(path) as beside:
        if kind == "safetensors":
            checkpoint.write_weights(beside, model, description)
        else:
            {"onnx": to_onnx, "torch-export": to_torch_export, "aoti": to_aoti}[kind](model, example, beside)


def _network(
    fused: bool, variant: str | None, weights: Path | None, warn: Callable[[str], None], last: bool
) -> tuple[AlexNet, checkpoint.Description]:
    from .training import checkpoint

    if weights is not None and (weights.is_dir() or weights.suffix == ".safetensors" or not weights.suffix):
        return checkpoint.load_model(checkpoint.find_weights(weights, warn, last), variant, fused)
    preprocessing = None
    if weights is None:
        model = alexnet(variant or "paper", fused, init="paper")
    else:
        try:
            model = alexnet(variant or find_variant(weights), fused, init="torch")
            preprocessing = load_weights(model, weights)
        except (ValueError, ImportError) as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise os_error(weights, error) from error
    classes = tuple(str(i) for i in range(model.config.num_classes))
    preprocessing = preprocessing or imagenet_preprocessing(model.config.image_size)
    return model, checkpoint.Description(model.config, classes, preprocessing, data="", step=0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """This package's ops as standard ONNX nodes, for the ``custom_translation_table`` of ``torch.onnx.export``.

    Raises ImportError where onnxscript is not installed, RuntimeError where the compiled library is not loaded.
    """
    if not _library.LIBRARIES[0].loaded:
        raise RuntimeError(f"export to ONNX needs the compiled CPU library: {_library.LIBRARIES[0].reason}")
    try:
        from . import _onnx
    except ImportError as error:
        raise missing("onnx and onnxscript", "onnx", "export to ONNX") from error
    translated = [name for name in RECORDS if hasattr(_onnx, name)]
    return {getattr(torch.ops.alexnet_ext, name).default: getattr(_onnx, name) for name in translated}
