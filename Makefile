PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT_FROM := pyproject.toml setup.py build_extensions.py $(wildcard csrc/cpu/*)

INTERPRETED := $(patsubst %,python_tests/test_%.py,contract candidates score_fusion kernels embeddings triton triton_fused triton_tma)

# Of the packages installed, most modules are never imported: each is compiled when it first is.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: test lint sanitize demo bench bench-check kernels-report gpu-report clean

test: $(VENV)/.test
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-k "not in_the_interpreter"
	# Triton's kernels, in Triton's interpreter (5: no Triton here).
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 $(INTERPRETED) \
		-k triton || [ $$? -eq 5 ]

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# csrc/cpu's tests with the address and undefined-behaviour sanitizers, in a build of its own.
sanitize: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m python_tests.sanitized_cpu $(ARGS)

demo: $(VENV)/.demo
	$(BIN)/python -m examples.emoji_retrieval $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks/bench_loss.py --benchmark-only \
		--benchmark-columns=median --benchmark-sort=name --benchmark-json=$(VENV)/bench.json
	$(BIN)/python -m benchmarks.table $(VENV)/bench.json $(ARGS)
	$(BIN)/python -m benchmarks.options

# Minutes: fails where a loss is slower than in the record of this kind of processor.
bench-check: $(VENV)/.test
	$(BIN)/python -m benchmarks.check $(ARGS)

# Minutes, without a GPU: writes benchmarks/results/kernels.md, or with ARGS="--chips sm_90" prints.
kernels-report: $(VENV)/.test
	$(BIN)/python -m benchmarks.kernels_report $(ARGS)

# On a machine with a GPU, in whatever environment is active there.
gpu-report:
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .
	$(PYTHON) -m benchmarks.gpu_report $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv --upgrade-deps $(VENV)

# Without the CUDA extension, which a test builds for itself; GCL_KERNELS_CUDA=1 installs it too.
$(VENV)/.%: $(BUILT_FROM) | $(VENV)/bin/python
	GCL_KERNELS_CUDA=$${GCL_KERNELS_CUDA:-0} $(BIN)/python -m pip install -q --no-compile -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build gcl_kernels/*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache
