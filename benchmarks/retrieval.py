"""Memory and rates of an evaluation over many candidates: `python -m benchmarks.retrieval`.

Texts that a function embeds stand in for data and model, so what is measured is the harness:
items in memory, embeddings on their way to disk, the search.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import torch

from gcl_kernels.retrieval import RetrievalDataset, evaluate


class Peaks(threading.Thread):
    """The largest resident memory, in MiB: of the process's own, and of the files it has mapped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}

    def run(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peaks:
                    self.peaks[name] = max(self.peaks[name], int(value.split()[0]) // 1024)
            time.sleep(0.02)


class Synthetic:
    """Embeds the text "17" by waves of 17, and says how long it took until it was last asked."""

    fingerprint = "waves"

    def __init__(self, dim: int) -> None:
        self.frequencies = torch.randn(dim, generator=torch.Generator().manual_seed(0)) * 100
        self.last = 0.0

    def __call__(self, items: list[dict]) -> torch.Tensor:
        numbers = torch.tensor([int(item["text"]) for item in items], dtype=torch.float32)
        self.last = time.perf_counter()
        return torch.outer(numbers, self.frequencies).cos_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--search", default="torch")
    parser.add_argument("--dtype", default="float16")
    options = parser.parse_args()
    peaks = Peaks()
    peaks.start()
    time.sleep(0.1)
    at_start = dict(peaks.peaks)
    begun = time.perf_counter()
    count = options.candidates
    dataset = RetrievalDataset(
        "synthetic",
        "t->t",
        [{"id": f"q{i}", "text": str(count + i)} for i in range(options.queries)],
        ({"id": f"1:{i}", "text": str(i)} for i in range(count)),
        {f"q{i}": {f"1:{i}": 1} for i in range(options.queries)},
    )
    loaded = time.perf_counter()
    encoder = Synthetic(options.dim)
    with tempfile.TemporaryDirectory() as folder:
        evaluate(
            encoder,
            dataset,
            batch_size=1024,
            embeddings=folder,
            dtype=getattr(torch, options.dtype),
            search=options.search,
        )
    done = time.perf_counter()
    queries, chunk = torch.randn(1024, options.dim), torch.randn(32768, options.dim)
    queries @ chunk.T
    done_ = time.perf_counter()
    queries @ chunk.T
    alone = (time.perf_counter() - done_) * options.queries / 1024 * count / 32768
    print(f"threads {torch.get_num_threads()}, {vars(options)}")
    print(f"MiB at start {at_start}, at most {peaks.peaks}")
    print(
        f"items read in {loaded - begun:.1f} s, {count / (encoder.last - loaded):.0f} embedded a "
        f"second, searched and counted in {done - encoder.last:.1f} s: "
        f"{count / (done - encoder.last):.0f} candidates a second; torch.mm alone: {alone:.1f} s"
    )


if __name__ == "__main__":
    main()
