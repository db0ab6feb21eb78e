# `make test` and `make demo` set up everything they need in .venv (or in VENV=…) on their first call.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CORE_SOURCES := $(shell find csrc -name '*.[ch]pp') csrc/CMakeLists.txt setup.py
# The extension's build and the launchers must find this environment's cmake and ninja, not the system's.
export PATH := $(abspath $(BIN)):$(PATH)
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
export DS_ACCELERATOR = cpu
endif

.PHONY: setup test slow faults lint asan tsan fuzz bench demo clean

setup: $(VENV)/.core

$(VENV)/.packages: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools pybind11 cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,mpi]'
	touch $@

$(VENV)/.core: $(VENV)/.packages $(CORE_SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

test: setup
	$(BIN)/python -m pytest

slow: setup
	$(BIN)/python -m pytest -m slow

# On two and three hosts made of network namespaces (tests/hosts.py); where there can be none, it fails and says why.
faults: setup
	XLM_DS_HOSTS_REQUIRED=1 $(BIN)/python -m pytest -m faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The core's tests and fuzz targets with every assert(), under the sanitizers.
SANITIZED := -G Ninja -DXLM_DS_EXTENSION=OFF -DXLM_DS_TESTS=ON -DXLM_DS_WERROR=ON -DCMAKE_CXX_FLAGS_RELEASE=-O1

# The C++ test program, a bounded part of the fuzzing and the tests of the data rooms under the address and
# undefined-behaviour sanitizers; not those that measure memory or start another Python, which would import the plain
# extension.
asan: build/asan-core/core_tests
	build/asan-core/core_tests
	cd build/asan-core && for target in $(FUZZ_TARGETS); do ./fuzz_$$target --runs 20000 --seed $(SEED) || exit 1; done
	XLM_DS_CMAKE_ARGS=-DXLM_DS_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base build/asan-python --build-lib build/asan
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=build/asan $(BIN)/pytest -p no:cacheprovider -k "not memory and not killed and not ctrl_c and not standard_input" $(ASAN_TESTS)
ASAN_TESTS := tests/test_binarize.py tests/test_texts.py tests/test_dataset.py tests/test_order.py tests/test_batches.py tests/test_bpe.py tests/test_shards.py

build/asan-core/core_tests: $(CORE_SOURCES) | setup
	cmake -S csrc -B build/asan-core $(SANITIZED) -DXLM_DS_FUZZ=ON -DXLM_DS_SANITIZE=address,undefined
	cmake --build build/asan-core

# The C++ test program under the thread sanitizer.
tsan: | setup
	cmake -S csrc -B build/tsan $(SANITIZED) -DXLM_DS_SANITIZE=thread
	cmake --build build/tsan
	build/tsan/core_tests

# RUNS inputs for each target, all at once; what they say is kept. CXX=clang++ takes libFuzzer instead of the tests' own
# driver (once build/asan-core is removed), which learns from each input and so has far fewer of them a second.
RUNS := 10000000
SEED := 1
FUZZ_TARGETS := bpe codes dataset dictionary index pair words
FUZZ_LOG := benchmarks/results/fuzz.log
fuzz: build/asan-core/core_tests
	{ echo "make fuzz RUNS=$(RUNS) SEED=$(SEED), $$(date -u +%F), commit $$(git describe --always --dirty)"; \
	  echo "$$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), $$(nproc) cores, $$(uname -sr), $$($(BIN)/python -V)"; \
	  echo "$$($(CXX) --version | head -n 1), -fsanitize=address,undefined -O1"; } > build/fuzz.log
	cd build/asan-core && (printf './fuzz_%s\n' $(FUZZ_TARGETS); echo "$(abspath $(BIN))/python ../../tests/fuzz_dictionary.py") | \
	  xargs -P "$$(nproc)" -I{} sh -c "{} --runs $(RUNS) --seed $(SEED)" >> ../fuzz.log 2>&1; status=$$?; cat ../fuzz.log; exit $$status
	cp build/fuzz.log $(FUZZ_LOG)

# More than an hour on two quiet cores, fifty minutes of it the step; benchmarks/README.md says how to install
# what it compares with. step_gpu.py is not in it: it needs a GPU.
bench: setup
	$(BIN)/python benchmarks/binarize.py
	$(BIN)/python benchmarks/bpe.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/step_cpu.py
	$(BIN)/python benchmarks/figure.py

# Raw text in five languages to an evaluated model, through the deepspeed launcher, in a few minutes on two cores.
# What is there already is reused; `rm -r demo` starts anew.
DEMO := demo
DEMO_LANGS := ar,de,en,fr,hi
DEMO_TEXT := tests/data/demo
DEMO_CONFIG := docs/demo.toml
DEMO_PORT := 29500
STAGE := $(BIN)/python -m xlm_ds

demo: $(DEMO)/report.html
	@cat $(DEMO)/table.txt
	@echo "report: $(DEMO)/report.html   model: $(DEMO)/run/checkpoint_best"

$(DEMO)/text/vocab_mlm: | setup
	$(STAGE).prepare --langs $(DEMO_LANGS) --trainpref $(DEMO_TEXT)/train --validpref $(DEMO_TEXT)/valid \
	  --testpref $(DEMO_TEXT)/test --destdir $(DEMO)/text --bpe-codes 2000

$(DEMO)/bin/test.hi.idx: $(DEMO)/text/vocab_mlm
	$(STAGE).binarize --langs $(DEMO_LANGS) --srcdict $< --only-source --trainpref $(DEMO)/text/train \
	  --validpref $(DEMO)/text/valid --testpref $(DEMO)/text/test --destdir $(DEMO)/bin

# A stamp: checkpoint_best is there long before the run has ended.
$(DEMO)/trained: $(DEMO)/bin/test.hi.idx
	$(BIN)/deepspeed --master_port $(DEMO_PORT) --module xlm_ds.train $(DEMO)/bin --monolingual-langs $(DEMO_LANGS) --save-dir $(DEMO)/run \
	  --config $(DEMO_CONFIG)
	touch $@

$(DEMO)/table.txt: $(DEMO)/trained
	$(STAGE).evaluate $(DEMO)/run/checkpoint_best $(DEMO)/bin --split test > $@.tmp
	mv $@.tmp $@

$(DEMO)/report.html: $(DEMO)/table.txt  # and so with the test's scores, which evaluate leaves in the run
	$(STAGE).report $(DEMO)/run --output $@

clean:
	rm -rf build .venv *.egg-info xlm_ds/*.so $(DEMO)
