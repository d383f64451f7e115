.PHONY: help check test test-gpu bench bench-transfer demo-model
help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /: /'
check: ## style and types alone
	.venv/bin/ruff check .
	.venv/bin/mypy
test: ## install what tests need and run all of them
	scripts/test.sh
test-gpu: ## what needs a GPU (some of it two); skipped by name where there is none
	.venv/bin/python -m pytest -q tests/acceptance/test_gpu.py tests/rdma/test_cuda.py tests/transfer
bench: ## measure; writes bench-results/*.json (docs/benchmarks.md)
	.venv/bin/python -m benchmarks.run
bench-transfer: ## KV transfers beside Mooncake, NIXL, perftest and a plain socket; writes bench-results/transfer.json
	.venv/bin/python -m benchmarks.run --only transfer
demo-model: ## train the demo model again (a GPU makes it minutes)
	.venv/bin/python scripts/demo_model/train.py --out fastdeploy_pd/demo_model
