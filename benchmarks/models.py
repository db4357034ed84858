"""The models that the benchmarks measure: training form, random parameters of ordinary size, as ONNX files.

Files are kept in ``build/bench`` and made once.
"""

import argparse
import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from fastvit_zoo import create_model, list_models
from reparamc.testing import randomize_batchnorm, randomize_layer_scales

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "bench"

ZOO = list_models()
TIMM = ["fastvit_t8", "fastvit_sa12", "mobileone_s0", "repvgg_a0", "repvit_m0_9"]
ALL = [*ZOO, *(f"timm/{name}" for name in TIMM)]
SEED = 0


def names(description: str, default: list[str]) -> argparse.ArgumentParser:
    """A command line that takes names of models."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=default, help=f"default: {' '.join(default)}")
    return parser


def build(name: str) -> nn.Module:
    """The model ``name`` in evaluation mode, with BatchNorm statistics that fit and layer scales near 0.5."""
    torch.manual_seed(SEED)
    model = _create(name)
    randomize_layer_scales(model, SEED)
    size = 224 if "levit" in name or "/vit" in name else 96  # these know one size
    randomize_batchnorm(model, SEED, torch.randn(8, 3, size, size))
    return model.eval()


def _create(name: str) -> nn.Module:
    if name.startswith("timm/"):
        return timm().create_model(name.removeprefix("timm/"), pretrained=False)
    if name.startswith("torchvision/"):
        import fastvit_zoo.torchvision_operators  # noqa: F401

        models = importlib.import_module("torchvision.models")
        options = {"weights_backbone": None} if "deeplab" in name else {}
        return models.get_model(name.removeprefix("torchvision/"), weights=None, **options)
    return create_model(name)


def size(name: str) -> int:
    return 256 if "fastvit" in name else 512 if "deeplab" in name else 224


def onnx_file(name: str) -> Path:
    """The training form of ``name`` as an ONNX file for one image."""
    path = FOLDER / f"{name.replace('/', '_')}.onnx"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                build(name),
                (torch.zeros(1, 3, size(name), size(name)),),
                str(path),
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,  # this and the next line keep every BatchNorm
                do_constant_folding=False,
                opset_version=17,
            )
    return path


def timm() -> ModuleType:
    """The package timm, made importable beside a torchvision without its compiled library."""
    import fastvit_zoo.torchvision_operators  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
    return timm
