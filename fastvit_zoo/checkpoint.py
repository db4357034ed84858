"""Reading FastViT weights, whoever wrote them.

Three vocabularies name the same tensors: that of the files the authors published, timm's and this package's.
Names are translated authors -> timm -> zoo, one substitution after the other. The names alone tell which
vocabulary is spoken and whether the weights are those of the training form or of the reparameterized one.
"""

import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastvit_zoo.model import Backbone, FastViT

# Averaged weights come first: the accuracies of the paper are theirs.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")

_Substitution = tuple[str, str | Callable[[re.Match[str]], str]]

_AUTHORS_TO_TIMM: tuple[_Substitution, ...] = (
    (r"^patch_embed\.", "stem."),
    (r"^conv_exp\.", "final_conv."),
    # The authors keep one list: stage 1, patch embedding, stage 2, ... Where there is a position encoding it
    # takes number 6 and moves stage 4 to number 7.
    (r"^network\.6\.pe\.", "stages.3.pos_emb.pos_enc."),
    (r"^network\.6\.reparam_conv\.", "stages.3.pos_emb.reparam_conv."),
    (r"^network\.(\d+)\.proj\.", lambda found: f"stages.{(int(found[1]) + 1) // 2}.downsample.proj."),
    (r"^network\.(\d+)\.", lambda found: f"stages.{int(found[1]) // 2}.blocks."),
    (r"\.rbr_conv\.", ".conv_kxk."),
    (r"\.rbr_scale\.", ".conv_scale."),
    (r"\.rbr_skip\.", ".identity."),
    (r"\.lkb_origin\.", ".large_conv."),
    (r"\.lkb_reparam\.", ".reparam_conv."),
    (r"\.convffn\.", ".mlp."),
    (r"\.se\.reduce\.", ".se.fc1."),
    (r"\.se\.expand\.", ".se.fc2."),
    (r"\.(layer_scale(?:_[12])?)$", r".\1.gamma"),
)

_TIMM_TO_ZOO: tuple[_Substitution, ...] = (
    (r"^head\.fc\.", "head."),
    # Blocks.
    (r"\.token_mixer\.mixer\.conv_kxk\.0\.", ".token_mixer.mixer.branches.0."),
    (r"\.token_mixer\.mixer\.conv_scale\.", ".token_mixer.mixer.branches.1."),
    (r"\.token_mixer\.norm\.identity\.", ".token_mixer.norm."),
    (r"\.token_mixer\.reparam_conv\.", ".token_mixer."),
    (r"\.token_mixer\.(qkv|proj)\.", r".token_mixer.branch.\1."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.token_mixer.branch.norm."),
    (r"\.token_mixer\.layer_scale\.gamma$", ".token_mixer.layer_scale"),
    (r"\.layer_scale_1\.gamma$", ".token_mixer.layer_scale"),
    (r"\.layer_scale(?:_2)?\.gamma$", ".ffn.layer_scale"),
    (r"\.mlp\.", ".ffn.branch."),
    # Between the stages.
    (r"\.downsample\.proj\.0\.large_conv\.", ".downsample.0.branches.0."),
    (r"\.downsample\.proj\.0\.small_conv\.", ".downsample.0.branches.1."),
    (r"\.downsample\.proj\.0\.reparam_conv\.", ".downsample.0."),
    (r"\.downsample\.proj\.", ".downsample."),
    (r"\.pos_emb\.pos_enc\.", ".position.conv."),
    (r"\.pos_emb\.reparam_conv\.", ".position."),
    # Inside a MobileOne block, which is what remains.
    (r"\.conv_kxk\.0\.", ".conv.branches.0."),
    (r"\.conv_scale\.", ".conv.branches.1."),
    (r"(?<!\.mixer)\.identity\.", ".conv.identity."),
    (r"\.reparam_conv\.", ".conv."),
)

# How the stem begins in each vocabulary, and what turns its names into the zoo's.
_VOCABULARIES: tuple[tuple[str, tuple[_Substitution, ...]], ...] = (
    (r"patch_embed\.0\.(rbr_conv|reparam_conv)\.", _AUTHORS_TO_TIMM + _TIMM_TO_ZOO),
    (r"stem\.0\.(conv_kxk|reparam_conv)\.", _TIMM_TO_ZOO),
    (r"stem\.0\.conv\.", ()),
)


class CheckpointError(ValueError):
    """A checkpoint that is not one of FastViT or does not fit the model; the message is one line."""


def load_checkpoint(
    model: "FastViT | Backbone",
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    classifier: bool = True,
) -> None:
    """Copy published, timm's or the zoo's own FastViT weights into `model`, in place.

    `checkpoint` is a file (`.safetensors`, or anything `torch.save` wrote, read with `weights_only=True`)
    or what such a file holds: the tensors by name, or a dict with them under "state_dict_ema", "model_ema",
    "state_dict" or "model", looked up in this order. A "module." before every name is ignored. Weights of
    the training form fit a model in training form, fused weights one created with `deployed=True`.

    With `classifier=False` the model keeps its own last layer; a model without one never needs it, and a `Backbone`
    needs nothing but its stages.

    Raises CheckpointError, leaving the model as it was, if anything is missing, left over or of another
    shape; OSError if the file cannot be opened.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else read(Path(checkpoint))
    weights = _translate(_tensors(content))
    expected = model.state_dict()
    _check_form("stem.0.conv.weight" in weights, model.deployed)
    unused = (*model.unused_names(), *(() if classifier else ("head.",)))
    weights = {name: found for name, found in weights.items() if not name.startswith(unused)}
    expected = {name: tensor for name, tensor in expected.items() if not name.startswith(unused)}
    _check_fit(weights, expected)
    model.load_state_dict({name: tensor for name, (_, tensor) in weights.items()}, strict=False)


def read(path: Path) -> Mapping[str, Any]:
    """What a file of `torch.save` or safetensors holds. Raises CheckpointError if it is something else, or OSError."""
    if path.suffix == ".safetensors":
        try:
            import safetensors
            import safetensors.torch
        except ImportError:
            raise CheckpointError(f"{path}: reading it needs the package safetensors") from None
        try:
            return safetensors.torch.load(path.read_bytes())
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file ({_first_line(error)})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: not a torch.save file of plain tensors; other contents are refused, for safety"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # there is no such file
        raise CheckpointError(f"{path}: damaged or not written by torch.save ({_first_line(error)})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__} where named tensors were expected")
    return content


def save(state: Any, file: Path) -> None:
    """Write a file of `torch.save` that appears complete or not at all. Raises OSError if it cannot be written."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        torch.save(state, partial)
        os.replace(partial, file)
    except RuntimeError as error:  # a full disk, as torch says it
        raise OSError(f"{file} cannot be written: {_first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for container in _CONTAINERS:
        if isinstance(content.get(container), Mapping):
            content = content[container]
            break
    tensors = {str(name): tensor for name, tensor in content.items()}
    strangers = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if strangers:
        raise CheckpointError(f"not a checkpoint of named tensors: {_few(strangers)} hold something else")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that can be copied into another without loss of its sense."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_complex() or value.is_quantized)


def _translate(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """The tensors by the zoo's names, each with the name the checkpoint gave it."""
    for stem, substitutions in _VOCABULARIES:
        if any(re.match(stem, name) for name in tensors):
            return {_rename(name, substitutions): (name, tensor) for name, tensor in tensors.items()}
    raise CheckpointError(f"not a FastViT checkpoint: no stem among the names {_few(tensors)}")


def _rename(name: str, substitutions: Iterable[_Substitution]) -> str:
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


def _check_form(fused: bool, deployed: bool) -> None:
    if fused and not deployed:
        raise CheckpointError(
            "the checkpoint is fused but the model is in training form: create the model with deployed=True"
        )
    if deployed and not fused:
        raise CheckpointError(
            "the checkpoint is of the training form but the model is deployed: create the model with deployed=False"
        )


def _check_fit(weights: Mapping[str, tuple[str, Tensor]], expected: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in weights]
    unexpected = [given for name, (given, _) in weights.items() if name not in expected]
    misshapen = [
        f"{given} is {tuple(tensor.shape)} but must be {tuple(expected[name].shape)}"
        for name, (given, tensor) in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    faults = [
        f"{what} ({len(names)}): {_few(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if not faults:
        return
    only_classifier = not missing and not unexpected and all(fault.startswith("head.") for fault in misshapen)
    if only_classifier:
        classes = next(len(tensor) for name, (_, tensor) in weights.items() if name.startswith("head."))
        raise CheckpointError(
            f"the checkpoint's classifier has {classes} classes but the model's has "
            f"{len(expected['head.bias'])}: create the model with num_classes={classes}, or call "
            "load_checkpoint with classifier=False"
        )
    raise CheckpointError(f"the checkpoint does not fit the model: {'; '.join(faults)}")


def _few(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
