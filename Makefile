# Every target makes .venv if it is missing and installs what constraints-dev.txt pins. Nothing else to type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
STUDY_ARGS ?=
BENCH_ARGS ?=
SOURCES := $(shell find csrc -type f)
TEST_ARGS ?=
MUTANT_ARGS ?=

# mmdetection needs older numpy and setuptools than the rest: an environment of its own.
VENV_MMDET := .venv-mmdet
BIN_MMDET := $(VENV_MMDET)/bin
VENV_FRAMEWORKS := .venv-frameworks
VENV_DOCS := .venv-docs

.PHONY: install demo study test test-asan test-tsan fuzz mutants lint wheel bench codegen clean install-mmdet test-mmdet demo-mmdet bench-mmdet install-frameworks test-frameworks demo-frameworks docs

install: $(VENV)/.installed

# torch comes first and alone: a build that asks for it finds it there, pinned.
$(VENV)/.installed: constraints-dev.txt pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m frs_kernels
	touch $@

# Hours on two cores; STUDY_ARGS="--quick" shows in a minute that all of it works.
study: install
	$(BIN)/python -m examples.digits.compare $(STUDY_ARGS)

demo: install
	$(BIN)/python -m examples.digits $(DEMO_ARGS)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TEST_ARGS)

# The CPU library under the address and undefined-behaviour sanitizers, in every instruction set that this CPU has. Leaks
# are Python's and torch's own. LD_PRELOAD, since Python itself knows nothing of the sanitizer.
SANITIZED := g++ -fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=vptr -fno-omit-frame-pointer -g1
ASAN_TESTS := accuracy cpu edges focal gradients heads malformed operators properties range row_terms rows softmax_kl table
test-asan: install
	FRS_BUILD=cpu FRS_BUILD_DIR=build/asan/objects CXX="$(SANITIZED)" $(BIN)/python setup.py --quiet build --build-lib build/asan/lib
	$(foreach isa,baseline avx2 avx512,cd build/asan/lib && \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 FRS_CPU=$(isa) \
	  $(CURDIR)/$(BIN)/python -m pytest -n 2 -q -p no:cacheprovider -k "cpu-cpu or malformed" \
	  $(ASAN_TESTS:%=$(CURDIR)/tests/test_%.py) && cd $(CURDIR) &&) true

# The CPU library under the thread sanitizer, called by eight Python threads at once. Each has one thread of OpenMP: g++'s
# runtime of it is not instrumented, so that the sanitizer takes every end of a parallel region for a race.
test-tsan: install
	FRS_BUILD=cpu FRS_BUILD_DIR=build/tsan/objects CXX="g++ -fsanitize=thread -g1" $(BIN)/python setup.py --quiet build --build-lib build/tsan/lib
	$(foreach isa,baseline avx2 avx512,cd build/tsan/lib && \
	  LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0" FRS_CPU=$(isa) OMP_NUM_THREADS=1 \
	  $(CURDIR)/$(BIN)/python -m pytest -q -p no:xdist -p no:cacheprovider -k "eight_threads and cpu" \
	  $(CURDIR)/tests/test_loops.py && cd $(CURDIR) &&) true

# 34,400 random calls: 8,000 of torch and of the CPU library in each instruction set (one that this CPU lacks falls back to a
# narrower one), 400 of Triton's interpreter, 2,000 of the CUDA sources on the host. What fails is shrunk, printed as a
# test, and tried first the next time; of the CUDA sources only its seed is printed.
FUZZ_CASES ?= 2000
FUZZ = FUZZ_CASES=$(FUZZ_CASES) FUZZ_KEEP=.hypothesis/fuzz OMP_NUM_THREADS=1 \
  $(BIN)/python -m pytest -n 2 --dist worksteal --timeout 0 -q tests/test_fuzz.py
fuzz: install
	$(foreach isa,baseline avx2 avx512,FRS_CPU=$(isa) $(FUZZ) -k cpu-cpu &&) true
	$(FUZZ) tests/test_cuda_source.py -k "any_call and not cpu-cpu or random_calls"

# Small faults in the sources, one at a time: do the tests notice? An hour on two cores; docs/mutants.md has what came of it.
mutants: install
	$(BIN)/python tools/mutants.py $(MUTANT_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy

# The folders that setuptools assembles a wheel in keep what has since been deleted from the sources.
# auditwheel tells from the symbols which glibc the wheel asks for, and names it so; torch brings its own libraries.
wheel: install
	rm -rf build/lib* build/bdist* build/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl

bench: install
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

bench-mmdet: install-mmdet
	$(BIN_MMDET)/python benchmarks/bench_mmdet.py $(BENCH_ARGS)

codegen: install
	$(BIN)/python tools/resources.py --write
	$(BIN)/python tools/codegen.py --write

# mmcv comes as source: about 10 minutes of compiling on two cores, once; pip keeps the wheel it makes.
install-mmdet: $(VENV_MMDET)/.installed

$(VENV_MMDET)/.installed: constraints-mmdet.txt pyproject.toml setup.py $(SOURCES)
	test -x $(BIN_MMDET)/python || $(PYTHON) -m venv $(VENV_MMDET)
	$(BIN_MMDET)/python -m pip install --quiet --constraint constraints-mmdet.txt torch setuptools wheel ninja numpy
	$(BIN_MMDET)/python -m pip install --quiet --constraint constraints-mmdet.txt --no-build-isolation --editable ".[test,mmdet]"
	touch $@

test-mmdet: install-mmdet
	OMP_NUM_THREADS=1 $(BIN_MMDET)/python -m pytest -n 2 --dist worksteal tests/mmdetection $(TEST_ARGS)

demo-mmdet: install-mmdet
	$(BIN_MMDET)/python -m examples.mmdet $(DEMO_ARGS)

# torchvision, transformers and Ultralytics, with the torch that torchvision was built for; the package is the source
# folder's, with the libraries that `make install` built against another torch.
install-frameworks: install $(VENV_FRAMEWORKS)/.installed

$(VENV_FRAMEWORKS)/.installed: constraints-frameworks.txt
	test -x $(VENV_FRAMEWORKS)/bin/python || $(PYTHON) -m venv $(VENV_FRAMEWORKS)
	$(VENV_FRAMEWORKS)/bin/python -m pip install --quiet --constraint constraints-frameworks.txt torch torchvision \
		transformers scipy ultralytics pycocotools scikit-learn pillow rich pytest pytest-xdist pytest-timeout hypothesis
	touch $@

test-frameworks: install-frameworks
	OMP_NUM_THREADS=1 PYTHONPATH=. $(VENV_FRAMEWORKS)/bin/python -m pytest -n 2 --dist worksteal tests/frameworks $(TEST_ARGS)

demo-frameworks: install-frameworks
	PYTHONPATH=. $(VENV_FRAMEWORKS)/bin/python -m examples.frameworks $(DEMO_ARGS)

# The pages as a site, in site/. The docstrings are read from the sources: neither torch nor the package is installed.
docs: $(VENV_DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/python -m mkdocs build --strict

$(VENV_DOCS)/.installed: constraints-docs.txt
	test -x $(VENV_DOCS)/bin/python || $(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/python -m pip install --quiet --constraint constraints-docs.txt mkdocs-material "mkdocstrings[python]" ruff
	touch $@

clean:
	rm -rf $(VENV) $(VENV_DOCS) $(VENV_FRAMEWORKS) $(VENV_MMDET) build dist site frs_kernels/lib *.egg-info
