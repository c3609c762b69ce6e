"""Weights of VISTA by name: those of FlagEmbedding's `Visualized_BGE`, and those of `VISTA`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from gcl_kernels.integrations.vista.eva import EVAPatchTokens

_PREFIXES = {
    "bge_embeddings.": "embeddings.",
    "bge_encoder.": "encoder.",
    "model_visual.visual.": "image_model.",
}
"""FlagEmbedding's and ours; `visual_proj.` is the same."""

_UNUSED = ("bge_pooler.", "bge_embeddings.position_ids", "model_visual.logit_scale")
"""Of FlagEmbedding's, what no embedding depends on."""


def own_names(state: dict[str, Tensor], image_model: nn.Module) -> dict[str, Tensor]:
    """A state dict of either kind by the names of a `VISTA` with that image model."""
    renamed, of_eva_clip = {}, {}
    for name, tensor in state.items():
        if name.startswith(_UNUSED):
            continue
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        rest = name.removeprefix(prefix)
        if prefix == "model_visual.visual." and isinstance(image_model, EVAPatchTokens):
            of_eva_clip[rest] = tensor
        else:
            renamed[_PREFIXES.get(prefix, "") + rest] = tensor
    if isinstance(image_model, EVAPatchTokens):
        for name, tensor in image_model.own_names(of_eva_clip).items():
            renamed[f"image_model.{name}"] = tensor
    return renamed


def check_state(state: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """Whether `state` is all of the model's, and nothing else.

    Raises:
        ValueError: weights that are missing, unexpected, or of another shape, the first few.
    """
    expected = model.state_dict()
    faults = [f"{name} is missing" for name in expected if name not in state]
    faults += [f"{name} is unexpected" for name in state if name not in expected]
    faults += [
        f"{name} is of shape {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(f"{path}: {', '.join(faults[:4])}{more}")
