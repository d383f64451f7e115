"""Package definition. Run-time requirements are those of requirements.txt, so that they stand in one place."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Returns: the requirement lines of a file."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


setup(
    name="fastdeploy-pd",
    version="0.1.0",
    description="A serving cluster for large language models with prefill and decode on separate instances",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fastdeploy_pd", "fastdeploy_pd.*", "rdma_comm", "rdma_comm.*"]),
    ext_modules=[
        Extension(
            "rdma_comm._verbs",
            sources=[f"rdma_comm/{name}.c" for name in ("_verbs", "_objects", "_queue_pair", "_transfer")],
            depends=["rdma_comm/_abi.h", "rdma_comm/_objects.h"],
            libraries=["dl"],
            extra_compile_args=["-std=c11", "-Wall", "-Wextra", "-Wno-missing-field-initializers"],
            optional=True,  # without Python's headers everything but RDMA works, and RDMA says what is missing
        )
    ],
    package_data={
        "fastdeploy_pd": ["cluster/scripts/*.lua", "demo_model/*"],
        "rdma_comm": ["_verbs.pyi", "cuda/blocks.cu", "cuda/blocks.ptx"],
    },
    install_requires=requirements("requirements.txt"),
    extras_require={
        "paddle-gpu": ["paddlepaddle-gpu"],
        "torch": ["torch>=2.11,<2.14"],
        "rdma": [],  # system packages only: rdma-core, python3-pyverbs
        "ray": ["ray>=2.40"],
        "mooncake": [
            "mooncake-transfer-engine>=0.3.13"
        ],  # needs CUDA 12; both: apt-get install libibverbs1 libnuma1 libcurl4
        "mooncake-cpu": ["mooncake-transfer-engine-non-cuda>=0.3.13"],
        "otel": ["opentelemetry-sdk>=1.28", "opentelemetry-exporter-otlp-proto-http>=1.28"],
        "plot": ["matplotlib>=3.8,<4"],
        # NIXL, which bench_transfer measures too, names torch: pip install --no-deps nixl-cu13
        "bench": [
            "httpx>=0.27",
            "mooncake-transfer-engine-non-cuda>=0.3.13; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
        "test": requirements("requirements-test.txt"),
    },
    entry_points={"console_scripts": ["fastdeploy-pd = fastdeploy_pd.entrypoints.cli:main"]},
)
