# The same few commands for people and for CI. Each makes the virtual environment that it needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Files are spread over both cores by file, so that what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-all emulate lint plugin gpu gpu-kit clean help

help:
	@echo "make demo      build the shipped model (checkpoint -> ONNX -> TensorRT engine) and generate text"
	@echo "make test      run the tests"
	@echo "make test-all  run the slow ones too (some minutes, 10 GB of disk)"
	@echo "make emulate   run the kernels' tests on the compiled kernels of SM=90, or another, on an emulated GPU (6 minutes)"
	@echo "make lint      ruff and mypy"
	@echo "make gpu       on a machine with a GPU: kernels, engines, benchmarks, a table; under 20 minutes, see docs/gpu.md"
	@echo "make gpu-kit   for make gpu, on a machine without a GPU: models for it to build and check, and what is right"
	@echo "make plugin    compile the C++ plugin; TENSORRT_INCLUDE_DIR is the folder of NvInferRuntime.h"

# An environment with everything that runs without a GPU, at the versions the tests ran with.
$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,dev]"
	@touch $@

demo: $(VENV)/.made
	$(BIN)/python -m lynx_trt.models.demo

test: $(VENV)/.made
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.made
	$(PYTEST)

# What the compiler made of the kernels, instruction by instruction; see docs/gpu.md.
SM ?= 90
emulate: $(VENV)/.made
	LYNX_EMULATED_SM=$(SM) $(PYTEST) -k "not spill" $(addprefix tests/test_,$(addsuffix .py,\
		experts_kernels select_kernel draw_kernel state_kernels hand_over_kernels))

lint: $(VENV)/.made build/types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p lynx_trt

# For trtexec and Triton Inference Server; see docs/plugin.md. CMake also looks in TENSORRT_ROOT and where CUDA lies.
plugin:
	cmake -S plugins/cpp -B build/plugin
	cmake --build build/plugin --parallel 2
	@echo build/plugin/liblynx_plugin.so

# With whichever python has PyTorch and the Triton language, and nothing installed: `make gpu PYTHON=python3`.
gpu:
	$(PYTHON) benchmarks/gpu.py

# Under five minutes on two cores; 13 MB when compressed.
gpu-kit: $(VENV)/.made
	$(BIN)/python benchmarks/gpu_kit.py -o build/gpu-kit

# mypy reads packages where they lie; three of ours lie outside of lynx_trt/, so it gets a tree of links.
build/types: $(shell find lynx_trt -maxdepth 1)
	rm -rf $@
	mkdir -p $@/lynx_trt
	for entry in lynx_trt/*; do ln -s ../../../$$entry $@/lynx_trt/; done
	for entry in export plugins models; do ln -s ../../../$$entry $@/lynx_trt/; done

clean:
	rm -rf $(VENV) build out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
