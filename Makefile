# Every target makes what it needs: .venv on a fresh clone, again when pyproject.toml or constraints.txt change.
# `make TARGET PY=python3` takes that interpreter as it is, installs nothing and reads the packages from this checkout: for a
# machine without a network that has torch and transformers.
PYTHON ?= python3
VENV := .venv
ifdef PY
INSTALLED :=
TRITON_OLDEST :=
TRANSFORMERS_4 :=
TRANSFORMERS_TESTS :=
export PYTHONPATH := $(CURDIR)/src:$(CURDIR)/kernels/torch-ext:$(CURDIR)/conversion:$(CURDIR)/examples$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
# The oldest triton supported, beside the one that is imported: kernels are compiled with both. It has no wheel but for Linux.
TRITON_OLDEST := $(if $(filter Linux,$(shell uname -s)),$(VENV)/triton-3.6/installed)
# A transformers 4 beside the one that is imported: untied checkpoints are for its readers too.
TRANSFORMERS_4 := $(VENV)/transformers-4/installed
# transformers' own tests, of the version that is imported: its sdist has them, its wheel has not.
TRANSFORMERS_TESTS := $(VENV)/transformers-tests/installed
endif
# One thread a process: the models of the tests are too small for more, and xdist runs two.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
# Compiling the kernels is what takes time there, and one core a process.
GPU_WORKERS ?= 8
# Only these files: those that need no GPU may need packages that a GPU machine lacks.
GPU_TESTS = $(shell grep -l "mark\.gpu" tests/test_*.py)
# pip compiles no file (that takes longer than the rest of the installation): Python compiles what it imports, once.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install -q --no-compile --disable-pip-version-check

.PHONY: demo model-card seeds study-conversion study-healing study-softmoe study-pretraining test fuzz style bench bench-conversion gpu-test bench-gpu gpu-check gpu-cache tune compile-table untied-check hf-tests clean

demo: $(INSTALLED)  ## a trained MoE checkpoint in, a tied and healed one out: demo/report.md
	$(PY) -m transformers_tiedmoe.cli demo --output demo

model-card: demo  ## the card of the demo's healed checkpoint, as it stands in model_cards/, with the audit it tells of
	cp demo/healed/README.md model_cards/tiedmoe-demo.md
	cp demo/healed/figures/*.png model_cards/figures/
	xz -9c demo/audit/audit.json > model_cards/tiedmoe-demo-audit.json.xz

seeds: $(INSTALLED)  ## the demo over three seeds: the spread in docs/results.md
	$(PY) benchmarks/demo_seeds.py --output seeds --seeds 0,1,2

study-conversion: $(INSTALLED)  ## every conversion method's loss against bytes, before and after healing: docs/results.md
	$(PY) benchmarks/conversion_study.py --output study --results benchmarks/results/conversion_study $(ARGS)

study-healing: $(INSTALLED)  ## how near to the untouched source a short healing comes: docs/results.md
	$(PY) benchmarks/conversion_study.py --healing --output study-healing --results benchmarks/results/healing_study $(ARGS)

study-softmoe: $(INSTALLED)  ## soft routing against top-k, trained from scratch, tied and not: docs/results.md
	$(PY) benchmarks/softmoe_study.py --output study-softmoe $(ARGS)

study-pretraining: $(INSTALLED)  ## tied models pretrained as the paper did, against untied and narrow ones: docs/results.md
	$(PY) benchmarks/pretraining_study.py --output study-pretraining $(ARGS)

test: $(INSTALLED) $(TRITON_OLDEST)  ## every test that needs no GPU
	$(ONE_THREAD) $(PY) -m pytest -q -n $(WORKERS) --dist loadgroup -m "not gpu and not minutes" $(ARGS)

untied-check: $(INSTALLED) $(TRANSFORMERS_4)  ## untied checkpoints of 17 families in transformers 4.57.6 against the tied models
	$(ONE_THREAD) $(PY) -m pytest -q -m slow tests/test_conversion_untie.py

hf-tests: $(INSTALLED) $(TRANSFORMERS_TESTS)  ## transformers' own model tests on tied olmoe and mixtral; they have marks of their own
	$(ONE_THREAD) PYTHONPATH=$(VENV)/transformers-tests$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PY) -m pytest -q -n $(WORKERS) \
		-o addopts= -o verbosity_subtests=0 -W ignore::pytest.PytestUnknownMarkWarning $(ARGS) tests/hf_model_tests.py

CASES ?= 10000
fuzz: $(INSTALLED)  ## broken configs, headers, slot maps, journals, manifests, statistics, recipes, text: an error each
	$(ONE_THREAD) TIEDMOE_FUZZ_CASES=$(CASES) $(PY) -m pytest -q -n $(WORKERS) tests/test_*fuzz.py

style: $(INSTALLED)  ## lint, format, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

gpu-test: $(INSTALLED)  ## the tests marked gpu
	@$(PY) -c "import torch; raise SystemExit(not torch.cuda.is_available())" \
		|| { echo "gpu-test: torch finds no GPU here; nothing was tested" >&2; exit 1; }
	$(PY) -m pytest -q -m gpu -n $(GPU_WORKERS) $(ARGS) $(GPU_TESTS)

bench: $(INSTALLED)  ## the experts on this CPU against transformers' own
	$(PY) benchmarks/experts.py --device cpu --budget-s 600 --output benchmarks/results/experts_cpu $(ARGS)

bench-conversion: $(INSTALLED)  ## memory and throughput of a 20 GB conversion against copying its files; needs 45 GB of disk
	$(PY) benchmarks/conversion_scale.py scale --gigabytes 20 --pairs 3 $(ARGS)

bench-gpu: $(INSTALLED)  ## the kernels on this GPU against transformers' own and other libraries'
	$(PY) benchmarks/experts.py --output benchmarks/results/experts_gpu $(ARGS)

STAGE ?= a
RESULTS ?= build/gpu-check-$(STAGE)
gpu-check: $(INSTALLED)  ## four minutes of a GPU (STAGE=a), then seven (STAGE=b PREVIOUS=results of a): right? tuned, beside peers
	$(PY) benchmarks/gpu_check.py --stage $(STAGE) --results $(RESULTS) $(if $(PREVIOUS),--previous $(PREVIOUS)) $(ARGS)

# The triton of a GPU machine with torch 2.11, not the one that is imported here.
gpu-cache: $(INSTALLED) $(TRITON_OLDEST)  ## what gpu-check launches, compiled without a GPU for sm_90: .gpu-cache.tar.xz
	rm -rf build/gpu-cache
	$(if $(TRITON_OLDEST),PYTHONPATH=$(CURDIR)/$(VENV)/triton-3.6:$(CURDIR)/kernels/torch-ext) $(PY) benchmarks/gpu_cache.py build $(ARGS)
	$(if $(TRITON_OLDEST),PYTHONPATH=$(CURDIR)/$(VENV)/triton-3.6:$(CURDIR)/kernels/torch-ext) $(PY) benchmarks/gpu_cache.py verify

tune: $(INSTALLED)  ## search launch parameters for this GPU: configs/*.json of the kernels
	$(PY) -m tiedmoe_kernels.tune $(ARGS)

COMPILED := benchmarks/results/compile
compile-table: $(INSTALLED) $(TRITON_OLDEST)  ## every shipped config, compiled without a GPU by both tritons: spills, shared memory
	$(PY) benchmarks/compile_table.py --output $(COMPILED)_newest.json
	$(if $(TRITON_OLDEST),PYTHONPATH=$(CURDIR)/$(VENV)/triton-3.6 $(PY) benchmarks/compile_table.py --output $(COMPILED)_oldest.json)
	$(PY) benchmarks/compile_table.py --table $(if $(TRITON_OLDEST),$(COMPILED)_oldest.json) $(COMPILED)_newest.json --output $(COMPILED).md

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/triton-3.6/installed: | $(VENV)/installed
	rm -rf $(@D)
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps --target $(@D) triton==3.6.0
	touch $@

$(VENV)/transformers-4/installed: | $(VENV)/installed
	rm -rf $(@D)
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps --target $(@D) transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2
	touch $@

$(VENV)/transformers-tests/installed: $(VENV)/installed
	rm -rf $(@D)
	mkdir -p $(@D)/transformers_tests
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps --target $(@D) parameterized
	version=$$($(VENV)/bin/python -c "from importlib.metadata import version; print(version('transformers'))") && \
	$(VENV)/bin/python -m pip download -q --disable-pip-version-check --no-deps --no-build-isolation --no-binary transformers \
		-d $(@D) transformers==$$version && \
	tar -xzf $(@D)/transformers-$$version.tar.gz -C $(@D)/transformers_tests --strip-components 2 transformers-$$version/tests
	touch $@
