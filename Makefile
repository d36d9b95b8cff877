# Two commands do everything on a fresh machine (Python 3.10+):
#   make train    sets up .venv and trains on real faces
#   make test     sets up .venv and runs lint, types, mutants and tests
# Whoever works here runs `make check` in between: lint, types and a fast part of the tests, in under two minutes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BUILT  := $(VENV)/.built
CUDA_BUILT := $(VENV)/.built-cuda
ARGS   ?=
SECONDS ?= 60
# nvcc comes from PyPI for Linux alone.
CUDA_PART := $(if $(filter Linux,$(shell uname -s)),cuda)
# A folder that is gone is an error, and no empty list.
there       = $(foreach folder,$(1),$(or $(wildcard $(folder)),$(error there is no $(folder))))
CXX_FILES  := $(shell find $(call there,csrc tests) -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CPU_FILES  := $(shell find $(call there,csrc/cpu) -type f) $(wildcard csrc/*.h csrc/*.cpp)
CUDA_FILES := $(shell find $(call there,csrc/cuda) -type f) $(wildcard csrc/*.h)

.PHONY: train test check fuzz test-distributed triton triton-versions extension cuda cuda-host lint format types timing mutants faults sanitize docs release install-check lock clean

train: $(BUILT)
	$(BIN)/protomem train $(ARGS)

# Threads that wait give way: there are as many processes as cores, and spinning ones cost each of them half its time.
# numpy's, which multiply for Triton's interpreter, do not know how to wait: there each process has one.
THREADS  := OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1
PYTEST   := $(THREADS) $(BIN)/python -m pytest -n 2 --dist worksteal
# What the tests need is made side by side: while nvcc is at its last, longest file, the other core has the rest to do.
# The output stays in order where make can do that (4.0 and later). What is timed runs alone.
TOGETHER := -j 4 $(if $(filter output-sync,$(.FEATURES)),--output-sync)
test:
	$(MAKE) $(TOGETHER) lint types docs extension $(CUDA_PART)
	$(MAKE) timing mutants
	$(PYTEST) -m "not timing" --cov --cov-report= $(ARGS)
	$(MAKE) triton ARGS="--cov --cov-append --cov-report=term --cov-fail-under=90 $(ARGS)"

# What answers at once: the contracts on the CPU's backends at small sizes, rules and modules, the arrows between rooms.
# Left out of these suites: the long walks of hypothesis through a memory's life, and the largest shape.
CHECKED := tests/ops $(filter-out tests/test_compile.py tests/test_gpu_suite.py tests/test_install.py,$(wildcard tests/test_*.py))
check: lint types $(BUILT)
	$(PYTEST) -q -m "not slow and not timing" -k "not TestMemory and not 64x9001x8" $(CHECKED) $(ARGS)

# Calls, steps and states out of a seed against oracles of their own, for as long as one likes: make fuzz SECONDS=3600.
# `make test` has a minute of it. What is found is printed with the command that shows it again.
fuzz: $(BUILT)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(ARGS)

# Many processes beside one: what `make test` has of it, then the whole grid of options, some twenty minutes on two cores.
# ARGS="--ranks 2 --only 'arc, mv'" runs a part of the grid.
test-distributed: $(BUILT)
	$(BIN)/python -m pytest -q --no-cov tests/distributed
	$(BIN)/python -m tests.distributed.grid $(ARGS)

# The Triton kernels on the CPU, in Triton's interpreter, which runs their bodies as Python.
triton: $(BUILT)
	TRITON_INTERPRET=1 $(PYTEST) -m "triton and not timing" $(ARGS)

# The same kernels under the Triton that an older torch brings along (torch 2.11 has 3.6), beside the torch of .venv:
# compiled as shipped and for every kind of argument, then in the interpreter. Some ten minutes, once per change of
# kernels; the result goes into docs/triton.md. TRITON=3.5 tries another one. Older interpreters take an array of one
# number for that number, which numpy 2.4 refuses and those before it call deprecated.
TRITON ?= 3.6
OTHER_TRITON := build/triton-$(TRITON)
OTHER_PYTEST := TRITON_CACHE_DIR=$(OTHER_TRITON)/cache $(THREADS) $(OTHER_TRITON)/bin/python -m pytest -n 2 --dist worksteal \
    --no-cov -p no:cacheprovider -W "ignore:Conversion of an array:DeprecationWarning"
triton-versions: $(BUILT) $(OTHER_TRITON)/.ready
	$(OTHER_PYTEST) tests/backends/triton tests/benchmarks/static $(ARGS)
	TRITON_INTERPRET=1 $(OTHER_PYTEST) -m "triton and not timing" $(ARGS)
$(OTHER_TRITON)/.ready:
	$(BIN)/python -m venv --without-pip $(OTHER_TRITON)
	$(BIN)/python -m pip --python $(OTHER_TRITON)/bin/python install --quiet --disable-pip-version-check --no-deps 'triton==$(TRITON).*' 'numpy<2.4'
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
	    >$$($(OTHER_TRITON)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth
	touch $(OTHER_TRITON)/.ready

# The CUDA kernels alone: built for real GPUs and their machine code read, then executed on the CPU in three builds
# (plain, sanitizers, race check) with faults planted.
cuda-host: $(BUILT) $(CUDA_PART)
	$(PYTEST) tests/cuda_host tests/backends/cuda $(ARGS)

timing: $(BUILT)
	$(BIN)/python -m pytest -q -m timing --no-header -rP tests/test_speed.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

types: $(READY)
	$(BIN)/mypy

mutants: $(BUILT)
	$(BIN)/python -m tests.faults

# Training runs killed at random moments and resumed: twenty of one process, then twenty of three under torchrun, of
# which one is killed. `make test` kills two and one. ARGS="--kills 100 --seed 7".
faults: $(BUILT)
	$(BIN)/python -c 'import sys; from tests.training.killed import main; sys.exit(main())' $(ARGS)
	$(BIN)/python -c 'import sys; from tests.training.launched import main; sys.exit(main())' $(ARGS)

# The compiled part under the sanitizers. The contract suites run on a copy of the package beside the tests, so that
# the checkout's own object cannot be the one imported (tests/conftest.py looks); then the stress programs in
# tests/backends/cpu/stress, which `make test` runs too. In all some minutes.
SANITIZED := $(CURDIR)/build/sanitized
sanitize: $(READY)
	PROTOMEM_BUILD_CPU=1 PROTOMEM_BUILD_CUDA=0 PROTOMEM_BUILD_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests $(SANITIZED)/report.*
	cp -r tests pyproject.toml $(SANITIZED)
	@echo "sanitize: the extension is built with address,undefined in build/sanitized"
	cd $(SANITIZED) && LD_PRELOAD=$$(gcc -print-file-name=libasan.so):$$(gcc -print-file-name=libubsan.so) \
	    ASAN_OPTIONS=detect_leaks=0:handle_abort=1:handle_sigill=1:log_path=$(SANITIZED)/report UBSAN_OPTIONS=print_stacktrace=1:log_path=$(SANITIZED)/report \
	    PROTOMEM_SANITIZED=$(SANITIZED) PYTHONPATH=$(SANITIZED) \
	    $(CURDIR)/$(BIN)/python -m pytest -n 2 -k cpu -m "not slow and not timing" --no-cov -p no:cacheprovider tests/ops \
	    || { cat report.*; exit 1; }
	@echo "sanitize: the contract suites are clean under address,undefined, with every instruction set"
	PROTOMEM_STRESS=required $(BIN)/python -m pytest -v --no-header --no-cov tests/backends/cpu/test_stress.py
	@echo "sanitize: the stress programs are clean under thread and under address,undefined"

# The documentation's site, into build/site; every warning is an error. The page of the command line is the command's own.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

# The compiled CPU part, into protomem_kernels/: built again when its sources change, and only what changed.
extension: $(BUILT)
$(BUILT): $(READY) setup.py CMakeLists.txt $(CPU_FILES)
	PROTOMEM_BUILD_CUDA=keep $(BIN)/python setup.py --quiet build_ext --inplace
	touch $(BUILT)

# The compiled CUDA part, the same way. The lock brings nvcc along on Linux; nobody needs it to train on a CPU.
cuda: $(CUDA_BUILT)
$(CUDA_BUILT): $(READY) setup.py $(CUDA_FILES)
	PROTOMEM_BUILD_CPU=keep PROTOMEM_BUILD_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace
	touch $(CUDA_BUILT)

# The environment is rebuilt when the lock or the package's metadata changes. Of what is installed a third is ever
# imported: it is compiled to bytecode then, by both cores, where pip would compile all of it on one.
$(READY): requirements-dev.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.lock
	PROTOMEM_BUILD_CUDA=keep $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY) $(BUILT)

# What is published, into dist/, and every check of it in one table: docs/release.md. The tools that check have an
# environment of their own.
RELEASE := build/release-venv
release: $(BUILT) $(RELEASE)/.ready
	$(BIN)/python -m release
$(RELEASE)/.ready: requirements-release.lock
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-release.lock
	touch $(RELEASE)/.ready

# The wheels of dist/ in empty environments, of other Pythons and with other torches too, which pip has to find:
#   make install-check ARGS="python3.10=2.10.0 python3.13=2.14.1"
install-check:
	$(PYTHON) -m release.environments $(ARGS)

# Newest versions that support every Python from 3.10 on. torch alone is pinned by hand; what a CUDA build of torch
# brings along (nvidia-*, triton) is its own business, the packages of the CUDA compiler excepted. A CPU build brings no
# triton, but the tests run its kernels in the interpreter: so triton is asked for without a version, which whatever pin
# torch has satisfies.
TORCH := torch==2.13.0
NVCC  := nvvm|cuda-(nvcc|crt|runtime|cccl|cuobjdump|nvdisasm)
lock: $(READY)
	$(BIN)/python -m pip install --quiet uv
	echo '$(TORCH)' | $(BIN)/uv pip compile pyproject.toml - --extra dev --universal --python-version 3.10 --quiet \
	    --no-header --no-annotate | grep -vP '^(nvidia-(?!($(NVCC))==)|cuda-|triton)' >requirements-dev.lock.new
	echo "triton ; sys_platform == 'linux'" >>requirements-dev.lock.new
	mv requirements-dev.lock.new requirements-dev.lock

clean:
	rm -rf $(VENV) build dist *.egg-info protomem_kernels/_C.* protomem_kernels/_C_cuda.*
