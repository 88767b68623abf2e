# lorajob: `make demo` shows the whole job, `make test` runs the tests; `make help` has the rest.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check
# So many test files run beside each other: one more than two cores, because some tests mostly wait.
WORKERS ?= 3
CACHE  := $(or $(LORAJOB_CACHE),$(HOME)/.cache/lorajob)

# The CPU build of torch for Python 3.11 on x86-64, where a registry or --find-links serves it; the
# lock has the hashes of the ordinary builds beside it.
TORCH := 2.13.0
TORCH_CPU_HASH := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu demo test lint lock charts tools clean

help:
	@echo "make demo       the whole job on this machine: about 4 minutes the first time, then a second"
	@echo "make setup      $(VENV)/bin/lorajob, for the processor, with what the tests need"
	@echo "make setup-gpu  $(VENV)/bin/lorajob, for an NVIDIA GPU: Python 3.12, x86-64, driver 580"
	@echo "make test       the tests"
	@echo "make lint       ruff and mypy"
	@echo "make charts     write what of helm/, k8s/ and docs/ is made from the code"
	@echo "make tools      build llama.cpp now"
	@echo "make lock       write both locks anew from pyproject.toml"
	@echo "make clean      remove .venv and runs/ (not the cache in $(CACHE))"

setup: $(VENV)/bin/lorajob

# The program of this checkout: it runs from any folder, and a link to it does too.
$(VENV)/bin/lorajob: $(VENV)/.ready
	@printf '#!/bin/sh\nexec "%s/bin/python" "%s/entrypoint.py" "$$@"\n' "$(abspath $(VENV))" "$(CURDIR)" > $@
	@chmod +x $@

$(VENV)/.ready: requirements-cpu.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lorajob needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)"; echo "  -> make PYTHON=python3.12 ..."; exit 4; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module"; echo "  -> Debian, Ubuntu: apt-get install python3-venv"; exit 4; }
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@echo "installing the locked packages into $(VENV) (about a minute)"
	@# pip prefers torch's ordinary build, for CUDA, to the CPU's of the same version: ask for that first.
	@printf 'torch==%s --hash=sha256:%s\n' $(TORCH) $(TORCH_CPU_HASH) > $(VENV)/torch.txt
	@$(PIP) --require-hashes --no-deps -r $(VENV)/torch.txt >$(VENV)/torch.log 2>&1 || true
	@$(PIP) --require-hashes --no-deps -r requirements-cpu.lock
	@$(PY) -c 'import torch' 2>/dev/null || { echo "this registry has torch for CUDA only: fetching the libraries it loads (3 GB)"; $(PIP) torch==$(TORCH); }
	@touch $@

# The CUDA lock: no tools for development, so neither `make test` nor `make lint`. A $(VENV) that is
# there is replaced, and `make setup` leaves the new one as it is.
GPU_PYTHON ?= python3.12
setup-gpu:
	@$(GPU_PYTHON) -c 'import sys, platform; sys.exit((sys.version_info[:2], platform.system(), platform.machine()) != ((3, 12), "Linux", "x86_64"))' || { echo "requirements.lock is for Python 3.12 on x86-64 Linux, and $(GPU_PYTHON) is not that"; echo "  -> make setup-gpu GPU_PYTHON=/path/to/python3.12, or the container image"; exit 4; }
	@$(GPU_PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(GPU_PYTHON) has no venv module"; echo "  -> Debian, Ubuntu: apt-get install python3.12-venv"; exit 4; }
	@rm -rf $(VENV) && $(GPU_PYTHON) -m venv $(VENV)
	@echo "installing the locked packages into $(VENV) (5.5 GB on the disk)"
	@$(PIP) --require-hashes --no-deps --only-binary :all: -r requirements.lock
	@touch $(VENV)/.ready
	@$(MAKE) --no-print-directory setup

tools: setup
	@$(PY) entrypoint.py tools

demo: setup tools
	@$(PY) entrypoint.py run examples/demo.yaml
	@test -t 1 || cat runs/demo/report/answers.txt

test: setup tools
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

charts: setup
	@$(PY) -m helm.generate
	@$(PY) -m docs.generate

lock:
	uv pip compile pyproject.toml --extra cpu --extra dev --universal --python-version 3.11 \
	    --generate-hashes --no-emit-index-url --custom-compile-command "make lock" -q -o requirements-cpu.lock \
	    $(addprefix --no-emit-package ,$(CUDA_ONLY))
	@# unsloth's CPU backend, to compare the engines where there is no GPU; what it asks for besides
	@# (a CUDA torch's libraries, image and audio packages) no text needs.
	grep -oE 'unsloth(-zoo)?==[0-9.]+' pyproject.toml | uv pip compile - --no-deps --python-version 3.11 \
	    --generate-hashes --no-emit-index-url --no-header --no-annotate -q >> requirements-cpu.lock
	@# uv keeps the hashes that are there already.
	grep -q $(TORCH_CPU_HASH) requirements-cpu.lock || sed -i '/^torch==$(TORCH)/a\    --hash=sha256:$(TORCH_CPU_HASH) \\' requirements-cpu.lock
	uv pip compile pyproject.toml --extra cuda --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
	    --generate-hashes --no-emit-index-url --custom-compile-command "make lock" -q -o requirements.lock

# What torch's CUDA build brings along, and a machine without a GPU does not need.
CUDA_ONLY := triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti \
    nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand \
    nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink \
    nvidia-nvshmem-cu13 nvidia-nvtx

clean:
	rm -rf $(VENV) runs
