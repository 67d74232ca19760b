# make test, make bench: all the set-up there is. Each makes the virtual environment, installs the pinned versions,
# builds the library, and runs.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# A CPU build of torch where pip offers one; set TORCH to take another.
TORCH ?= torch==2.13.0
# No more compile jobs than cores, nor than one per 2 GiB of free memory.
JOBS ?= $(shell awk -v cores="$$(nproc)" '/MemAvailable/ {n = int($$2 / 2097152); if (n < 1) n = 1; print n < cores ? n : cores}' /proc/meminfo)
SANITIZERS ?= address,undefined
BENCH_ARGS := $(if $(QUICK),--quick) $(if $(FULL),--full)

.PHONY: env build build-tests test mutants test-wheel bench gpu wheel sdist lint format clean

# torch first and alone: its own pinned version decides which build of it pip takes.
$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q -c constraints.txt cmake ninja pybind11 scikit-build-core setuptools wheel numpy rich \
	  matplotlib jinja2 jsonschema scikit-learn pytest pytest-benchmark pytest-xdist hypothesis ml-dtypes triton
	touch $@

env: $(VENV)/.installed

build: env
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B build -G Ninja -DPython3_EXECUTABLE=$(abspath $(PY)) > /dev/null
	PATH="$(abspath $(VENV))/bin:$$PATH" ninja -C build -j $(JOBS)

# The kernels alone, on numpy arrays: once as shipped, once under sanitizers.
build-tests: env
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B build-tests -G Ninja -DFASTNN_TESTS=ON \
	  -DPython3_EXECUTABLE=$(abspath $(PY)) -DPython_EXECUTABLE=$(abspath $(PY)) > /dev/null
	PATH="$(abspath $(VENV))/bin:$$PATH" ninja -C build-tests -j $(JOBS)
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B build-sanitize -G Ninja -DFASTNN_TESTS=ON \
	  -DFASTNN_SANITIZE=$(SANITIZERS) -DPython3_EXECUTABLE=$(abspath $(PY)) -DPython_EXECUTABLE=$(abspath $(PY)) > /dev/null
	PATH="$(abspath $(VENV))/bin:$$PATH" ninja -C build-sanitize -j $(JOBS)

# Longer trials with FULL=1, from a seed of their own that the command lines show; SEED repeats one.
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
ifdef FULL
test: SEED := $(SEED)
test: export FASTNN_FULL := $(FULL)
test: export FUZZ_SEED = $(SEED)
test: AT_RANDOM = --hypothesis-seed=$(SEED)
endif
test: build build-tests
	FASTNN_KERNELS=build-tests $(PY) -m pytest -n $(JOBS) $(AT_RANDOM) tests
	TRITON_INTERPRET=1 $(PY) -m pytest -n $(JOBS) tests/test_triton_interpreted.py
	FASTNN_KERNELS=build-sanitize ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(PY) -m pytest -n $(JOBS) tests/test_*_kernels.py
	$(MAKE) test-wheel

# Faults put into the sources on purpose, each of which a test has to notice.
mutants: build
	$(PY) tests/mutants.py $(MUTANTS)

# The wheel: its name and contents, and a smoke test outside of the source tree; PYTHONS="python3.10 python3.12" tries it
# in fresh environments of those as well.
test-wheel: wheel sdist
	$(PY) tests/wheel/check.py dist/fastnn-*.whl $(PYTHONS)

# The rivals that are no part of torch; the suite goes on without one that cannot be installed.
$(VENV)/.peers: $(VENV)/.installed
	$(PY) -m pip install -q -c constraints.txt onnxruntime onnx onnxscript openvino \
	  || echo "make bench: no ONNX Runtime and OpenVINO to measure against (see above); going on without them"
	touch $@

bench: build $(VENV)/.peers
	$(PY) -m benchmarks run $(BENCH_ARGS)

# On a machine with a GPU: build, tests and suite, with the python3, torch and nvcc that are there and without a network.
gpu:
	python3 -m benchmarks.gpu $(GPU_ARGS)

wheel: env
	rm -f dist/fastnn-*.whl
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

sdist: env
	rm -f dist/fastnn-*.tar.gz
	$(PY) -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null

lint: env
	$(PY) -m pip install -q -c constraints.txt ruff clang-format
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cpp csrc/cuda/*.cu benchmarks/native/*.cpp

format: env
	$(PY) -m pip install -q -c constraints.txt ruff clang-format
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .
	$(VENV)/bin/clang-format -i csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cpp csrc/cuda/*.cu benchmarks/native/*.cpp

clean:
	rm -rf build build-gpu build-tests build-sanitize dist $(VENV)
