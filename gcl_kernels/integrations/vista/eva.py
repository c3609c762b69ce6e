"""The image model of VISTA's released weights: EVA02-CLIP, as timm has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

RELEASED = {768: "eva02_base_patch16_clip_224", 1024: "eva02_large_patch14_clip_224"}
"""timm's names of EVA02-CLIP-B-16 and L-14, which VISTA has beside text models of these widths."""

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class EVAPatchTokens(nn.Module):
    """Patch tokens of an EVA vision transformer: [B, P, width] of pixels [B, 3, H, W].

    They are those of the last block, as VISTA takes them: without [CLS], and not normalised.

    Args:
        trunk: a `timm.models.eva.Eva`; its head and last normalisation are taken off.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = trunk
        trunk.norm = nn.Identity()
        trunk.head = nn.Identity()

    @classmethod
    def released(cls, text_width: int) -> EVAPatchTokens:
        """With random weights, of the shape that was released beside a text model of that width.

        All patches are kept in training too, where FlagEmbedding's B-16 drops half of them.

        Raises:
            ValueError: none was.
            ImportError: timm is not installed.
        """
        if text_width not in RELEASED:
            raise ValueError(
                "image_model: expected one for a text model of another width than "
                f"{' and '.join(map(str, RELEASED))}, got None for {text_width}"
            )
        return cls(_timm().create_model(RELEASED[text_width], num_classes=0))

    @property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """From a PIL image in RGB to [3, H, W]: scaled by the shorter side, then cropped."""
        return _timm().data.create_transform(
            self.trunk.patch_embed.img_size,
            interpolation="bicubic",
            mean=PIXEL_MEAN,
            std=PIXEL_STD,
            crop_pct=1.0,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.trunk.forward_features(pixels)[:, self.trunk.num_prefix_tokens :]

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of eva_clip's names by this module's."""
        renamed = _timm().models.eva.checkpoint_filter_fn(state, self.trunk)
        taken_off = ("head.", "norm.")
        return {
            f"trunk.{name}": tensor
            for name, tensor in renamed.items()
            if not name.startswith(taken_off)
        }


def _timm() -> Any:
    try:
        import timm.data
        import timm.models.eva
    except ModuleNotFoundError as error:
        if error.name != "timm":  # timm is there, and something that it needs is not
            raise
        raise ImportError(
            'VISTA\'s image model needs timm: pip install "gcl_kernels[vista]"'
        ) from error
    return timm
