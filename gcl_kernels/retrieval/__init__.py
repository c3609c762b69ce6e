"""Retrieval benchmarks: M-BEIR, MMEB, WebVid-CoVR, COCO. The pages: docs/retrieval.md.

    from gcl_kernels.retrieval import OpenCLIPEncoder, evaluate, load_mbeir

    result = evaluate(OpenCLIPEncoder(model, preprocess, tokenizer), load_mbeir(root, "cirr_task7"))
    result["hit@5"]

Needs `pip install "gcl_kernels[retrieval]"`; `import gcl_kernels` imports nothing of it.
"""

try:
    import PIL  # noqa: F401
    import pytrec_eval  # noqa: F401
    import tqdm  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f'gcl_kernels.retrieval needs {error.name}: pip install "gcl_kernels[retrieval]"'
    ) from error

from gcl_kernels.retrieval.coco import load_coco
from gcl_kernels.retrieval.covr import load_covr
from gcl_kernels.retrieval.datasets import DataError, Items, RetrievalDataset
from gcl_kernels.retrieval.encode import Encoder
from gcl_kernels.retrieval.encoders import (
    CLIPModelEncoder,
    JointEncoder,
    OpenCLIPEncoder,
    VISTAEncoder,
)
from gcl_kernels.retrieval.evaluation import Result, evaluate
from gcl_kernels.retrieval.mbeir import load_mbeir, mbeir_names
from gcl_kernels.retrieval.mmeb import load_mmeb, mmeb_subsets
from gcl_kernels.retrieval.mteb import as_mteb_model, as_mteb_task
from gcl_kernels.retrieval.report import report_tables, save_heat_map, save_json, save_runs

__all__ = [
    "CLIPModelEncoder",
    "DataError",
    "Encoder",
    "Items",
    "JointEncoder",
    "OpenCLIPEncoder",
    "Result",
    "RetrievalDataset",
    "VISTAEncoder",
    "as_mteb_model",
    "as_mteb_task",
    "evaluate",
    "load_coco",
    "load_covr",
    "load_mbeir",
    "load_mmeb",
    "mbeir_names",
    "mmeb_subsets",
    "report_tables",
    "save_heat_map",
    "save_json",
    "save_runs",
]
