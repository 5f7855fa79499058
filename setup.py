"""Packaging. `kernels/` is installed as `vtc_kernels`: a top-level `kernels` would shadow another package."""

from pathlib import Path

from setuptools import setup

PACKAGES = ("cli", "eval", "eval.tasks", "hf", "hf.graphs", "methods", "ops", "tiny", "ui", "vllm")

setup(
    name="vtc-cls",
    version="0.1.0",
    description="Keep the visual tokens the vision encoder's [CLS] token attends to: fast, exact, batched, fork-free.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # transformers 5.23, the oldest with which models run, needs 3.11. .ci/run resolves everything for each of these.
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)],
    packages=["vtc", *(f"vtc.{name}" for name in PACKAGES), "vtc_kernels"],
    package_dir={"vtc_kernels": "kernels"},
    package_data={"vtc.tiny": ["checkpoint/*"], "vtc.ui": ["style.css"], "vtc": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        # Models need 5.23 or newer and raise an error with an older version; operations and methods do not.
        "transformers>=5.16",
        "wrapt",
        "packaging",
        "safetensors",
        "numpy",
        "filelock",
        "pillow>=10.1",
        "typer",
        "rich",
    ],
    extras_require={
        "bench": ["matplotlib"],
        "ui": ["gradio>=6.31"],
        "eval": ["matplotlib", "openpyxl", "accelerate"],
        "ray": ["ray[data]"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "matplotlib",
            "openpyxl",
            "accelerate",
            "peft",
            "setuptools>=77",
            "gradio>=6.31",
            "playwright",
            "nbclient",
            "ipykernel",
        ],
        "trl": ["trl", "datasets"],
        # lmms-eval 0.7.3 reaches into a private module of filelock that 4.0 no longer has.
        "lmms": ["lmms-eval>=0.7.3", "filelock<4"],
        # The first whose LLaVA runs with the transformers that VTC needs.
        "vllm": ["vllm>=0.31"],
        "dev": ["ruff", "mypy"],
        "flash": ["flash-attn"],
    },
    entry_points={
        "console_scripts": ["vtc = vtc.cli.__main__:main"],
        "lmms_eval.models": ["vtc = vtc.eval.lmms_manifest:manifest"],
        "vllm.general_plugins": ["vtc = vtc.vllm:register"],
    },
)
