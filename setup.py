"""Package metadata and dependencies; a plain install trains, extras add the rest."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "alfworld": ["alfworld>=0.4", "textworld[pddl]>=1.6"],
    "server": ["openai>=1.50"],
    "flash": ["flash-attn>=2.7"],
    "liger": ["liger-kernel>=0.5"],
    "bitsandbytes": ["bitsandbytes>=0.45"],
    "torchao": ["torchao>=0.10"],
    "pytorch-optimizer": ["pytorch-optimizer>=3.3"],
    "mongo": ["pymongo>=4.8"],
    "wandb": ["wandb>=0.17"],
    "mlflow": ["mlflow>=2.10"],
    "trackio": ["trackio>=0.3"],
    "swanlab": ["swanlab>=0.4"],
    "ray": ["ray>=2.40"],
    "dev": [
        "pytest>=8",
        "hypothesis>=6.100",
        "ruff>=0.8",
        "mypy>=1.13",
        "trl>=1.0",
        "types-PyYAML",
        "pymongo>=4.8",
        "mongomock>=4.1",
    ],
}

setup(
    name="verl-sft",
    version="0.1.0",
    description="verl-style supervised fine-tuning of agents, from environment to success rate",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["verl_sft", "verl_sft.*"]),
    package_data={"verl_sft.audit": ["page.html", "page.css", "page.js"]},
    install_requires=[
        "torch>=2.10,<2.14",
        "transformers>=5.3",
        "peft>=0.18",
        "accelerate>=1.0",
        "safetensors>=0.5",
        "tensordict>=0.10",
        "numpy>=1.26",
        "pandas>=2.2",
        "pyarrow>=14.0.1",
        "hydra-core>=1.3.2",
        "omegaconf>=2.3",
        "jinja2>=3.1.6",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "rich>=13",
        "fsspec>=2024.2",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["verl-sft = verl_sft.__main__:start"]},
)
