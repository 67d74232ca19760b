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

.PHONY: env build build-tests build-sanitize test mutants test-wheel bench gpu wheel sdist lint format clean

# torch first and alone: its own pinned version decides which build of it pip takes.
$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q -c constraints.txt cmake ninja pybind11 scikit-build-core numpy rich matplotlib jinja2 \
	  jsonschema scikit-learn pytest pytest-benchmark pytest-xdist hypothesis ml-dtypes triton safetensors ruff clang-format
	touch $@

env: $(VENV)/.installed

WITH_TOOLS := PATH="$(abspath $(VENV))/bin:$$PATH"
CONFIGURE = $(WITH_TOOLS) cmake -S . -G Ninja -DPython3_EXECUTABLE=$(abspath $(PY)) -DPython_EXECUTABLE=$(abspath $(PY))

# One tree: the library, and what tests need beside it, of the same objects.
build: env
	$(CONFIGURE) -B build -DFASTNN_TESTS=ON > /dev/null
	$(WITH_TOOLS) ninja -C build -j $(JOBS) _C

build-tests: build
	$(WITH_TOOLS) ninja -C build -j $(JOBS)

# The kernels under sanitizers, another tree. A quick run holds the levels at both ends: what lies between them has the
# same sources but for a few lines, and reads past an array end at a guard page at every level.
SANITIZED_LEVELS := $(if $(FULL),,portable;avx512_bf16)
build-sanitize: env
	$(CONFIGURE) -B build-sanitize -DFASTNN_SANITIZE=$(SANITIZERS) "-DFASTNN_SANITIZED_LEVELS=$(SANITIZED_LEVELS)" > /dev/null
	$(WITH_TOOLS) ninja -C build-sanitize -j $(JOBS)

# A quick run has every pair of a test's parameters (tests/pairwise.py). FULL=1 has every combination and longer trials,
# from a seed of their own that the command lines show; SEED repeats one.
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
ifdef FULL
test: SEED := $(SEED)
test: export FASTNN_FULL := $(FULL)
test: export FUZZ_SEED = $(SEED)
test: AT_RANDOM = --hypothesis-seed=$(SEED)
endif
# Each of several processes has as many threads as there are cores. One that waits in a loop keeps a core from the others
# (attention's tests took three times as long), and so do NumPy's, of the oracles (the kernels' tests: twice).
test mutants: export OMP_WAIT_POLICY := passive
test mutants: export OPENBLAS_NUM_THREADS := 1
PYTEST = $(PY) -m pytest -n $(JOBS) --dist worksteal $(AT_RANDOM)
TIMES := dist/stages.txt
STAGE = tests/stage.sh $(TIMES)
test:
	@rm -f $(TIMES)
	+@$(STAGE) environment $(MAKE) env
	+@$(STAGE) lint $(MAKE) lint
	+@$(STAGE) build $(MAKE) build-tests
	@$(STAGE) tests $(PYTEST) tests
	@TRITON_INTERPRET=1 $(STAGE) "Triton's kernels" $(PYTEST) tests/test_triton_interpreted.py
	+@$(STAGE) "sanitized build" $(MAKE) build-sanitize
	@FASTNN_KERNELS=build-sanitize ASAN_OPTIONS=detect_leaks=0 \
	  PRELOADED="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(STAGE) "sanitized tests" sh -c 'LD_PRELOAD="$$PRELOADED" exec $(PYTEST) tests/test_*_kernels.py'
	+@$(STAGE) wheel $(MAKE) test-wheel
	@cat $(TIMES)

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

# Of the tree that is there: nothing is compiled a second time.
wheel: build
	rm -f dist/fastnn-*.whl
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -C build-dir=build -C build.targets=_C -w dist .

sdist: env
	rm -f dist/fastnn-*.tar.gz
	$(PY) -c "from scikit_build_core import build; build.build_sdist('dist')" > /dev/null

lint: env
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cpp csrc/cuda/*.cu benchmarks/native/*.cpp examples/*.cpp

format: env
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .
	$(VENV)/bin/clang-format -i csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cpp csrc/cuda/*.cu benchmarks/native/*.cpp examples/*.cpp

clean:
	rm -rf build build-gpu build-sanitize dist $(VENV)
