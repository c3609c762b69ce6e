"""VISTA: one encoder that embeds a text, an image, or an image with its text.

Zhou et al., "VISTA: Visualized Text Embedding for Universal Multi-Modal Retrieval" (ACL 2024), also
known as Visualized BGE. An image's patch tokens go into a BERT-style text encoder among the text's
own: [CLS], image tokens, the rest of the text. Its embeddings are the three views of
`gcl_kernels.gcl_loss`:

    from gcl_kernels.integrations.vista import VISTA

    model = VISTA.from_pretrained("vista")  # a folder
    views = model(pixels, texts)
    loss = gcl_kernels.gcl_loss(
        views["image_features"],
        views["text_features"],
        views["fused_features"],
        views["logit_scale"],
    )

`gcl_kernels.retrieval.VISTAEncoder` evaluates it.
"""

from gcl_kernels.integrations.vista.eva import EVAPatchTokens
from gcl_kernels.integrations.vista.model import VISTA

__all__ = ["VISTA", "EVAPatchTokens"]
