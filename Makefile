# needs MODULE: say what to do where .venv has not got it
needs = @.venv/bin/python -c 'import $(1)' 2>/dev/null || { echo 'error: this needs $(1) in .venv: scripts/quickstart.sh --once; .venv/bin/pip install -r requirements-test.txt' >&2; exit 1; }

.PHONY: help check test test-gpu bench bench-transfer bench-pd demo-model
help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /: /'
check: ## style and types alone
	$(call needs,mypy)
	.venv/bin/ruff check .
	.venv/bin/mypy
test: ## install what tests need and run all of them
	scripts/test.sh
test-gpu: ## what needs a GPU (some of it two): kernels, transfers, the acceptance suite on GPUs; without one it is skipped by name, but most of tests/transfer runs on the CPU too (5 minutes)
	$(call needs,pytest)
	.venv/bin/python -m pytest -q tests/acceptance/test_gpu.py tests/rdma/test_cuda.py tests/transfer tests/model/test_kernels.py tests/model/test_device_runner.py tests/model/test_device_sampler.py tests/model/test_precision.py tests/model/test_sums.py
	.venv/bin/python -m pytest -q --device cuda $(filter-out tests/acceptance/test_gpu.py tests/acceptance/test_two_hosts.py tests/acceptance/test_up.py,$(wildcard tests/acceptance/test_*.py))
bench: ## measure what needs no GPU; writes bench-results/*.json (docs/benchmarks.md)
	$(call needs,httpx)
	.venv/bin/python -m benchmarks.run
bench-transfer: ## KV transfers beside Mooncake, NIXL, perftest and a plain socket; shorter: make bench-transfer ARGS='--rounds 1'
	$(call needs,numpy)
	.venv/bin/python -m benchmarks.run --only transfer $(ARGS)
bench-pd: ## two GPUs under a recorded trace, ours and vLLM's layouts: make bench-pd ARGS='--model DIR --json pd.json'
	$(call needs,httpx)
	.venv/bin/python -m benchmarks.bench_pd $(ARGS)
demo-model: ## train the demo model again (a GPU makes it minutes)
	$(call needs,torch)
	.venv/bin/python scripts/demo_model/train.py --out fastdeploy_pd/demo_model
