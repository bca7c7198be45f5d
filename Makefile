# Every target makes what it needs: .venv on a fresh clone, again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# One thread a process: the models of the tests are too small for more, and xdist runs two.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
# pip compiles no file (that takes longer than the rest of the installation): Python compiles what it imports, once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo seeds test style bench gpu-test bench-gpu clean

demo: $(INSTALLED)  ## a trained MoE checkpoint in, a tied and healed one out: demo/report.md
	$(BIN)/tiedmoe demo --output demo

seeds: $(INSTALLED)  ## the demo over three seeds: the spread in docs/results.md
	$(BIN)/python benchmarks/demo_seeds.py --output seeds --seeds 0,1,2

test: $(INSTALLED)  ## every test that needs no GPU
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m "not gpu" $(ARGS)

style: $(INSTALLED)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-test: $(INSTALLED)  ## the tests marked gpu
	@$(BIN)/python -c "import torch; raise SystemExit(not torch.cuda.is_available())" \
		|| { echo "gpu-test: torch finds no GPU here; nothing was tested" >&2; exit 1; }
	@$(BIN)/python -m pytest -q -m gpu $(ARGS); status=$$?; \
		if [ $$status -eq 5 ]; then echo "gpu-test: no test is marked gpu yet: the Triton kernels are not written" >&2; fi; \
		exit $$status

bench bench-gpu:  ## nothing to time yet
	@echo "$@: there are no kernels to time yet (kernels/README.md). The demo's figures come from 'make demo' and 'make seeds'." >&2; exit 1

clean:
	rm -rf $(VENV) build dist *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
